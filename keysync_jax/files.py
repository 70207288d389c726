"""Files and folders that appear whole or not at all, locks, hashes, and folders marked with their purpose.

The only place that writes under a temporary name and renames. A temporary file or folder stands beside what
it will be and is locked by the process that writes it; what a killed process left is not locked, and the next
one that writes the same name removes it. Modes are what the umask says.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from keysync_jax.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial(\.[^.]*)?")
"""Names of temporary files and folders, those of `_numbered` and nobody else's."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk without room."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file, empty at first, that takes the name `path` when the block ends without an error.

    It keeps the suffix of `path`, may be opened by name as often as is needed, and is removed on an error. A
    file that is there under `path` is replaced.

    Raises:
      OSError: the file cannot be made or renamed.
    """
    with temporary(path) as partial:
        yield partial
        put(partial, Path(path))


@contextmanager
def temporary(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path`, empty at first, that is removed when the block ends unless it was `put` there.

    Raises:
      OSError: it cannot be made; nor could `path`.
    """
    with _partial(Path(path), folder=False) as partial:
        yield partial


def put(partial: Path, path: Path) -> None:
    """Gives a complete temporary file its name; what is there is replaced."""
    os.replace(partial, path)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends without an error.

    Raises:
      UserError: as `check_new_folder`.
    """
    path = Path(path)
    check_new_folder(path)
    with _partial(path, folder=True) as partial:
        yield partial
        os.rename(partial, path)


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder where the system keeps temporary files, removed when the block ends.

    Raises:
      OSError: it cannot be made.
    """
    with _partial(temporary_place(name), folder=True) as partial:
        yield partial


def temporary_place(name: str) -> Path:
    """The path of a name where the system keeps temporary files."""
    return Path(tempfile.gettempdir()) / name


