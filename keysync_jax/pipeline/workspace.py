"""Where a long run keeps what it has done, so that the same command goes on after an interruption.

A workspace is a hidden folder beside the output. It is bound to a fingerprint of the inputs and
settings: a run with others starts from nothing. It is removed when the output is complete, and where
a run ends before there is anything to keep.
"""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.files import fingerprint, locked, reserve, write_text


class Workspace(AbstractContextManager["Workspace"]):
    """The folder of one run; one run at a time may have it.

    Args:
      output: the file that the run makes.
      inputs: everything that the result depends on, in JSON's types.

    Raises:
      UserError: another run has it.
    """

    def __init__(self, output: Path, inputs: Mapping[str, Any]):
        self.folder = output.with_name(f".{output.name}.work")
        with ExitStack() as stack:
            lock = output.with_name(f"{self.folder.name}.lock")
            stack.enter_context(locked(lock, f"{output}: another run is making it now"))
            self._mark = mark = self.folder / "fingerprint"
            wanted = fingerprint(inputs)
            self.resumed = mark.is_file() and mark.read_text() == wanted
            if not self.resumed:
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self.folder.mkdir()
                write_text(mark, wanted)
            self._stack = stack.pop_all()

    def array(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> "ResumableArray":
        """An array on disk that is filled row by row; what an earlier run filled is still there."""
        return ResumableArray(self.folder / f"{name}.npy", shape, dtype)

    def done(self, name: str) -> int:
        """Rows of an array that an earlier run filled; the array need not be there."""
        return _rows_done(self.folder / f"{name}.npy")

    def remove(self) -> None:
        """Removes everything that is kept."""
        shutil.rmtree(self.folder)

    def __exit__(self, *_: object) -> None:
        with self._stack:  # what is kept stays for a later run
            if self.folder.is_dir() and list(self.folder.iterdir()) == [self._mark]:
                self.remove()


class ResumableArray:
    """Rows on disk, filled in order; reading and writing go through a memory map.

    Attributes:
      values: the memory map `[rows, ...]`; rows from `done` on are not filled yet.
      done: rows that are filled for good.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any):
        self._count = _count_of(path)
        self.done = _rows_done(path)
        mode: Any = "r+" if self.done else "w+"
        self.values = np.lib.format.open_memmap(path, mode, dtype=dtype, shape=shape)
        if not self.done:
            reserve(path)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def complete(self) -> bool:
        return self.done == len(self)

    def append(self, rows: np.ndarray) -> None:
        """Fills the next rows `[n, ...]`; they are on disk before they count as done."""
        self.values[self.done : self.done + len(rows)] = rows
        self.values.flush()
        self.done += len(rows)
        write_text(self._count, str(self.done))


def _count_of(path: Path) -> Path:
    """The file beside an array that says how many of its rows are filled."""
    return path.with_suffix(".done")


def _rows_done(path: Path) -> int:
    count = _count_of(path)
    return int(count.read_text()) if count.is_file() else 0
