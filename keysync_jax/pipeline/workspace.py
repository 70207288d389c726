"""Where a long run keeps what it has done, so that the same command goes on after an interruption.

A workspace is a hidden folder beside the output. It is bound to a fingerprint of the inputs and
settings: a run with others starts from nothing. It is removed when the output is complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from keysync_jax.errors import UserError


class Workspace:
    """The folder of one run; one run at a time may have it.

    Args:
      output: the file that the run makes.
      inputs: everything that the result depends on, in JSON's types.
    """

    def __init__(self, output: Path, inputs: dict[str, Any]):
        self.folder = output.with_name(f".{output.name}.work")
        self._lock = _locked(output)
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        mark = self.folder / "fingerprint"
        self.resumed = mark.is_file() and mark.read_text() == fingerprint
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            write_text(mark, fingerprint)

    def array(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> "ResumableArray":
        """An array on disk that is filled row by row; what an earlier run filled is still there."""
        return ResumableArray(self.folder / f"{name}.npy", shape, dtype)

    def remove(self) -> None:
        """Removes everything that is kept."""
        shutil.rmtree(self.folder)
        _lock_path(self.folder).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()  # what is kept stays for a later run


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(output: Path) -> IO[str]:
    """An open lock file that the system releases when the process ends, however it ends."""
    file = open(_lock_path(output.with_name(f".{output.name}.work")), "w")  # noqa: SIM115  # held for the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{output}: another run is making it now") from None
    return file


class ResumableArray:
    """Rows on disk, filled in order; reading and writing go through a memory map.

    Attributes:
      values: the memory map `[rows, ...]`; rows from `done` on are not filled yet.
      done: rows that are filled for good.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any):
        self._count = path.with_suffix(".done")
        self.done = int(self._count.read_text()) if self._count.is_file() else 0
        mode: Any = "r+" if self.done else "w+"
        self.values = np.lib.format.open_memmap(path, mode, dtype=dtype, shape=shape)
        if not self.done:
            _reserve(path)

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


def _reserve(path: Path) -> None:
    """Takes the file's disk space now: writing to a mapped hole on a full disk would kill the process.

    Raises:
      OSError: there is too little space (ENOSPC).
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def write_text(path: Path, text: str) -> None:
    """Writes a small file under a temporary name and renames it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
