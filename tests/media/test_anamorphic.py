"""Video whose pixels are not square: a face that is round in the scene is round for the network."""

import logging
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from keysync_jax.media.composite import paste, pasted_region
from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop, square_pixels
from keysync_jax.media.detectors import MediaPipeDetector
from keysync_jax.media.landmarks import detect_all
from keysync_jax.media.masks import make_mask, to_latent
from keysync_jax.media.video import probe_video, read_frames
from keysync_jax.media.writer import VideoWriter
from tests.clips import face_landmarks

ASPECTS = [Fraction(4, 3), Fraction(16, 11), Fraction(64, 45), Fraction(8, 9), Fraction(1)]
HEIGHT, RADIUS, FRAMES = 160, 30.0, 16
SHOWN_WIDTH = 240
"""Of the scene, in square pixels."""


def stored_width(aspect: Fraction) -> int:
    return 2 * round(SHOWN_WIDTH / aspect / 2)


def centre_of(frame: int) -> np.ndarray:
    """Of the face, in square pixels."""
    return np.array([110.0 + frame, 84.0])


def painted(frame: int, aspect: Fraction) -> np.ndarray:
    """A round face as it is stored: uint8 `[H, W, 3]`."""
    y, x = np.mgrid[:HEIGHT, : stored_width(aspect)] + 0.5
    dx, dy = x * float(aspect) - centre_of(frame)[0], y - centre_of(frame)[1]
    face = np.clip(RADIUS + 0.5 - np.hypot(dx, dy), 0, 1)
    return np.repeat((40 + 0.1 * y + 160 * face)[..., None], 3, axis=2).astype(np.uint8)


def points_of(frames: int, aspect: Fraction) -> np.ndarray:
    """The face's landmarks in stored pixels, `[frames, 68, 2]`; the jaw is on its edge."""
    angle = np.linspace(np.pi, 0, 17)
    jaw = RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    rest = np.random.default_rng(0).uniform(-0.5, 0.5, (51, 2)) * RADIUS
    rest[28 - 17], rest[0] = [0, -0.1 * RADIUS], [0, -RADIUS]
    centres = np.stack([centre_of(i) for i in range(frames)])
    shown = centres[:, None] + np.concatenate([jaw, rest])
    return (shown / [float(aspect), 1]).astype(np.float32)


def write(path: Path, aspect: Fraction, voice: Path | None = None) -> Path:
    width = stored_width(aspect)
    with VideoWriter(path, width, HEIGHT, voice, quality=1, aspect=aspect) as writer:
        for i in range(FRAMES):
            writer.write(painted(i, aspect))
    return path


def shape_of(picture: np.ndarray) -> tuple[float, np.ndarray]:
    """Width over height of the bright region of a picture, and its centre, by moments."""
    rows, columns = np.nonzero(picture[..., 0] > 120)
    return float(columns.std() / rows.std()), np.array([columns.mean(), rows.mean()]) + 0.5


@pytest.mark.parametrize("aspect", ASPECTS, ids=str)
def test_the_crop_shows_a_round_face_round(tmp_path: Path, aspect: Fraction) -> None:
    clip, size = write(tmp_path / "clip.mp4", aspect), 256
    info = probe_video(clip)
    assert info.aspect == aspect
    landmarks = points_of(FRAMES, aspect)
    boxes = crop_track(landmarks, np.ones(FRAMES, bool), info.height, info.width, info.aspect)
    cropped = landmarks_in_crop(landmarks, boxes, size)
    for frame, box, points in zip(read_frames(clip), boxes, cropped, strict=True):
        width, height = box[2:] - box[:2]
        assert abs(width * float(aspect) - height) <= float(aspect)
        assert shape_of(frame)[0] == pytest.approx(1 / aspect, rel=0.02)
        ratio, centre = shape_of(crop_frame(frame, box, size))
        assert ratio == pytest.approx(1, rel=0.02)
        jaw = points[:17]
        np.testing.assert_allclose((jaw[0] + jaw[-1]) / 2, centre, atol=1.5)
        reach = np.linalg.norm(jaw - centre, axis=1)
        assert reach.max() / reach.min() == pytest.approx(1, abs=0.04)
        assert reach.mean() == pytest.approx(RADIUS * size / height, rel=0.03)


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(8, 9)], ids=str)
def test_the_track_holds_the_face(aspect: Fraction) -> None:
    rng = np.random.default_rng(3)
    walk = np.clip(np.cumsum(rng.normal(0, 40, (200, 2)), axis=0), [-400, -200], [400, 200])
    centres = walk + np.array([640, 360])
    shape = rng.uniform(-0.5, 0.5, (68, 2)) * 110
    landmarks = ((centres[:, None] + shape) / [float(aspect), 1]).astype(np.float32)
    width = round(1280 / aspect)
    boxes = crop_track(landmarks, np.ones(200, bool), 720, width, aspect)
    assert (boxes >= 0).all()
    assert (boxes <= [width, 720, width, 720]).all()
    assert (landmarks >= boxes[:, None, :2]).all()
    assert (landmarks < boxes[:, None, 2:]).all()
    shape_of_box = boxes[:, 2:] - boxes[:, :2]
    assert (np.abs(shape_of_box[:, 0] * float(aspect) - shape_of_box[:, 1]) <= float(aspect)).all()


