"""Files and folders appear whole or not at all, leave nothing behind, and one process holds a lock."""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax import files
from keysync_jax.errors import UserError
from keysync_jax.files import (
    append_line,
    copy_file,
    locked,
    make_folder,
    new_folder,
    put,
    replacing,
    settle,
    sha256_of,
    sha256_once,
    sweep,
    temporary,
    write_bytes,
    write_json,
    write_text,
)
from keysync_jax.media.landmarks import save_landmarks


def _half(partial: Path, error: type[BaseException]) -> None:
    partial.write_text("half")
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def holding(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process that has run `code` and waits in it; killed at the end."""
    program = f"import sys, time\nfrom pathlib import Path\nfrom keysync_jax.files import *\n{code}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


WAIT = "print('ready', flush=True); time.sleep(600)"
IN_FILE = f"with temporary(sys.argv[1]) as partial: partial.write_text('half'); {WAIT}"
IN_FOLDER = f"with new_folder(sys.argv[1]) as partial: (partial / 'half').touch(); {WAIT}"
IN_LOCK = f"with locked(Path(sys.argv[1]), 'busy'): {WAIT}"


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: write_bytes(path, b"x"),
    "text": lambda path: write_text(path, "x"),
    "json": lambda path: write_json(path, {}),
    "copy": lambda path: copy_file(Path(__file__), path),
    "landmarks": lambda path: save_landmarks(path, np.zeros((1, 68, 2))),
}


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_umask_decides_the_mode_of_a_file(tmp_path: Path, writer: str, mask: int) -> None:
    path = tmp_path / "out.npy"
    path.touch(0o600)
    before = os.umask(mask)
    try:
        WRITERS[writer](path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_the_umask_decides_the_mode_of_a_folder(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "new/out") as folder:
            (folder / "inside").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new/out").stat().st_mode) == 0o750


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("old")
    with replacing(path) as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == ".mp4"
        assert partial.read_bytes() == b""
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as partial:
            _half(partial, error)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["out.mp4"]


def test_a_temporary_file_goes_unless_it_is_put(tmp_path: Path) -> None:
    with temporary(tmp_path / "a") as partial:
        partial.write_text("x")
    with temporary(tmp_path / "b") as partial:
        partial.write_text("x")
        put(partial, tmp_path / "b")
        assert names(tmp_path) == ["b"]
    assert names(tmp_path) == ["b"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    with (
        pytest.raises(OSError, match="No space left") as found,
        replacing(path),
        open("/dev/full", "wb") as file,
    ):
        file.write(bytes(1 << 20))
    assert found.value.errno in files.FULL_DISK
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["out.json"]


def test_an_error_names_the_file_that_the_user_knows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found:
        write_text(tmp_path / "absent/out.json", "x")
    assert found.value.filename == str(tmp_path / "absent/out.json")


@pytest.mark.parametrize("code", [IN_FILE, IN_FOLDER])
def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_keeps_its_own(
    tmp_path: Path, code: str
) -> None:
    with holding(code, tmp_path / "out.mp4"):
        (left,) = names(tmp_path)
        write_text(tmp_path / "other", "x")
        sweep(tmp_path)
        assert names(tmp_path) == [left, "other"]
        with temporary(tmp_path / "out.mp4") as mine:
            assert names(tmp_path) == sorted([left, mine.name, "other"])
    assert names(tmp_path) == [left, "other"]
    sweep(tmp_path)
    assert names(tmp_path) == ["other"]
    with holding(code, tmp_path / "out.mp4"), holding(code, tmp_path / "out.mp4"):
        assert len(names(tmp_path)) == 3
    write_text(tmp_path / "out.mp4", "x")
    assert names(tmp_path) == ["other", "out.mp4"]


def test_hidden_files_of_others_are_left_alone(tmp_path: Path) -> None:
    kept = [
        ".out.mp4.00000001.mp4",
        ".out.mp4.notes.partial.mp4",
        ".partial",
        ".partials",
        ".work",
        "out.mp4.00000000.partial.mp4",
    ]
    for name in kept:
        (tmp_path / name).touch()
    write_text(tmp_path / "out.mp4", "x")
    (tmp_path / ".out.mp4.00000000.partial.mp4").touch()
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "out.mp4"])


def test_a_write_does_not_look_through_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100,000 files there it takes 70 ms, and a dataset makes as many writes."""

    def look(*_: object) -> Any:
        raise AssertionError

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, look)
    write_text(tmp_path / "a", "x")
    monkeypatch.undo()
    assert names(tmp_path) == ["a"]


LOOP = """
import os, sys, time
from pathlib import Path
from keysync_jax.files import replacing

mine, until, done = str(os.getpid()) * 1000, time.monotonic() + 1, 0
while time.monotonic() < until:
    with replacing(sys.argv[1]) as partial:
        assert partial.read_bytes() == b""
        partial.write_text(mine)
        assert partial.read_text() == mine
    done += 1
print(done)
"""


