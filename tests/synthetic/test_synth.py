"""Folders of synthetic clips: what is in them, that they are the seed's, and that a call goes on."""

from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.data.prepare import PrepareSettings, prepare
from keysync_jax.data.records import Dataset
from keysync_jax.media.audio import read_audio
from keysync_jax.media.landmarks import load_landmarks
from keysync_jax.media.video import read_frames
from keysync_jax.metrics.quality import psnr
from keysync_jax.metrics.sync import correlation
from keysync_jax.synthetic.world import draw_clip
from keysync_jax.synthetic.write import SynthSettings, synth

SETTINGS = SynthSettings(clips=2, seconds=0.8, seed=5, occluded=0.5)
FRAMES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synth") / "clips"
    assert synth(output, SETTINGS) == 2
    return output


def test_a_clip_is_its_picture_its_sound_and_its_truth(folder: Path) -> None:
    clip = draw_clip(5, 0, 0.8, occluded="occluder" in np.load(folder / "clip-00000.truth.npz"))
    pictures = list(clip.pictures())
    frames = np.stack(list(read_frames(folder / "clip-00000.mp4")))
    assert frames.shape == (FRAMES, 256, 256, 3)
    assert psnr(frames, np.stack([picture.pixels for picture in pictures])) > 30
    sound = read_audio(folder / "clip-00000.mp4")
    assert correlation(sound[: len(clip.wave)], clip.wave) > 0.95
    landmarks = load_landmarks(folder / "clip-00000.npy", FRAMES)
    np.testing.assert_allclose(landmarks, np.stack([picture.landmarks for picture in pictures]))


def test_the_truth_holds_what_is_said_of_it(folder: Path) -> None:
    truths = [dict(np.load(folder / f"clip-{number:05d}.truth.npz")) for number in range(2)]
    names = {"opening", "width", "rounding", "teeth", "mar", "gap", "mouth_width", "phoneme", "landmarks"}
    for truth in truths:
        assert names <= set(truth) <= names | {"occluder"}
        assert all(len(array) == FRAMES for array in truth.values())
        assert truth["opening"].min() >= 0
        assert truth["opening"].max() <= 1
    assert not np.array_equal(truths[0]["landmarks"], truths[1]["landmarks"])


def test_an_interrupted_call_goes_on_and_a_longer_one_adds(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "clips"
    synth(output, SynthSettings(clips=1, seconds=0.8, seed=5, occluded=0.5))
    stamp = (output / "clip-00000.mp4").stat().st_mtime_ns
    assert synth(output, SETTINGS) == 1
    assert (output / "clip-00000.mp4").stat().st_mtime_ns == stamp
    for name in ("clip-00000.npy", "clip-00001.npy", "clip-00001.wav", "clip-00001.mp4"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()


def test_the_number_of_cores_changes_nothing(folder: Path) -> None:
    # x264 writes what it was told into the stream.
    assert b" threads=1 " in (folder / "clip-00000.mp4").read_bytes()


def test_other_peoples_clips_are_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert main(["synth", "-n", "3", "-o", str(folder), "--seed", "6", "--seconds", "0.8"]) == 2
    assert "holds synthetic clips of other settings" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_damaged_folder_gets_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "world.json").write_text("{")
    assert main(["synth", "-n", "1", "-o", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("--seconds=0.2", "0.56 seconds or more"), ("--occluded=2", "0 to 1"), ("--workers=-1", "0 or more")],
)
def test_bad_options_get_a_sentence(
    option: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synth", "-n", "1", "-o", str(tmp_path / "clips"), option]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()


def test_prepare_takes_the_clips_with_their_landmarks(folder: Path, tmp_path: Path) -> None:
    """Frames alone: no model is needed, and no detector, for the landmarks are there."""
    report = prepare(folder, tmp_path / "faces", settings=PrepareSettings(crop=32))
    assert (report.done, report.frames, report.frames_without_face) == (2, 2 * FRAMES, 0)
    dataset = Dataset(tmp_path / "faces")
    record = dataset.read(0, [3])[0]
    assert set(record) == {"landmarks", "frame"}
    assert (dataset.settings.crop_size, dataset.settings.latents) == (32, "none")
    assert record["landmarks"].min() > 0
    assert record["landmarks"].max() < 32
    dataset.verify()
