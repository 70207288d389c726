"""The face crop of SyncNet: its framing, its smoothing, and the edges of the picture."""

import cv2
import numpy as np
import pytest

from keysync_jax.media.face_track import FOREHEAD, GREY, cut_face, cut_track, face_boxes, face_track


def padded_crop(frame: np.ndarray, place: np.ndarray) -> np.ndarray:
    """As `run_pipeline.py` writes it: the whole frame padded, then cut."""
    x, y, s = place
    pad = int(s * 1.8)
    whole = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), "constant", constant_values=(110, 110))
    my, mx = y + pad, x + pad
    return cv2.resize(
        whole[int(my - s) : int(my + s * 1.8), int(mx - s * 1.4) : int(mx + s * 1.4)], (224, 224)
    )


@pytest.mark.parametrize("place", [(40.3, 30.6, 12.5), (5.2, 8.1, 20.9), (77.7, 58.2, 31.4)])
def test_the_crop_is_run_pipelines(place: tuple[float, float, float]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    np.testing.assert_array_equal(cut_face(frame, np.array(place)), padded_crop(frame, np.array(place)))


def test_a_face_outside_of_the_frame_is_grey() -> None:
    assert (cut_face(np.zeros((20, 20, 3), np.uint8), np.array([500, 500, 10])) == GREY).all()
    assert cut_face(np.zeros((20, 20, 3), np.uint8), np.zeros(3)).shape == (224, 224, 3)


def test_the_track_is_a_median_that_a_single_frame_does_not_move() -> None:
    boxes = np.tile([10.0, 20, 50, 80], (40, 1))
    boxes[20] += 300
    track = face_track(boxes)
    np.testing.assert_array_equal(track, np.tile([30, 50, 30], (40, 1)))


def test_the_track_is_scipys_median_filter() -> None:
    signal = pytest.importorskip("scipy.signal")
    boxes = np.random.default_rng(1).uniform(0, 100, (30, 4))
    boxes[:, 2:] += boxes[:, :2]
    x = (boxes[:, 0] + boxes[:, 2]) / 2
    np.testing.assert_allclose(face_track(boxes)[:, 0], signal.medfilt(x, 13))


def test_boxes_reach_above_the_brows_and_over_gaps() -> None:
    landmarks = np.full((5, 68, 2), np.nan)
    landmarks[1] = np.linspace([10, 20], [50, 70], 68)
    landmarks[3] = landmarks[1] + 8
    boxes = face_boxes(landmarks)
    np.testing.assert_allclose(boxes[1], [10, 20 - FOREHEAD * 50, 50, 70])
    np.testing.assert_allclose(boxes[2], boxes[1] + 4)
    np.testing.assert_allclose(boxes[[0, 4]], boxes[[1, 3]])
    with pytest.raises(ValueError, match="no frame has a face"):
        face_boxes(np.full((5, 68, 2), np.nan))


def test_a_clip_is_cut_frame_by_frame() -> None:
    frames = np.random.default_rng(2).integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)
    boxes = np.tile([10.0, 20, 50, 60], (3, 1))
    assert len(list(cut_track(iter(frames), boxes))) == 3
    with pytest.raises(ValueError, match="zip"):
        list(cut_track(frames, boxes[:2]))
