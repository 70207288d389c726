"""The face of the synthetic world: its landmarks are true of its pixels, its mouth does as it is told."""

from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from keysync_jax.synthetic.articulation import Articulation, at_rest
from keysync_jax.synthetic.face import FacePainter, Picture, mouth_aspect_ratio, render
from keysync_jax.synthetic.identity import LIP_CONTRAST, Identity, draw_identity
from keysync_jax.synthetic.motion import Motion, draw_motion, still
from keysync_jax.synthetic.mouth import WIDEST_GAP, shape_mouth
from keysync_jax.synthetic.occluders import draw_occluder

UPPER, LOWER = slice(61, 64), [67, 66, 65]


def person(seed: int) -> Identity:
    return draw_identity(np.random.default_rng(seed))


def mouths(
    opening: list[float], width: float = 0.0, rounding: float = 0.0, teeth: float = 0.0
) -> Articulation:
    count = len(opening)
    others = (np.full(count, value, np.float32) for value in (width, rounding, teeth))
    return Articulation(np.array(opening, np.float32), *others)


def one(who: Identity, opening: float = 0.0, size: int = 256, **shape: float) -> Picture:
    return next(render(who, still(1), mouths([opening], **shape), size))


def moved(**tracks: float) -> Motion:
    return replace(still(1), **{name: np.full(1, value, np.float32) for name, value in tracks.items()})


def colour_at(picture: Picture, point: np.ndarray) -> np.ndarray:
    x, y = np.rint(point).astype(int)
    return picture.pixels[y, x].astype(float)


def test_the_same_seed_gives_the_same_clip() -> None:
    def clip() -> list[Picture]:
        rng = np.random.default_rng(3)
        who, motion, thing = draw_identity(rng), draw_motion(rng, 6), draw_occluder(rng, 6)
        return list(render(who, motion, mouths([0, 0.2, 0.4, 0.6, 0.8, 1]), 128, thing))

    for first, second in zip(clip(), clip(), strict=True):
        assert np.array_equal(first.pixels, second.pixels)
        assert np.array_equal(first.landmarks, second.landmarks)
        assert np.array_equal(first.occluder, second.occluder)


