"""What lies before the face: masks of a hand or a microphone, which a dub must leave as they are (eq. 7)."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.lib import format as npy

from keysync_jax.errors import UserError


class Occluder:
    """Object masks of a video's frames at 25 a second, of any segmentation (the paper takes SAM 2's).

    Opening reads the header alone. Iterating yields `[H, W]` of whole numbers for each frame in order, above
    0 = object, and holds one of them at a time: the masks of ten minutes of 1080p are 29 GiB. Frames of a
    `.npy` are mapped, so only what is touched of them is read.

    Args:
      path: `.npy`, or `.npz` with the array `occluder`.
      frames, height, width: of the video.

    Raises:
      UserError: the file holds no such masks, or is damaged (of a `.npz` iterating alone may show it).
    """

    def __init__(self, path: Path, frames: int, height: int, width: int):
        self._path, self._frames, self._size = path, frames, (height, width)
        with self._reading():
            with path.open("rb") as file:
                self._zipped = file.read(2) == b"PK"
            with self._content() as (content, size):
                shape, fortran, self._dtype = _header(content)
                self._start = content.tell()
        if shape != (frames, height, width) or self._dtype.kind not in "bui":
            raise UserError(
                f"{path}: holds {self._dtype} {list(shape)}, the video's masks are whole numbers "
                f"{[frames, height, width]} (frames at 25 a second, height, width)"
            )
        if fortran:
            raise UserError(f"{path}: holds masks in Fortran order; save them with numpy.ascontiguousarray")
        if size < self._start + frames * self._frame_bytes:
            raise UserError(f"{path}: is truncated")

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._reading(), self._content() as (content, _):
            content.seek(self._start)
            for number in range(self._frames):
                if self._zipped:
                    yield np.frombuffer(content.read(self._frame_bytes), self._dtype).reshape(self._size)
                else:
                    at = self._start + number * self._frame_bytes
                    yield np.memmap(content, self._dtype, "r", at, self._size)

    @property
    def _frame_bytes(self) -> int:
        return self._size[0] * self._size[1] * self._dtype.itemsize

    @contextmanager
    def _content(self) -> Iterator[tuple[IO[bytes], int]]:
        """The open `.npy`, in a `.npz` the member, and its bytes."""
        if not self._zipped:
            with self._path.open("rb") as file:
                yield file, self._path.stat().st_size
            return
        with zipfile.ZipFile(self._path) as archive:
            try:
                member = archive.getinfo("occluder.npy")
            except KeyError:
                raise UserError(f"{self._path}: holds no array 'occluder'") from None
            with archive.open(member) as content:
                yield content, member.file_size

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A damaged file gets a sentence; what the machine does wrong is raised as it is."""
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise self._unreadable(error.strerror) from None
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, reason: object) -> UserError:
        return UserError(f"{self._path}: masks of an occluder cannot be read ({reason})")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a `.npy`; reads up to the first number."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    return npy.read_array_header_2_0(file)


def occluded_cells(occluder: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The cells of the crop's latent grid that an object touches: uint8 `[size, size]`.

    A cell that is half object must not be generated anew, so one pixel is enough.

    Args:
      occluder: mask of one frame, `[H, W]`.
      box: of the crop, (x0, y0, x1, y1).
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    inside = (np.asarray(occluder[y0:y1, x0:x1]) > 0).astype(np.float32)
    share = cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA)
    return (share > 0).astype(np.uint8)