@pytest.mark.parametrize("aspect", ASPECTS, ids=str)
def test_what_is_pasted_goes_back_to_the_sources_pixels(aspect: Fraction) -> None:
    source, landmarks = painted(0, aspect), points_of(1, aspect)
    (box,) = crop_track(landmarks, np.ones(1, bool), *source.shape[:2], aspect)
    points = landmarks_in_crop(landmarks, box)
    mask = to_latent(make_mask(points, "full"), 64)[0]
    generated = crop_frame(source, box)
    unchanged = paste(source, generated, mask, box)
    assert np.abs(unchanged.astype(int) - source).mean() < 0.2
    round_face = np.zeros((512, 512, 3), np.uint8)
    cv2.circle(round_face, (256, 400), 60, (255, 255, 255), -1)
    result = paste(source, round_face, mask, box)
    region = pasted_region(mask, box, source.shape)
    np.testing.assert_array_equal(result[~region], source[~region])
    below = np.where(region[..., None], result, 0)[int(box[1]) + 75 :]
    rows, columns = np.nonzero(below[..., 0] > 230)
    assert np.ptp(columns) * float(aspect) / np.ptp(rows) == pytest.approx(1, abs=0.12)


class DiscFinder:
    """A detector of bright discs; landmarks are on the disc's box."""

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def detect(self, frame: np.ndarray) -> np.ndarray:
        ratio, _ = shape_of(frame)
        self.ratios.append(ratio)
        rows, columns = np.nonzero(frame[..., 0] > 120)
        low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
        return np.linspace(low, high, 68).astype(np.float32)

    def close(self) -> None: ...


@pytest.mark.parametrize("aspect", ASPECTS, ids=str)
def test_the_detector_sees_square_pixels(tmp_path: Path, aspect: Fraction) -> None:
    detector = DiscFinder()
    clip = write(tmp_path / "clip.mp4", aspect)
    found = detect_all(read_frames(clip), detector, aspect=probe_video(clip).aspect)
    np.testing.assert_allclose(detector.ratios, 1, rtol=0.02)
    assert found.dtype == np.float32
    expected = [(centre_of(i) - RADIUS) / [float(aspect), 1] for i in range(FRAMES)]
    np.testing.assert_allclose(found[:, 0], expected, atol=1.5)
    expected = [(centre_of(i) + RADIUS) / [float(aspect), 1] for i in range(FRAMES)]
    np.testing.assert_allclose(found[:, -1], expected, atol=1.5)


def test_square_pixels_only_grow() -> None:
    frame = painted(0, Fraction(1))
    assert square_pixels(frame, Fraction(1)) is frame
    assert square_pixels(frame, Fraction(4, 3)).shape == (HEIGHT, 320, 3)
    assert square_pixels(frame, Fraction(8, 9)).shape == (180, SHOWN_WIDTH, 3)


def test_pixels_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 96, 80, aspect=Fraction(20)) as writer:
        writer.write(np.zeros((80, 96, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        assert probe_video(path).aspect == 1
    assert "its pixels cannot be 20 times as wide as high" in caplog.text


@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9)], ids=str)
def test_mediapipe_on_a_squeezed_face(real: Path, aspect: Fraction) -> None:
    pytest.importorskip("mediapipe")
    frame = next(read_frames(real / "demo1_video.mp4"))
    height, width = frame.shape[:2]
    stored = cv2.resize(frame, (round(width / aspect), height), interpolation=cv2.INTER_AREA)

    def points(picture: np.ndarray, aspect: Fraction | int) -> np.ndarray:
        with closing(MediaPipeDetector(real / "face_landmarker.task")) as detector:
            (found,) = detect_all([picture], detector, aspect=aspect)
        return found * [width / picture.shape[1], 1]

    plain, right, squeezed = points(frame, 1), points(stored, aspect), points(stored, 1)
    away = np.linalg.norm(right - plain, axis=-1).mean()
    assert away < 0.6
    assert away < 0.5 * np.linalg.norm(squeezed - plain, axis=-1).mean()


def test_rows_of_landmarks_stay_in_stored_pixels() -> None:
    """What a person gives means the stored frame, whatever its aspect: the same box, the same place in it."""
    landmarks = face_landmarks(3, 96, 80)
    for aspect in ASPECTS:
        boxes = crop_track(landmarks, np.ones(3, bool), 80, 96, aspect)
        back = landmarks_in_crop(landmarks, boxes, 1) * (boxes[:, None, 2:] - boxes[:, None, :2])
        np.testing.assert_allclose(back + boxes[:, None, :2], landmarks, atol=1e-3)