def test_types_and_shapes() -> None:
    picture = one(person(0), 0.5, size=128)
    assert picture.pixels.shape == (128, 128, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.landmarks.shape == (68, 2)
    assert picture.landmarks.dtype == np.float32
    assert picture.occluder.shape == (128, 128)
    assert not picture.occluder.any()


@pytest.mark.parametrize("seed", range(6))
def test_landmarks_are_in_the_standard_order(seed: int) -> None:
    p = one(person(seed), 0.6).landmarks
    x, y = p.T
    assert (np.diff(x[1:16]) > 0).all()  # jaw, from the picture's left
    assert y[:17].argmax() == 8  # the chin
    assert (np.diff(x[17:27]) > 0).all()  # both brows
    assert (np.diff(y[27:31]) > 0).all()  # down the nose
    assert (np.diff(x[31:36]) > 0).all()
    for eye in (36, 42):
        assert (np.diff(x[eye : eye + 4]) > 0).all()
        assert (y[[eye + 1, eye + 2]] < y[[eye + 5, eye + 4]]).all()
    for first, count in ((48, 7), (60, 5)):  # lips: over the top to the right, back below
        assert (np.diff(x[first : first + count]) > 0).all()
    assert (np.diff(x[54:60]) < 0).all()
    assert (np.diff(x[64:68]) < 0).all()
    assert (y[49:54] < y[[59, 58, 57, 56, 55]]).all()
    assert y[17:27].max() < y[36:48].min() < y[33] < y[48:].min() < y[8]


def test_faces_fill_the_crop_and_stay_in_the_picture() -> None:
    for seed in range(16):
        rng = np.random.default_rng(seed)
        who, motion = draw_identity(rng), draw_motion(rng, 20)
        p = np.stack([picture.landmarks for picture in render(who, motion, mouths([0.0, 1.0] * 10), 32)]) * 8
        sides = np.ptp(p, axis=1)
        assert sides[::2, 1].min() > 85
        assert sides[::2, 1].max() < 125
        assert sides[1::2, 1].max() < 145
        assert p.min() > 40
        assert p.max() < 230
        jaw = p[:, :17]
        assert (p[:, 48:, 0].min(1) > jaw[..., 0].min(1)).all()
        assert (p[:, 48:, 1].max(1) < jaw[:, 8, 1]).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_mouth_opens_in_proportion(seed: int) -> None:
    who = person(seed)
    openings = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    pictures = list(render(who, still(6), mouths(openings)))
    gaps = np.array([picture.mouth_gap for picture in pictures])
    widest = 2 * WIDEST_GAP * who.mouth_width * who.mouth_gain * who.camera
    np.testing.assert_allclose(gaps, widest * np.array(openings), rtol=1e-4, atol=1e-3)
    ratios = mouth_aspect_ratio(np.stack([picture.landmarks for picture in pictures]))
    assert (np.diff(ratios) > 0.03).all()
    assert ratios[0] < 1e-6
    assert 0.5 < ratios[-1] < 1.2
    closed = pictures[0].landmarks
    np.testing.assert_allclose(closed[UPPER], closed[LOWER], atol=1e-4)


def test_the_chin_goes_down_and_nothing_above_the_nose_moves() -> None:
    shut, open_ = one(person(1)), one(person(1), 1.0)
    fall = open_.landmarks[:, 1] - shut.landmarks[:, 1]
    assert 0.2 * open_.mouth_gap < fall[8] < 0.7 * open_.mouth_gap
    np.testing.assert_array_equal(fall[:3], 0)
    np.testing.assert_array_equal(fall[17:48], 0)
    rows = int(shut.landmarks[30, 1]) - 4
    np.testing.assert_array_equal(shut.pixels[:rows], open_.pixels[:rows])


def test_width_and_rounding() -> None:
    who = person(2)
    narrow, rest, spread = (one(who, 0.3, width=width).mouth_width for width in (-1, 0, 1))
    assert narrow < 0.75 * rest
    assert spread > 1.15 * rest
    thick = [
        np.linalg.norm(p[51] - p[62]) + np.linalg.norm(p[57] - p[66])
        for p in (one(who, 0.3, rounding=r).landmarks for r in (0.0, 1.0))
    ]
    assert thick[1] > 1.15 * thick[0]


@pytest.mark.parametrize("seed", range(8))
def test_pixels_agree_with_the_landmarks_of_the_mouth(seed: int) -> None:
    who = person(seed)
    picture = one(who, 0.8, teeth=0.8)
    p = picture.landmarks
    middle = 0.55 * p[62] + 0.45 * p[66]
    assert colour_at(picture, middle).max() < 75  # dark between the lips
    lower_lip = 0.35 * p[66] + 0.65 * p[57]
    lip, skin = colour_at(picture, lower_lip), np.array(who.skin)
    assert np.linalg.norm(lip - colour_at(picture, middle)) > 80
    assert np.linalg.norm(lip - skin) > 0.5 * LIP_CONTRAST
    assert colour_at(picture, p[62] + (0, 2)).min() > 150  # teeth below the upper lip
    toothless = one(who, 0.8, teeth=0.0)
    assert colour_at(toothless, p[62] + (0, 2.5)).max() < 75


def test_lips_differ_from_skin_and_identities_from_each_other() -> None:
    people = [person(seed) for seed in range(200)]
    assert min(np.linalg.norm(np.subtract(who.lip, who.skin)) for who in people) >= LIP_CONTRAST
    gains = [who.mouth_gain for who in people]
    assert 0.85 <= min(gains) < 0.9 < 1.1 < max(gains) <= 1.15
    shares = [who.mouth_width / who.face_width for who in people]
    assert 0.4 <= min(shares) < max(shares) <= 0.45
    for kind in ("hair_style", "beard", "glasses", "background", "collar"):
        assert len({getattr(who, kind) for who in people}) >= 3
    pictures = [one(who, size=64).pixels.astype(float) for who in people[:12]]
    for i, first in enumerate(pictures):
        assert all(np.abs(first - second).mean() > 8 for second in pictures[:i])


def shift_seen(before: Picture, after: Picture, axis: int) -> float:
    """Least-squares estimate of a small shift of the mouth, from the pixels alone."""
    low, high = (
        np.floor(before.landmarks[48:].min(0)).astype(int) - 4,
        before.landmarks[48:].max(0).astype(int) + 5,
    )
    area = slice(low[1], high[1]), slice(low[0], high[0])
    first, second = (
        cv2.GaussianBlur(picture.pixels.astype(float).mean(-1), (0, 0), 2.0) for picture in (before, after)
    )
    slope = np.gradient(0.5 * (first + second), axis=1 - axis)[area]
    return float((slope * (first - second)[area]).sum() / (slope**2).sum())


@pytest.mark.parametrize(("axis", "track"), [(0, "x"), (1, "y")])
def test_pixels_and_landmarks_move_together_below_a_pixel(axis: int, track: str) -> None:
    motion = replace(still(9), **{track: np.arange(9, dtype=np.float32) / 8})
    pictures = list(render(person(4), motion, mouths([0.4] * 9, teeth=0.5)))
    seen = np.array([shift_seen(a, b, axis) for a, b in pairwise(pictures)])
    told = np.diff([picture.landmarks[48:, axis].mean() for picture in pictures])
    np.testing.assert_allclose(told, 1 / 8, atol=1e-4)
    np.testing.assert_allclose(seen, told, atol=0.03)  # every step of an eighth of a pixel is seen
    assert abs(seen.sum() - 1) < 0.1


def test_the_warp_of_the_pixels_is_the_inverse_of_the_landmarks() -> None:
    who = person(5)
    painter = FacePainter(who, 256)
    motion = moved(x=3.3, y=-2.1, scale=1.03, roll=0.08, yaw=0.9, pitch=-0.8)
    points = np.random.default_rng(0).uniform((-55, -90), (55, 60), (500, 2))
    pose = painter.pose(motion, 0, shape_mouth(who, 0.9, 0.0, 0.0))
    placed = pose.place(pose.lower(points)).astype(np.float32)
    back = np.stack(pose.source(placed[:, 0].copy(), placed[:, 1].copy()), -1)
    np.testing.assert_allclose(back, points, atol=2e-3)


def test_yaw_moves_the_nose_more_than_the_outline() -> None:
    who = person(6)
    front, turned = (next(render(who, moved(yaw=yaw), at_rest(1))).landmarks[:, 0] for yaw in (0.0, 1.0))
    assert turned[30] - front[30] > 5
    assert abs(turned[0] - front[0]) < 0.6 * (turned[30] - front[30])


def test_a_blink_closes_the_eyes_and_brows_rise() -> None:
    who = person(7)
    open_, shut = (next(render(who, moved(blink=blink), at_rest(1))).landmarks for blink in (0.0, 1.0))
    assert (open_[[41, 40, 47, 46], 1] - open_[[37, 38, 43, 44], 1] > 5).all()
    np.testing.assert_allclose(shut[[41, 40, 47, 46]], shut[[37, 38, 43, 44]], atol=1e-3)
    raised = next(render(who, moved(brow=1.0), at_rest(1))).landmarks
    assert (raised[17:27, 1] < open_[17:27, 1] - 2).all()


def test_motion_is_smooth_and_varied() -> None:
    motions = [draw_motion(np.random.default_rng(seed), 250) for seed in range(20)]
    for motion in motions:
        assert len(motion) == 250
        assert np.abs(np.diff(motion.x)).max() < 3
        assert np.abs(np.diff(motion.y)).max() < 3
        assert np.abs(motion.x).max() <= 9
        assert np.abs(motion.yaw).max() <= 1
        assert 0 <= motion.blink.min() < motion.blink.max() <= 1
        assert np.abs(motion.flicker - 1).max() < 0.01
    spread = [motion.x.std() for motion in motions]
    assert max(spread) > 2 * min(spread)


def test_half_the_size_is_half_the_geometry() -> None:
    whole, half = one(person(8), 0.5), one(person(8), 0.5, size=128)
    np.testing.assert_allclose(2 * half.landmarks, whole.landmarks, atol=1e-3)
    smaller = whole.pixels.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(smaller - half.pixels).mean() < 5


@pytest.mark.parametrize("kind", ["hand", "microphone"])
def test_an_occluder_covers_what_its_mask_says(kind: str) -> None:
    frames, seed = 40, 0
    while (thing := draw_occluder(np.random.default_rng(seed), frames)).kind != kind:
        seed += 1
    who, motion, mouth = person(9), still(frames), at_rest(frames)
    covered = 0
    for bare, hidden in zip(
        render(who, motion, mouth), render(who, motion, mouth, occluder=thing), strict=True
    ):
        changed = (bare.pixels != hidden.pixels).any(-1)
        assert not (changed & (hidden.occluder == 0)).any()
        assert (changed & (hidden.occluder == 1)).sum() >= 0.97 * hidden.occluder.sum()
        np.testing.assert_array_equal(bare.landmarks, hidden.landmarks)
        x, y = np.rint(bare.landmarks[48:].T).astype(int)
        covered += hidden.occluder[y, x].mean() > 0.25
    assert frames * 0.3 < covered < frames * 0.95
    assert set(np.unique(hidden.occluder)) <= {0, 1}


def test_tracks_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        next(render(person(0), still(3), at_rest(2)))