def check_new_folder(folder: Path) -> None:
    """Refuses a folder that exists, or cannot be made; makes the folders above it.

    Raises:
      UserError: one of these.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a name for a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder {folder.parent} cannot be made ({error.strerror})") from None
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"{folder}: the folder {folder.parent} is not writable")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL (`gs://...`), whose objects appear whole by themselves."""
    return "://" in os.fspath(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file; an object where `path` is one of `etils.epath` with a URL."""
    if is_remote(path):
        path.write_bytes(content)
        return
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a small file of text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Writes JSON with a line break at its end."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file of text, made where it is missing; it is on the disk when this returns.

    A line that an earlier writer, who was killed, had not finished stays a line of its own. The line goes out
    in one write, so several processes may add to a file.

    Raises:
      OSError: it cannot be written.
    """
    with path.open("ab+") as file:
        file.seek(0, os.SEEK_END)
        begun = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            begun = b"" if file.read(1) == b"\n" else b"\n"
        file.write(begun + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def continued(path: Path, suffix: str, busy: str) -> Iterator[Path]:
    """A file beside `path` that a writer who was broken off has begun, or an empty one.

    It takes the name `path` when the block ends without an error, and stays for the next writer on an error.

    Args:
      suffix: what its name has after that of `path`.
      busy: sentence for when another process writes it.

    Raises:
      UserError: `busy`.
      OSError: it cannot be made or renamed.
    """
    partial = path.with_name(path.name + suffix)
    with locked(partial.with_name(f".{partial.name}.lock"), busy):
        partial.touch()
        yield partial
        put(partial, path)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


def sweep(folder: Path) -> None:
    """Removes the temporary files and folders in `folder` whose writers have ended."""
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if _is_temporary(entry):
                _remove_left(entry)


def _is_temporary(entry: Path) -> bool:
    return _TEMPORARY.fullmatch(entry.name) is not None


@contextmanager
def _partial(path: Path, folder: bool) -> Iterator[Path]:
    """A locked temporary file or folder beside `path`; removed at the end where it still has that name."""
    partial, held = _make_locked(path, folder)
    try:
        yield partial
    finally:
        try:
            if _is_linked(held, partial):
                _remove(partial)
        finally:
            os.close(held)


def _make_locked(path: Path, folder: bool) -> tuple[Path, int]:
    """The temporary file or folder, and the descriptor that holds its lock.

    Its number is the lowest that no living process has; what killed ones left under it and the next goes.
    """
    number = 0
    while True:
        partial = _numbered(path, number)
        try:
            held = _make(partial, folder)
        except FileExistsError:
            number += not _remove_left(partial)
            continue
        except OSError as error:
            error.filename = str(path)  # The name that the user knows.
            raise
        if held is None:
            continue
        while os.path.lexists(left := _numbered(path, number + 1)) and _remove_left(left):
            number += 1
        return partial, held


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f".{path.name}.{number:08x}.partial{path.suffix}")


def _make(partial: Path, folder: bool) -> int | None:
    """Makes a temporary file or folder; the descriptor that holds its lock, None where it was swept at once.

    Raises:
      FileExistsError: there is one of that name.
      OSError: it cannot be made.
    """
    if folder:
        partial.mkdir()
    try:
        held = os.open(partial, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileNotFoundError:
        if folder:
            return None
        raise
    try:
        if _flock(held) and _is_linked(held, partial):
            return held
    except OSError:  # No locks on this file system: nothing can be swept there either.
        return held
    os.close(held)
    return None


def _remove_left(partial: Path) -> bool:
    """Removes a temporary file or folder unless a process holds its lock; whether it is gone."""
    with suppress(OSError):
        # NFS locks only what is open for writing, as a folder cannot be.
        held = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
        try:
            if _flock(held) and _is_linked(held, partial):
                _remove(partial)
        finally:
            os.close(held)
    return not os.path.lexists(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `path` for the block; the system lets go of it however the process ends.

    The file is removed at the end. A process that had it open then sees that it is no longer the file of that
    name, and takes the new one, so two never hold the lock. Where the file system has no locks, a warning
    says so.

    Args:
      busy: sentence for when another process holds the lock.

    Raises:
      UserError: `busy`.
      OSError: the lock file cannot be made.
    """
    held = _hold(path, busy)
    try:
        yield
    finally:
        # Before the lock ends: whoever opens the name from now on makes a new file.
        with suppress(OSError):
            if _is_linked(held, path):
                path.unlink()
        os.close(held)


def _hold(path: Path, busy: str) -> int:
    """The descriptor that holds the lock file of that name."""
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _flock(held):
                raise UserError(busy)
            if _is_linked(held, path):
                return held
        except OSError as error:
            log.warning("%s: cannot be locked (%s); let no second run work there", path, error.strerror)
            return held
        except UserError:
            os.close(held)
            raise
        os.close(held)  # Its holder removed it between the two calls.


def _flock(held: int) -> bool:
    """Takes the lock of an open file; False where another has it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_linked(held: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(held), os.stat(path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def settle(mark: Path, content: Mapping[str, Any], what: str, other: str = "other settings") -> bool:
    """Marks the folder of `mark` with what it is for, or checks that it was begun for the same.

    Args:
      mark: a JSON file in the folder.
      content: what everything in the folder depends on.
      what: the folder holds, for messages ("synthetic clips").
      other: what it is of where the content is another, for the message ("another model").

    Returns:
      Whether it had been begun before.

    Raises:
      UserError: the folder holds something else, was begun for another content, or cannot be written.
    """
    folder = mark.parent
    if mark.is_file():
        try:
            begun = json.loads(mark.read_bytes())
        except ValueError:
            raise UserError(f"{mark}: is damaged; give a name for a new folder") from None
        if begun != json.loads(json.dumps(content)):
            raise UserError(f"{folder}: holds {what} of {other}; give a name for a new folder")
        return True
    if folder.exists() and (not folder.is_dir() or not all(map(_is_temporary, folder.iterdir()))):
        raise UserError(f"{folder}: exists already and holds no {what}; give a name for a new folder")
    make_folder(folder)
    try:
        write_json(mark, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return False


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are not there.

    Raises:
      UserError: it is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def reserve(path: Path, size: int | None = None) -> None:
    """Takes a file's disk space now: writing to a mapped hole on a full disk would kill the process.

    Args:
      size: bytes; those that the file has, where None.

    Raises:
      OSError: there is too little space (ENOSPC).
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size if size is None else size)


def sha256_of(path: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes (hex), read in pieces of 1 MiB.

    Args:
      path: the file.
      progress: called with the number of bytes of each piece that has been read.

    Raises:
      UserError: there is no such file.
      OSError: the machine cannot read it.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
                if progress is not None:
                    progress(len(piece))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


_hashed: dict[tuple[int, ...], str] = {}
"""State of a file -> its SHA-256."""


def sha256_once(path: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> str:
    """As `sha256_of`, but a file that did not change since this process hashed it is not read again."""
    before = _state(path)
    if before in _hashed:
        if progress is not None:
            progress(os.path.getsize(path))
        return _hashed[before]
    found = sha256_of(path, progress)
    if before and _state(path) == before:
        _hashed[before] = found
    return found


def _state(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """What changes with a file's bytes; nothing where there is no file."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def git_blob_of(path: Path) -> str:
    """What git calls a file's bytes (SHA-1, hex); for small files."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def git_tree(folder: Path) -> str:
    """Git's name of a folder's content (hex), from the files as they are, without what Python compiled."""
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__":
            continue
        if path.is_dir() and not path.is_symlink():
            mode, name = "40000", git_tree(path)
        else:
            mode, name = _git_file(path)
        # Git compares the names of folders as if they ended in a slash.
        entries.append(
            (path.name + "/" * (mode == "40000"), f"{mode} {path.name}\0".encode() + bytes.fromhex(name))
        )
    content = b"".join(entry for _, entry in sorted(entries, key=lambda pair: pair[0].encode()))
    return _git_object("tree", content)


def _git_file(path: Path) -> tuple[str, str]:
    """Mode and name of a file or a link."""
    try:
        if path.is_symlink():
            return "120000", _git_object("blob", os.readlink(path).encode())
        mode = "100755" if os.access(path, os.X_OK) else "100644"
        return mode, _git_object("blob", path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _git_object(kind: str, content: bytes) -> str:
    header = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def sources_fingerprint(folders: Iterable[str | os.PathLike[str]]) -> str:
    """SHA-256 (hex) of the Python files in folders and below, by name; each file counts once."""
    found: dict[Path, str] = {}
    for folder in map(Path, folders):
        for path in folder.rglob("*.py"):
            found.setdefault(path.resolve(), f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return fingerprint(sorted((name, sha256_of(path)) for path, name in found.items()))


def fingerprint(content: Any) -> str:
    """SHA-256 (hex) of something of JSON's types; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
