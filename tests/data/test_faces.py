"""Faces that are cut from clips of an unusual kind."""

from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.data import faces
from keysync_jax.data.faces import Faces, Task, cut_all, read_crops
from keysync_jax.data.sources import Clip, find_clips
from keysync_jax.media.audio import RATE
from keysync_jax.media.crop import crop_frame, crop_track
from keysync_jax.media.video import read_frames
from tests.clips import face_landmarks, write_voice
from tests.data.preparing import write_good
from tests.media import test_anamorphic as anamorphic
from tests.media.test_timestamps import FLASHES, HOURS, after_jump, write_flashes


def cut(path: Path, landmarks: np.ndarray, folder: Path) -> tuple[Faces, list[np.ndarray]]:
    np.save(folder / "landmarks.npy", landmarks)
    clip = Clip("clip", path, path.name, folder / "landmarks.npy")
    with closing(cut_all([Task(clip, folder / "crops", 128, 14, "", None)], 0)) as results:
        _, found = next(results)
        assert isinstance(found, Faces), found
        return found, list(read_crops(found, 128))


@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9)], ids=str)
def test_crops_of_anamorphic_video_are_round(tmp_path: Path, aspect: Fraction) -> None:
    frames = anamorphic.FRAMES
    path = anamorphic.write(tmp_path / "clip.mp4", aspect, write_voice(tmp_path / "voice.wav", frames / 25))
    found, crops = cut(path, anamorphic.points_of(frames, aspect), tmp_path)
    assert len(crops) == frames
    for crop, points in zip(crops, found.landmarks, strict=True):
        ratio, centre = anamorphic.shape_of(crop)
        assert ratio == pytest.approx(1, rel=0.03)
        np.testing.assert_allclose((points[0] + points[16]) / 2, centre, atol=1.5)


@pytest.mark.parametrize("between", [0, 60 * 25], ids=["sound jumps", "sound goes on"])
def test_sound_and_frames_of_a_clip_that_jumps_are_in_step(tmp_path: Path, between: int) -> None:
    jump = after_jump(60 if between else HOURS)
    path = write_flashes(tmp_path / "clip.mkv", jump, Fraction if between else jump, between)
    found, crops = cut(path, face_landmarks(len(FLASHES), 64, 48), tmp_path)
    white = np.array([crop.mean() > 128 for crop in crops])
    loud = np.abs(found.wave.reshape(-1, RATE // 25)).mean(axis=1) > 0.07
    np.testing.assert_array_equal(white, FLASHES)
    np.testing.assert_array_equal(loud, FLASHES)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bytes_", [2**30, 1])
def test_crops_wait_in_memory_and_on_disk_where_there_is_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, bytes_: int
) -> None:
    """Neither outlives the clip that they are of, and both hold the frames themselves."""
    monkeypatch.setattr(faces, "SHARED_BYTES", bytes_)
    source = write_good(tmp_path / "clips")
    crops = tmp_path / "crops"
    crops.mkdir()
    tasks = [Task(clip, crops / clip.path.stem, 32, 14, "", None) for clip in find_clips(source)]
    seen = []
    with closing(cut_all(tasks, workers)) as results:
        for task, found in results:
            assert isinstance(found, Faces), found
            assert (found.crops.parent == crops) is (bytes_ == 1)
            pictures = np.stack(list(read_crops(found, 32)))
            assert len(pictures) == len(found.present)
            frames = read_frames(task.clip.path)
            points = face_landmarks(len(pictures))
            boxes = crop_track(points, found.present, 80, 96)
            wanted = [crop_frame(frame, box, 32) for frame, box in zip(frames, boxes, strict=True)]
            np.testing.assert_array_equal(pictures, wanted)
            seen.append(found)
    for found in seen:
        with pytest.raises(OSError, match=found.crops.name):
            list(read_crops(found, 32))
    assert not list(crops.iterdir())
