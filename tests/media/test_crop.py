"""The smooth square crop track and its coordinates."""

from pathlib import Path

import numpy as np
import pytest

from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop

HEIGHT, WIDTH = 720, 1280


def face_at(centres: np.ndarray, size: np.ndarray | float = 100.0) -> np.ndarray:
    """Landmarks `[T, 68, 2]` whose bounding box is a size x 0.8 size rectangle around each centre."""
    unit = np.random.default_rng(0).uniform(-0.5, 0.5, (68, 2))
    unit[:2] = [-0.5, -0.5], [0.5, 0.5]
    scale = np.broadcast_to(size, len(centres))[:, None, None] * np.array([1.0, 0.8])
    return (np.asarray(centres)[:, None] + unit * scale).astype(np.float32)


def sides(boxes: np.ndarray) -> np.ndarray:
    np.testing.assert_array_equal(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    assert (boxes >= 0).all()
    assert (boxes <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    return boxes[:, 2] - boxes[:, 0]


def all_inside(landmarks: np.ndarray, boxes: np.ndarray) -> bool:
    return bool((landmarks >= boxes[:, None, :2]).all() and (landmarks < boxes[:, None, 2:]).all())


def test_a_still_face_gets_twice_its_size_around_its_centre() -> None:
    landmarks = face_at(np.full((5, 2), [600, 300]))
    boxes = crop_track(landmarks, np.ones(5, bool), HEIGHT, WIDTH)
    np.testing.assert_array_equal(boxes, np.tile([500, 200, 700, 400], (5, 1)))


@pytest.mark.parametrize(("jump", "share"), [(10, 0.26), (50, 0.5), (100, 0.8)])
def test_share_of_the_way_grows_with_the_motion(jump: int, share: float) -> None:
    centres = np.full((3, 2), [600.0, 300.0])
    centres[1:, 0] += jump
    landmarks = face_at(centres, 400.0)
    boxes = crop_track(landmarks, np.ones(3, bool), HEIGHT, WIDTH)
    # Side 720 (the frame's height) after clamping.
    assert (sides(boxes) == 720).all()
    assert boxes[1, 0] - boxes[0, 0] == pytest.approx(share * jump, abs=1)


def test_growing_face_stays_square_and_both_corners_move_by_one_share() -> None:
    landmarks = face_at(np.full((2, 2), [600.0, 300.0]), np.array([100.0, 140.0]))
    boxes = crop_track(landmarks, np.ones(2, bool), HEIGHT, WIDTH)
    motion = np.hypot(40, 40)  # Each corner of the target moves by 40 px in x and in y.
    share = 0.2 + 0.6 * motion / 100
    assert sides(boxes).tolist() == [200, int(np.ceil(200 + 80 * share))]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centre, [[600, 300]] * 2, atol=1)


def test_the_face_is_never_cut() -> None:
    rng = np.random.default_rng(1)
    centres = np.clip(np.cumsum(rng.normal(0, 60, (300, 2)), axis=0), [-580, -300], [580, 300])
    size = np.clip(80 + np.cumsum(rng.normal(0, 12, 300)), 30, 110)
    landmarks = face_at(np.array([640, 360]) + centres, size)
    boxes = crop_track(landmarks, np.ones(300, bool), HEIGHT, WIDTH)
    sides(boxes)
    assert all_inside(landmarks, boxes)


def test_faces_at_the_border_and_larger_than_the_frame() -> None:
    landmarks = face_at(np.array([[20.0, 700.0]] * 3))
    boxes = crop_track(landmarks, np.ones(3, bool), HEIGHT, WIDTH)
    assert sides(boxes).tolist() == [200] * 3
    assert boxes[0].tolist() == [0, 520, 200, 720]
    huge = crop_track(face_at(np.array([[640.0, 360.0]] * 3), 1500.0), np.ones(3, bool), HEIGHT, WIDTH)
    assert sides(huge).tolist() == [720] * 3


def test_the_track_starts_anew_after_absence() -> None:
    centres = np.repeat([[200.0, 300.0], [1000.0, 400.0]], [4, 3], axis=0)
    landmarks = face_at(centres)
    seen = crop_track(landmarks, np.ones(7, bool), HEIGHT, WIDTH)
    present = np.array([1, 1, 0, 0, 1, 1, 1], bool)
    anew = crop_track(landmarks, present, HEIGHT, WIDTH)
    assert anew[4].tolist() == [900, 300, 1100, 500]
    assert seen[4, 0] < 900


def test_noise_is_smoothed() -> None:
    noise = np.random.default_rng(2).normal(0, 2, (200, 2))
    landmarks = face_at(np.array([600.0, 300.0]) + noise)
    boxes = crop_track(landmarks, np.ones(200, bool), HEIGHT, WIDTH)
    assert np.diff(boxes[:, 0]).std() < 0.5 * np.diff(noise[:, 0]).std()


def test_crop_and_coordinates_agree() -> None:
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[340:344, 610:614] = 255
    box = np.array([500, 200, 756, 456])
    crop = crop_frame(frame, box, 512)
    assert crop.shape == (512, 512, 3)
    assert crop.dtype == np.uint8
    rows, columns = np.nonzero(crop[..., 0] > 128)
    place = landmarks_in_crop(np.full((68, 2), [612.0, 342.0]), box, 512)
    assert place.dtype == np.float32
    np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], place[0], atol=0.01)
    np.testing.assert_array_equal(crop_frame(frame, box, 256), frame[200:456, 500:756])
    many = landmarks_in_crop(np.full((2, 68, 2), [612.0, 342.0]), np.stack([box, box + 10]), 512)
    np.testing.assert_allclose(many[0], place)
    np.testing.assert_allclose(many[1], place - 20)


def test_the_real_clip(real: Path) -> None:
    landmarks = np.load(real / "demo1_landmarks.npy")
    boxes = crop_track(landmarks, np.ones(250, bool), 1920, 1080)
    side = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_array_equal(side, boxes[:, 3] - boxes[:, 1])
    assert all_inside(landmarks, boxes)
    extent = np.ptp(landmarks, axis=1).max(axis=1)
    assert (np.abs(side / extent - 2) < 0.35).all()
    assert np.abs(np.diff(boxes, axis=0)).max() < 20
