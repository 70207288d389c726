"""Light-ASD with its real weights beside the numbers of its original, and the scoring of a track."""

from pathlib import Path

import jax
import numpy as np
import pytest

from keysync_jax.backend import computing
from keysync_jax.cli import main
from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.scorers import light_asd_table, load_scorer
from keysync_jax.metrics.meter import Moment, Subject
from keysync_jax.metrics.registry import Bench
from keysync_jax.nn import functional as F
from keysync_jax.parity import rules
from keysync_jax.pipeline.active_speaker import PIECES, SpeakerNetwork, SpeakerTrack, Speaking
from keysync_jax.tensorfile import TensorFile
from keysync_jax.typing import Array


@pytest.fixture(scope="module")
def weights(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with Light-ASD's own in it."""
    pytest.importorskip("torch")
    checkpoint = real / "light_asd" / "finetuning_TalkSet.model"
    if not checkpoint.is_file():
        pytest.skip("Light-ASD's weights are not here")
    folder = tmp_path_factory.mktemp("weights")
    output = folder / "light_asd.safetensors"
    assert main(["convert", "--light-asd", str(checkpoint), "-o", str(output)]) == 0
    assert TensorFile(output).metadata["converted_from"].startswith("finetuning_TalkSet.model sha256:")
    return folder


def test_embeddings_and_scores_are_the_originals(golden: Path, weights: Path) -> None:
    expected = TensorFile(golden / "dev.light_asd.safetensors")
    graphdef, params = load_scorer("light-asd", weights / "light_asd.safetensors")
    faces = np.clip(rules.array("dev/asd/faces", (1, 50, 112, 112)) * 40 + 128, 0, 255)
    vectors = rules.array("dev/asd/mfcc", (1, 200, 13)) * 8

    @jax.jit
    def parts(params: Array) -> tuple[Array, Array, Array]:
        network = F.bind(graphdef, params)
        return network.audio(vectors), network.visual(faces), network(faces, vectors)

    with computing("fp32"):
        audio, visual, logits = (np.asarray(x) for x in parts(params))
    np.testing.assert_allclose(audio, expected["out/audio_embedding"], atol=1e-4)
    np.testing.assert_allclose(visual, expected["out/visual_embedding"], atol=1e-4)
    # The stored view was not contiguous, so the file has its first bytes: both classes of 25 frames.
    np.testing.assert_allclose(logits.reshape(-1)[1:51], expected["out/score"], atol=1e-4)


def test_the_checkpoint_survives_the_way_here_and_back(real: Path, weights: Path) -> None:
    tensors = open_tensors(real / "light_asd" / "finetuning_TalkSet.model")
    back = light_asd_table().to_torch(TensorFile(weights / "light_asd.safetensors"))
    unused = {key for key in tensors if key.startswith("lossV.") or key.endswith("num_batches_tracked")}
    assert back.keys() == tensors.keys() - unused
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in back)


class _Counted(SpeakerNetwork):
    """Says the mean of a piece and its length, and notes how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def logits(self, faces: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        self.asked.append((len(faces), len(vectors)))
        return np.stack([np.zeros(len(faces)), np.full(len(faces), len(faces) / 150)], axis=1)


def test_a_track_is_scored_in_pieces_and_little_of_it_is_held() -> None:
    network, frames = _Counted(), 310
    track = SpeakerTrack(network, np.full((frames, 4), [10, 10, 40, 40.0]), np.zeros(16_000 * 20))
    held = []
    for _ in range(frames):
        track.update(np.zeros((60, 60, 3), np.uint8))
        held.append(len(track._faces))
    found = track.result()
    assert max(held) < 150
    assert all(voice == 4 * faces for faces, voice in network.asked)
    for piece in PIECES:
        rest = frames % piece
        assert network.asked.count((rest, 4 * rest)) >= (1 if rest else 0)
    assert found.logit.shape == found.probability.shape == (frames,)
    assert found.logit[0] == pytest.approx(np.mean(PIECES) / 150)
    assert found.share == 1


def test_frames_after_the_voice_have_no_score() -> None:
    track = SpeakerTrack(_Counted(), np.full((30, 4), [10, 10, 40, 40.0]), np.zeros(16_000))
    for _ in range(30):
        track.update(np.zeros((60, 60, 3), np.uint8))
    assert len(track.result().logit) == 24  # of 99 vectors
    with pytest.raises(ValueError, match="no frame with a voice"):
        SpeakerTrack(_Counted(), np.zeros((1, 4)), np.zeros(0)).result()


def test_speaking_is_decided_over_five_frames() -> None:
    logit = np.array([1, 1, 1, -9, 1, 1, 1, 1, 1], np.float32)
    assert Speaking(logit, logit).share == pytest.approx(4 / 9)


def test_the_registry_reads_a_talking_face(weights: Path) -> None:
    # A face that is not there at all says nothing about speaking, but it has a number.
    landmarks = np.random.default_rng(0).uniform(20, 60, (25, 68, 2))
    voice = np.random.default_rng(1).normal(size=17_000).astype(np.float32) * 0.1
    reading = Bench(["active_speaker"], weights).start(Subject(25, voice=voice, landmarks=landmarks))
    for _ in range(25):
        reading.update(Moment(np.zeros((80, 80, 3), np.uint8)))
    values = reading.result().values
    assert 0 < values["active_speaker"] < 0.5
