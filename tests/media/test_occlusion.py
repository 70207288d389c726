"""What lies before the face stays as it is."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.media.occlusion import Occluder, occluded_cells


def test_a_cell_is_occluded_where_one_pixel_of_it_is() -> None:
    occluder = np.zeros((40, 60), np.uint8)
    occluder[10, 20] = 1  # in the crop's pixel (0, 10), so in its first row and third column of cells
    occluder[39, 59] = 1  # outside the crop
    cells = occluded_cells(occluder, np.array([10, 10, 26, 26]), 4)
    assert np.argwhere(cells).tolist() == [[0, 2]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, ">i2"])
@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_masks_are_read_from_npy_and_npz(tmp_path: Path, save: object, dtype: object) -> None:
    masks = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(dtype)  # type: ignore[call-overload]
    path = tmp_path / ("masks.npy" if save is np.save else "masks.npz")
    if save is np.save:
        np.save(path, masks)
    else:
        save(path, occluder=masks, other=np.zeros(2))  # type: ignore[operator]
    occluder = Occluder(path, 3, 4, 5)
    for _ in range(2):
        np.testing.assert_array_equal(np.stack(list(occluder)), masks)


def test_a_version_2_header_is_read(tmp_path: Path) -> None:
    masks = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    with (tmp_path / "masks.npy").open("wb") as file:
        np.lib.format.write_array(file, masks, version=(2, 0))
    np.testing.assert_array_equal(np.stack(list(Occluder(tmp_path / "masks.npy", 3, 4, 5))), masks)


def test_other_files_get_a_sentence(tmp_path: Path) -> None:
    masks = np.zeros((3, 4, 5), np.uint8)
    np.save(tmp_path / "short.npy", masks[:2])
    np.savez(tmp_path / "other.npz", masks=masks)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "folder.npy").mkdir()
    np.save(tmp_path / "real.npy", np.zeros((3, 4, 5)))
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(masks))
    whole = io.BytesIO()
    np.save(whole, masks)
    (tmp_path / "cut.npy").write_bytes(whole.getvalue()[:-1])
    np.savez(tmp_path / "cut.npz", occluder=masks)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    with zipfile.ZipFile(tmp_path / "inside.npz", "w") as archive:
        archive.writestr("occluder.npy", whole.getvalue()[:-1])
    for name, sentence in (
        ("short.npy", "the video's masks are"),
        ("other.npz", "no array 'occluder'"),
        ("text.npy", "cannot be read"),
        ("empty.npy", "cannot be read"),
        ("folder.npy", "cannot be read"),
        ("absent.npy", "cannot be read"),
        ("real.npy", "float64"),
        ("objects.npy", "object"),
        ("fortran.npy", "Fortran order"),
        ("cut.npy", "is truncated"),
        ("cut.npz", "cannot be read"),
        ("inside.npz", "is truncated"),
    ):
        with pytest.raises(UserError, match=sentence) as found:
            Occluder(tmp_path / name, 3, 4, 5)
        assert name in str(found.value)


def test_a_damaged_frame_gets_a_sentence_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "masks.npz"
    np.savez(path, occluder=np.ones((3, 4, 5), np.uint8))
    path.write_bytes(path.read_bytes().replace(bytes([1] * 60), bytes([1] * 59 + [2])))
    with pytest.raises(UserError, match=r"masks.npz: masks of an occluder cannot be read \(Bad CRC-32"):
        list(Occluder(path, 3, 4, 5))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_masks_are_never_in_memory_together(tmp_path: Path, suffix: str) -> None:
    """48 MiB of masks."""
    frames, side = 192, 512
    masks = np.zeros((frames, side, side), np.uint8)
    masks[:, 7, 9] = 1
    path = tmp_path / f"masks.{suffix}"
    if suffix == "npy":
        np.save(path, masks)
    else:
        np.savez_compressed(path, occluder=masks)
    del masks
    tracemalloc.start()
    try:
        seen = sum(int(frame.sum()) for frame in Occluder(path, frames, side, side))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == frames
    assert peak < 6 * 2**20
