"""SyncNet beside the numbers of its PyTorch original, and what follows from its features."""

from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.convert.scorers import convert_scorer, load_scorer, syncnet_table
from keysync_jax.errors import UserError
from keysync_jax.media.mfcc import mfcc, to_int16
from keysync_jax.metrics import lip_sync as sync
from keysync_jax.metrics.meter import Moment, Record, Subject
from keysync_jax.metrics.registry import Bench, combine
from keysync_jax.parity import rules
from keysync_jax.tensorfile import TensorFile, write_tensors
from tests.metrics.judges import syncnet_tensors

FRAMES, SAMPLES = 24, 15_360


@pytest.fixture(scope="module")
def weights(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with SyncNet's in it."""
    folder = tmp_path_factory.mktemp("weights")
    write_tensors(folder / "original.safetensors", syncnet_tensors(golden))
    convert_scorer("syncnet", folder / "original.safetensors", folder / "syncnet.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(golden: Path) -> TensorFile:
    return TensorFile(golden / "dev.syncnet.safetensors")


def golden_voice() -> np.ndarray:
    return (np.clip(rules.array("dev/syncnet/audio", (SAMPLES,)), -3, 3) * 6000).astype(np.int16)


def golden_faces() -> np.ndarray:
    noise = rules.array("dev/syncnet/frames", (FRAMES, 224, 224, 3))
    return np.clip(noise * 40 + 128, 0, 255).astype(np.uint8)


def test_mfcc_is_the_originals(expected: TensorFile) -> None:
    voice = golden_voice()
    np.testing.assert_allclose(mfcc(voice).T, expected["out/mfcc"], atol=1e-5)
    np.testing.assert_allclose(mfcc(voice, block=7), mfcc(voice), atol=1e-6)
    assert mfcc(voice[:399]).shape == (1, 13)
    silence = mfcc(np.zeros(1000, np.int16))
    assert silence.shape == (1 + 4, 13)
    assert silence[0, 0] == pytest.approx(-36.04, abs=0.01)
    with pytest.raises(ValueError, match="int16"):
        mfcc(voice.astype(np.float32))
    np.testing.assert_array_equal(to_int16(np.array([-2, -1, 0.5, 1])), [-32768, -32768, 16384, 32767])


def test_features_distances_and_offset_are_the_originals(weights: Path, expected: TensorFile) -> None:
    network = sync.LipSyncNetwork(load_scorer("syncnet", weights / "syncnet.safetensors"))
    faces, count = golden_faces(), sync.windows_of(FRAMES, SAMPLES)
    assert count == 19
    # In two batches, as a clip's frames come.
    lips = np.concatenate([network.lips(faces[:20]), network.lips(faces[16:])])
    np.testing.assert_allclose(lips[:count], expected["out/lip"], atol=1e-4)
    voice = network.voice(mfcc(golden_voice()), count)
    np.testing.assert_allclose(voice, expected["out/audio"], atol=1e-4)
    np.testing.assert_allclose(sync.distances(lips[:count], voice), expected["out/distances"], atol=1e-3)
    found = sync.lip_sync(lips[:count], voice)
    assert found.offset == expected["out/offset"][0]
    assert found.confidence == pytest.approx(expected["out/lse_c"][0], abs=1e-3)
    assert found.distance == pytest.approx(expected["out/lse_d"][0], abs=1e-3)


class _Colours(sync.LipSyncNetwork):
    """A network whose features are the mean colour of a window's last frame, and three MFCC."""

    def __init__(self, network: object) -> None:
        pass

    def lips(self, faces: np.ndarray) -> np.ndarray:
        assert faces.shape[1:] == (224, 224, 3)
        return faces[4:].mean(axis=(1, 2)) @ np.eye(3, 1024)

    def voice(self, vectors: np.ndarray, count: int) -> np.ndarray:
        return vectors[4 : 4 + 4 * count : 4, :3] @ np.eye(3, 1024)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """A bench whose SyncNet is `_Colours`."""
    monkeypatch.setattr(sync, "load_scorer", lambda *_: None)
    monkeypatch.setattr(sync, "LipSyncNetwork", _Colours)
    (tmp_path / "syncnet.safetensors").touch()
    return Bench(["lse_d"], tmp_path)


@pytest.mark.parametrize("frames", [6, 20, 21, 36, 40])
def test_a_clip_is_measured_frame_by_frame(colours: Bench, frames: int) -> None:
    rng = np.random.default_rng(0)
    pictures = np.repeat(rng.integers(0, 256, (frames, 1, 1, 3)), 60, axis=1).repeat(50, axis=2)
    landmarks = np.tile(rng.uniform(20, 30, (68, 2)), (frames, 1, 1))
    voice = (rng.normal(size=640 * frames) * 3000).astype(np.int16)
    reading = colours.start(Subject(frames, voice=voice / 32768, landmarks=landmarks))
    for picture in pictures.astype(np.uint8):
        reading.update(Moment(picture))
    record = reading.result()
    # BGR, and a window that fits is left out.
    lips = pictures[4 : frames - 1, 0, 0, ::-1] @ np.eye(3, 1024)
    expected = sync.lip_sync(lips, _Colours(None).voice(mfcc(voice), frames - 5))
    assert record.values["lse_d"] == pytest.approx(expected.distance)
    assert record.values["lse_c"] == pytest.approx(expected.confidence)
    assert ("av_offset" in record.values) == (expected.confidence >= sync.CERTAIN)


def test_a_system_in_the_leakage_protocol_is_a_difference_of_means() -> None:
    record = Record({"lse_c": 7.0, "lse_d": 6.0})
    other = Record({"lse_c": 6.0, "lse_d": 6.5})
    assert str(combine("lsd_cr", {"current/matched": [record]})).endswith("runs current/mismatched")
    runs = {"current/matched": [record, other], "current/mismatched": [other, record]}
    assert combine("lsd_cr", runs) == 0
    assert combine("lsd_cr", {**runs, "current/mismatched": [other, other]}) == pytest.approx(0.375)
    assert combine("lse_c_s", {"current/silent": [record, other]}) == 6.5
    assert combine("lse_d_s", {"current/silent": [record, other]}) == 6.25


def test_a_late_picture_moves_the_offset_and_hardly_the_confidence() -> None:
    voice = np.random.default_rng(0).normal(size=(200, 32))
    at_once, late = sync.lip_sync(voice, voice), sync.lip_sync(np.roll(voice, 3, axis=0), voice)
    assert (at_once.offset, late.offset) == (0, 3)
    assert sync.lip_sync(voice, np.roll(voice, 3, axis=0)).offset == -3
    assert late.confidence == pytest.approx(at_once.confidence, rel=0.05)


def test_unrelated_lips_have_no_confidence() -> None:
    lips, voice = np.random.default_rng(1).normal(size=(2, 400, 64))
    assert sync.lip_sync(lips, voice).confidence < 0.1 * sync.lip_sync(lips, lips).confidence
    with pytest.raises(ValueError, match="no window"):
        sync.lip_sync(lips[:0], voice[:0])


def test_a_clip_of_a_few_frames_has_no_number(colours: Bench) -> None:
    landmarks = np.random.default_rng(0).uniform(10, 40, (5, 68, 2))
    reading = colours.start(Subject(5, voice=np.zeros(3200), landmarks=landmarks))
    for _ in range(5):
        reading.update(Moment(np.zeros((50, 50, 3), np.uint8)))
    record = reading.result()
    assert not record.values
    assert "needs six frames" in str(record.missing["lse_c"])


def test_the_checkpoint_survives_the_way_here_and_back(golden: Path, weights: Path) -> None:
    tensors, ours = syncnet_tensors(golden), TensorFile(weights / "syncnet.safetensors")
    back = syncnet_table().to_torch(ours)
    assert back.keys() == {key for key in tensors if not key.endswith("num_batches_tracked")}
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in back)
    assert sum(x.size for x in back.values()) > 13_600_000


def test_weights_of_something_else_are_refused(golden: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the weights of Light-ASD are needed here, it holds those of syncnet"
    ):
        load_scorer("light-asd", weights / "syncnet.safetensors")
    with pytest.raises(UserError, match="it holds no weights that convert wrote"):
        load_scorer("syncnet", weights / "original.safetensors")
    tensors = syncnet_tensors(golden)
    del tensors["netfclip.3.bias"]
    write_tensors(tmp_path / "less.safetensors", tensors)
    with pytest.raises(UserError, match=r"less.safetensors: tensor 'netfclip.3.bias' is missing"):
        convert_scorer("syncnet", tmp_path / "less.safetensors", tmp_path / "made.safetensors")
    with pytest.raises(UserError, match=r"are written as a .safetensors file"):
        convert_scorer("syncnet", weights / "original.safetensors", tmp_path / "made.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["less.safetensors"]


def test_the_command_converts_one_network_alone(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, made = str(weights / "original.safetensors"), tmp_path / "new" / "made.safetensors"
    assert main(["convert", "--syncnet", original, "-o", str(made)]) == 0
    assert made.read_bytes() == (weights / "syncnet.safetensors").read_bytes()
    for more in (["--light-asd", original], ["--vae", original], ["--released"]):
        assert main(["convert", "--syncnet", original, *more, "-o", str(tmp_path / "no.safetensors")]) == 2
        assert "convert takes --syncnet alone" in capsys.readouterr().err
    assert main(["convert", "--light-asd", original, "-o", str(tmp_path / "no.safetensors")]) == 2
    assert "tensor 'model.audioEncoder.block1.m_3.weight' is missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [made.parent]
