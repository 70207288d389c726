"""Pasting back: untouched outside, generated inside, no step anywhere."""

import cv2
import numpy as np
import pytest

from keysync_jax.media.composite import FEATHER, GAP, paste, paste_weights, pasted_region, seam_energy
from keysync_jax.media.crop import crop_frame

SHAPE = (360, 640, 3)
BOX = np.array([200, 40, 456, 296])


def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def box_mask(size: int, bottom: bool = True) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[size * 3 // 8 : size if bottom else size * 3 // 4, size // 4 : size * 3 // 4] = 1
    return mask


@pytest.mark.parametrize("box", [BOX, [0, 0, 300, 300], [340, 60, 640, 360], [100, 100, 701 - 500, 201]])
@pytest.mark.parametrize("mask_size", [512, 64])
def test_untouched_outside_the_pasted_region(box: list[int], mask_size: int) -> None:
    source, box = frame(), np.array(box)
    generated = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    mask = box_mask(mask_size)
    before = source.copy()
    result = paste(source, generated, mask, box)
    np.testing.assert_array_equal(source, before)
    region = pasted_region(mask, box, source.shape)
    assert region.shape == SHAPE[:2]
    np.testing.assert_array_equal(result[~region], source[~region])
    assert (result[region] != source[region]).any(axis=-1).mean() > 0.9
    outside = np.ones(SHAPE[:2], bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert not region[outside].any()


def test_the_masked_region_is_the_generated_crop() -> None:
    source = frame()
    generated = np.random.default_rng(1).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    mask = box_mask(256, bottom=False)
    result = paste(source, generated, mask, BOX, feather=16)[BOX[1] : BOX[3], BOX[0] : BOX[2]]
    np.testing.assert_array_equal(result[mask == 1], generated[mask == 1])
    far = np.ones((256, 256), bool)
    far[96 - 17 : 192 + 17, 64 - 17 : 192 + 17] = False
    np.testing.assert_array_equal(result[far], crop_frame(source, BOX, 256)[far])


def test_weights_fall_smoothly_outside_the_mask_and_towards_the_edge() -> None:
    mask = box_mask(64)
    weights = paste_weights(mask, BOX * 2, (720, 1280, 3), feather=24)
    assert weights.shape == (512, 512)
    assert weights.dtype == np.float32
    middle = weights[300]
    assert (middle[128:384] == 1).all()
    assert (middle[:103] == 0).all()
    assert (middle[104:128] > 0).all()
    assert (np.diff(middle[100:129]) >= 0).all()
    column = weights[:, 256]
    assert (column[-GAP:] == 0).all()
    assert column[-GAP - 1] > 0
    assert (np.diff(column[-60:]) <= 0).all()
    assert np.abs(np.diff(weights, axis=0)).max() < 0.07
    assert np.abs(np.diff(weights, axis=1)).max() < 0.07


def test_no_fade_where_the_crop_ends_with_the_frame() -> None:
    mask = box_mask(64)
    at_the_edge = paste_weights(mask, np.array([200, 104, 456, 360]), SHAPE)
    above_it = paste_weights(mask, np.array([200, 103, 456, 359]), SHAPE)
    assert (at_the_edge[-1, 100:150] == 1).all()
    assert (above_it[-1] == 0).all()
    wide = np.ones((64, 64), np.uint8)
    corner = paste_weights(wide, np.array([440, 160, 640, 360]), SHAPE)
    assert (corner[100:, -1] == 1).all()
    assert (corner[:, 0] == 0).all()
    assert (paste_weights(wide, np.array([439, 160, 639, 360]), SHAPE)[:, -1] == 0).all()
    assert (paste_weights(wide, np.array([0, 0, 200, 200]), SHAPE)[:100, 0] == 1).all()


def test_an_unchanged_crop_changes_nothing_visible() -> None:
    ramp = np.linspace(0, 255, SHAPE[1])[None, :, None] * np.linspace(0.4, 1, SHAPE[0])[:, None, None]
    source = np.repeat(ramp, 3, axis=2).astype(np.uint8)
    result = paste(source, crop_frame(source, BOX), box_mask(64), BOX)
    assert np.abs(result.astype(int) - source).max() <= 2


def test_an_empty_mask_pastes_nothing() -> None:
    source, empty = frame(), np.zeros((64, 64), np.uint8)
    generated = np.zeros((512, 512, 3), np.uint8)
    np.testing.assert_array_equal(paste(source, generated, empty, BOX), source)
    assert not pasted_region(empty, BOX, source.shape).any()


def test_a_flat_difference_has_no_seam() -> None:
    source = np.full(SHAPE, 100, np.uint8)
    result = paste(source, np.full((512, 512, 3), 160, np.uint8), box_mask(64), BOX)
    steps = max(np.abs(np.diff(result[..., 0].astype(int), axis=axis)).max() for axis in (0, 1))
    assert result.max() == 160
    assert steps <= 60 * 1.5 * 2 / FEATHER + 1


@pytest.mark.parametrize("box", [BOX, [0, 0, 300, 300], [100, 100, 190, 190]])
@pytest.mark.parametrize("mask", [box_mask(64), box_mask(64, bottom=False), np.zeros((64, 64), np.uint8)])
def test_blending_the_pasted_region_alone_changes_no_bit(box: list[int], mask: np.ndarray) -> None:
    source, box = frame(), np.array(box)
    generated = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    method = cv2.INTER_AREA if 2 * (x1 - x0) < 512 else cv2.INTER_CUBIC
    face = cv2.resize(generated, (int(x1 - x0), int(y1 - y0)), interpolation=method).astype(np.float32)
    below = source[y0:y1, x0:x1].astype(np.float32)
    blended = source.copy()
    weights = paste_weights(mask, box, SHAPE)[..., None]
    blended[y0:y1, x0:x1] = np.rint(below + weights * (face - below))
    np.testing.assert_array_equal(paste(source, generated, mask, box), blended)


def test_a_border_that_shows_has_more_gradient_than_the_source() -> None:
    slope = np.tile(np.linspace(40, 200, SHAPE[1]), (SHAPE[0], 1))
    source = np.repeat(np.rint(slope)[..., None], 3, axis=-1).astype(np.uint8)
    mask, true = box_mask(64), crop_frame(source, BOX)
    before, same = seam_energy(source, paste(source, true, mask, BOX), mask, BOX)
    # One pixel in four is a level brighter than the one before, and two of four see half of it.
    assert before == pytest.approx(0.5**2 / 2, rel=0.02)
    assert same == pytest.approx(before, rel=0.1)
    shifts = []
    for shift in (8, 32):
        dark = (true.astype(int) - shift).astype(np.uint8)
        _, shows = seam_energy(source, paste(source, dark, mask, BOX), mask, BOX)
        shifts.append(shows)
    # Across the fade the step of the colour adds its own slope, which the feather spreads.
    assert before < shifts[0] < shifts[1]
    hard = paste(source, dark, mask, BOX, feather=4)
    assert seam_energy(source, hard, mask, BOX, feather=4)[1] > 3 * shifts[1]
    assert seam_energy(source, source, np.zeros((64, 64)), BOX) == (0.0, 0.0)
