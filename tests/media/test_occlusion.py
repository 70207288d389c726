"""What lies before the face stays as it is."""

from pathlib import Path

import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.media.occlusion import load_occluder, occluded_cells


def test_a_cell_is_occluded_where_one_pixel_of_it_is() -> None:
    occluder = np.zeros((40, 60), np.uint8)
    occluder[10, 20] = 1  # in the crop's pixel (0, 10), so in its first row and third column of cells
    occluder[39, 59] = 1  # outside the crop
    cells = occluded_cells(occluder, np.array([10, 10, 26, 26]), 4)
    assert np.argwhere(cells).tolist() == [[0, 2]]


def test_masks_are_read_from_npy_and_npz(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(np.uint8)
    np.save(tmp_path / "masks.npy", masks)
    np.savez_compressed(tmp_path / "masks.npz", occluder=masks, other=np.zeros(2))
    for name in ("masks.npy", "masks.npz"):
        np.testing.assert_array_equal(load_occluder(tmp_path / name, 3, 4, 5), masks)


def test_other_files_get_a_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((2, 4, 5), np.uint8))
    np.savez(tmp_path / "other.npz", masks=np.zeros((3, 4, 5), np.uint8))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "real.npy", np.zeros((3, 4, 5)))
    for name, sentence in (
        ("short.npy", "the video's masks are"),
        ("other.npz", "no array 'occluder'"),
        ("text.npy", "cannot be read"),
        ("absent.npy", "cannot be read"),
        ("real.npy", "float64"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_occluder(tmp_path / name, 3, 4, 5)
