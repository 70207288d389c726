"""The mask strategies against the reference's golden masks, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from keysync_jax.media.masks import STRATEGIES, exclude, make_mask, scale_landmarks, to_latent


def test_scaling_and_box_equal_the_reference(golden: Path) -> None:
    reference = load_file(golden / "dev.pipeline.safetensors")
    landmarks = scale_landmarks(reference["landmarks"], width=320, height=180)
    assert landmarks.dtype == np.int32
    np.testing.assert_array_equal(landmarks, reference["landmarks_scaled_512"])
    mask = make_mask(landmarks)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, reference["mask_512"])
    np.testing.assert_array_equal(to_latent(mask), reference["mask_64"][:, 0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_equal_the_reference(golden: Path, strategy: str) -> None:
    reference = np.load(golden / "dev.masks.npz")
    mask = make_mask(reference["landmarks_512"], strategy)
    np.testing.assert_array_equal(mask, reference[f"{strategy}_512"])
    np.testing.assert_array_equal(to_latent(mask), reference[f"{strategy}_64"])
    fraction = reference["landmarks_512"] + np.float32(0.9)
    np.testing.assert_array_equal(make_mask(fraction, strategy), mask)


def test_landmarks_outside_the_crop_are_clipped() -> None:
    landmarks = np.zeros((2, 68, 2), np.int32)
    landmarks[0, :2] = [[-40, 10], [900, 20]]
    landmarks[0, 28] = [0, -7]
    landmarks[1] = [600, 700]
    mask = make_mask(landmarks)
    assert mask[0].all()
    assert not mask[1].any()


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="box, full, heart, mouth"):
        make_mask(np.zeros((1, 68, 2)), "chin")


def test_latent_size_that_does_not_divide() -> None:
    mask = np.eye(10, dtype=np.uint8)
    picked = [0, 2, 5, 7]
    np.testing.assert_array_equal(to_latent(mask, 4), mask[np.ix_(picked, picked)])


def test_an_occluder_is_left_out() -> None:
    mask = np.array([[[1, 1], [0, 0]]], np.uint8)
    occluder = np.array([[255, 0], [255, 0]], np.uint8)
    left = exclude(mask, occluder)
    assert left.dtype == np.uint8
    assert left.tolist() == [[[0, 1], [0, 0]]]