def test_processes_that_write_the_same_name_do_not_meet(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOOP, str(tmp_path / "out.json")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(3)]
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(error for _, error in results)
    assert all(int(done) > 20 for done, _ in results)
    assert names(tmp_path) == ["out.json"]
    assert (tmp_path / "out.json").read_text() in {str(run.pid) * 1000 for run in runs}


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "above/model"
    with pytest.raises(KeyboardInterrupt), new_folder(path) as folder:
        _half(folder / "file", KeyboardInterrupt)
    assert names(path.parent) == []
    with new_folder(path) as folder:
        (folder / "whole").touch()
        assert not path.exists()
    assert names(path.parent) == ["model"]
    assert names(path) == ["whole"]
    with pytest.raises(UserError, match="exists already"), new_folder(path):
        raise AssertionError
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"), new_folder(tmp_path / "file/model"):
        raise AssertionError


def test_files_are_copied_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    copy_file(tmp_path / "a", tmp_path / "b")
    copy_file(tmp_path / "b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(range(256))
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "absent", tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "b").stat().st_size == 256


def test_a_folder_is_settled_once(tmp_path: Path) -> None:
    mark = tmp_path / "clips/world.json"
    assert not settle(mark, {"seed": 1, "sizes": (1, 2)}, "synthetic clips")
    assert settle(mark, {"sizes": (1, 2), "seed": 1}, "synthetic clips")
    with pytest.raises(UserError, match="clips: holds synthetic clips of other settings; give a name"):
        settle(mark, {"seed": 2}, "synthetic clips")
    with pytest.raises(UserError, match="clips: holds dubs of another model; give a name"):
        settle(mark, {"seed": 2}, "dubs", "another model")
    mark.write_text("{")
    with pytest.raises(UserError, match=r"world.json: is damaged"):
        settle(mark, {}, "dubs")
    mark.unlink()
    (mark.parent / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already and holds no dubs"):
        settle(mark, {}, "dubs")
    with pytest.raises(UserError, match="exists already and holds no dubs"):
        settle(mark.parent / "mine.txt" / "world.json", {}, "dubs")
    assert names(mark.parent) == ["mine.txt"]


def test_a_folder_whose_first_writer_was_killed_is_settled(tmp_path: Path) -> None:
    with holding(IN_FILE, tmp_path / "world.json"):
        pass
    assert len(names(tmp_path)) == 1
    assert not settle(tmp_path / "world.json", {"seed": 1}, "synthetic clips")
    assert names(tmp_path) == ["world.json"]


def test_a_folder_is_made(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        make_folder(tmp_path / "file/b")


def test_one_process_holds_a_lock_and_its_end_lets_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holding(IN_LOCK, lock), pytest.raises(UserError, match="busy"), locked(lock, "busy"):
        raise AssertionError
    assert lock.exists()  # left by the killed process
    with locked(lock, "busy"):
        with pytest.raises(UserError, match="busy"), locked(lock, "busy"):
            raise AssertionError
        assert lock.exists()
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_a_lock_that_is_not_to_be_had_leaves_no_descriptor_open(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "busy"):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(UserError), locked(tmp_path / "lock", "busy"):
                raise AssertionError
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "lock", "busy"):
        assert "No locks available" in caplog.text
    left = tmp_path / ".file.00000000.partial"
    left.touch()
    write_text(tmp_path / "file", "x")
    sweep(tmp_path)  # It may be a living process's.
    assert names(tmp_path) == [left.name, "file"]


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path, pieces = tmp_path / "a", list[int]()
    path.write_bytes(bytes(range(256)) * 5000)
    assert sha256_of(path, pieces.append) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert pieces == [2**20, 256 * 5000 - 2**20]
    for name in ("absent", "a/b", "."):
        with pytest.raises(UserError, match="cannot be read"):
            sha256_of(tmp_path / name)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_machine_that_fails_is_no_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, *_: object) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as found:
        sha256_of(tmp_path / "a")
    assert found.value.errno == number


def test_a_file_is_hashed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, told = tmp_path / "a", list[Path](), list[int]()
    path.write_text("one")
    hashed = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path, told: read.append(path) or hashed(path, told))
    first = sha256_once(path, told.append)
    assert sha256_once(path, told.append) == first == hashed(path)
    assert told == [3, 3]
    assert len(read) == 1
    kept = path.stat()
    path.write_text("two")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert sha256_once(path) == hashed(path) != first
    replaced = tmp_path / "b"
    replaced.write_text("six")
    os.utime(replaced, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    replaced.rename(path)
    assert sha256_once(path) == hashed(path)
    with pytest.raises(UserError, match="cannot be read"):
        sha256_once(tmp_path / "absent")


def test_a_line_is_added_whole(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    append_line(path, "one")
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"
    path.write_text("one\ntw")  # Its writer was killed.
    append_line(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"
