"""ArrayRecord files: written whole or not at all, and read anywhere through few open files.

What the system refuses (too many open files, no permission, a disk that fails) is an OSError with the
system's number. A UserError says that the file itself is damaged.
"""

import errno
import os
import re
import resource
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from keysync_jax.errors import UserError
from keysync_jax.files import put, temporary

MOST_OPEN = 256
"""Files that a process holds open for reading, where the system allows it four times as many."""

# Latents and pictures do not compress; one record a group can be read alone.
_WRITER = "group_size:1,uncompressed"
# Opening a file reads its list of records: without the second option, a MiB at least.
_READER = "readahead_buffer_size:0,footer_prefetch_bytes:0"
_READER_BEFORE_0_8_6 = "readahead_buffer_size:0"

_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


class RecordWriter:
    """Writes an ArrayRecord file, which appears under its name when the block ends without an error.

    Raises:
      OSError: it cannot be made or written.
    """

    def __init__(self, path: Path):
        self.path, self.records = path, 0
        with ExitStack() as stack:
            self._partial = stack.enter_context(temporary(path))
            try:
                self._writer = ArrayRecordWriter(str(self._partial), _WRITER)
            except RuntimeError as error:
                raise self._failed(error) from error
            self._stack = stack.pop_all()

    def write(self, data: bytes) -> None:
        """Appends one record."""
        try:
            self._writer.write(data)
        except RuntimeError as error:
            raise self._failed(error) from error
        self.records += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                self._writer.close()
            except RuntimeError as failure:
                if kind is None:
                    raise self._failed(failure) from failure
            if kind is None:
                put(self._partial, self.path)

    def _failed(self, error: RuntimeError) -> OSError:
        refused = system_error(str(error), self.path)
        return refused or OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({error})", str(self.path))


class RecordReader:
    """Random access to an ArrayRecord file, opened when it is read; picklable, and safe in threads.

    Any number of them share the open files of the process, see `MOST_OPEN`.
    """

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return int(_open_files.reader(self).num_records())

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The bytes of the records at `indices`.

        Raises:
          OSError: the system cannot open or read the file.
          UserError: the file is damaged.
        """
        reader = _open_files.reader(self)
        try:
            return list(reader.read([int(i) for i in indices]))
        except RuntimeError as error:
            _open_files.drop(self)  # What failed once goes on failing; the next read opens it anew.
            if refused := system_error(str(error), self.path):
                raise refused from None
            raise UserError(f"{self.path}: is damaged ({error}); prepare the dataset anew") from None


class _OpenFiles:
    """The files that this process reads, the last used ones open.

    One that is let go of closes when the last thread has read from it, so a few more may be open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order of their use. A reader that nobody holds any more closes its file.
        self._readers: WeakKeyDictionary[RecordReader, ArrayRecordReader] = WeakKeyDictionary()

    def reader(self, file: RecordReader) -> ArrayRecordReader:
        with self._lock:
            reader = self._readers.get(file)
        if reader is None:
            # Without the lock: over a network it takes long. Of two that do it at once, one closes again.
            reader = _open(file.path)
        with self._lock:
            self._readers.pop(file, None)
            self._readers[file] = reader
            while len(self._readers) > _most_open():
                self._readers.pop(next(iter(self._readers)), None)
        return reader

    def drop(self, file: RecordReader) -> None:
        with self._lock:
            self._readers.pop(file, None)


_open_files = _OpenFiles()


def _most_open() -> int:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, allowed // 4))


def _open(path: Path) -> ArrayRecordReader:
    try:
        try:
            reader = ArrayRecordReader(str(path), _READER)
        except ValueError:
            reader = ArrayRecordReader(str(path), _READER_BEFORE_0_8_6)
        if reader.ok():
            return reader
        reader.close()  # Says what is wrong.
        why = ""
    except RuntimeError as error:
        why = str(error)
    if refused := system_error(why, path):
        raise refused
    raise UserError(f"{path}: is damaged or no ArrayRecord file; prepare the dataset anew")


def system_error(text: str, path: Path) -> OSError | None:
    """The system's error in a message of ArrayRecord ("open() failed: Too many open files; opening ...").

    Returns:
      It, of the class that fits its number; None where the message tells of none.
    """
    found = re.search(r"\w\(\) failed: ([^;]+)", text)
    if found is None:
        return None
    said = found[1].strip()
    number = _NUMBERS.get(said, errno.EIO)
    return OSError(number, os.strerror(number) if said in _NUMBERS else said, str(path))
