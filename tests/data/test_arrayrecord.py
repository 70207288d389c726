"""Files of records: few are open at once, and the system's faults are told from damage."""

import errno
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.data import arrayrecord
from keysync_jax.data.arrayrecord import RecordReader, RecordWriter, system_error
from keysync_jax.errors import UserError
from tests.prepared import write_dataset

ROOT = Path(__file__).parents[2]
FILES, RECORDS = 20, 5


def content(file: int, record: int) -> bytes:
    return b"%d " % (100 * file + record) * 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for file in range(FILES):
        with RecordWriter(folder / f"{file}") as writer:
            for record in range(RECORDS):
                writer.write(content(file, record))
    return folder


def descriptors(path: Path) -> list[int]:
    """Descriptors of this process for a file, or for those of a folder."""
    every = Path("/proc/self/fd")
    if not every.is_dir():
        pytest.skip("the system does not list open files")
    found = [(number, os.path.realpath(every / number)) for number in os.listdir(every)]
    return [int(number) for number, name in found if path.resolve() in (Path(name), Path(name).parent)]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """What is open stays open, and nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_share_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrayrecord, "MOST_OPEN", 4)
    readers = pickle.loads(pickle.dumps([RecordReader(folder / f"{file}") for file in range(FILES)]))

    def right(number: int) -> bool:
        file, record = number * 7 % FILES, number % RECORDS
        return readers[file].read([record]) == [content(file, record)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(600)))
    assert 0 < len(descriptors(folder)) <= 4
    # The one that was used last is among them.
    readers[3].read([0])
    with no_descriptor_left():
        assert readers[3].read([1]) == [content(3, 1)]
    readers.clear()
    assert not descriptors(folder)


def test_no_more_than_a_quarter_of_the_systems_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((16, 4), (3, 1), (resource.RLIM_INFINITY, FILES)):
        monkeypatch.setattr(arrayrecord.resource, "getrlimit", lambda _, soft=limit: (soft, soft))
        readers = [RecordReader(folder / f"{file}") for file in range(FILES)]
        assert [len(reader) for reader in readers] == [RECORDS] * FILES
        assert len(descriptors(folder)) == most
        del readers


READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from keysync_jax.data.records import Dataset
dataset = Dataset(sys.argv[1])
found = [int(dataset.read(clip, [1], ["audio_hubert"])[0]["audio_hubert"][0, 0]) for clip in range(120)]
assert found == [1000 * clip + 1 for clip in range(120)], found
"""


def test_more_shards_than_the_system_lets_open(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", [2] * 120)
    assert len(dataset.manifest.shards) == 60
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "dataset")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_too_many_open_files_is_no_damage(folder: Path) -> None:
    reader = RecordReader(folder / "0")
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files") as caught:
        reader.read([0])
    assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, str(folder / "0"))
    assert reader.read([0]) == [content(0, 0)]


def test_too_many_open_files_are_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "dataset", [2])
    plain = RecordReader.read

    def without_descriptors(reader: RecordReader, indices: Sequence[int]) -> list[bytes]:
        arrayrecord._open_files.drop(reader)
        with no_descriptor_left():
            return plain(reader, indices)

    monkeypatch.setattr(RecordReader, "read", without_descriptors)
    assert main(["prepare", "--check", str(tmp_path / "dataset")]) == 2
    sentence = "shard-00000.arrayrecord: Too many open files; raise the limit (ulimit -n)"
    assert f"{sentence}; the same command goes on" in capsys.readouterr().err


def test_a_writer_that_cannot_open_its_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = arrayrecord.ArrayRecordWriter

    def without_descriptors(*arguments: str) -> object:
        with no_descriptor_left():
            return write(*arguments)

    monkeypatch.setattr(arrayrecord, "ArrayRecordWriter", without_descriptors)
    with (
        pytest.raises(OSError, match="Too many open files") as caught,
        RecordWriter(tmp_path / "a") as writer,
    ):
        writer.write(b"x")
    assert caught.value.errno == errno.EMFILE
    assert list(tmp_path.iterdir()) == []


def test_a_read_that_fails_is_no_damage_and_the_next_one_opens_the_file_anew(folder: Path) -> None:
    reader = RecordReader(folder / "1")
    reader.read([0])
    (number,) = descriptors(folder / "1")
    # The reader's descriptor becomes one of a folder, which cannot be read as a file.
    other = os.open(folder, os.O_RDONLY)
    os.dup2(other, number)
    os.close(other)
    with pytest.raises(IsADirectoryError):
        reader.read([0])
    assert reader.read([2]) == [content(1, 2)]


def test_a_file_that_is_gone_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        RecordReader(tmp_path / "gone").read([0])
    assert caught.value.filename == str(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("open() failed: Permission denied; opening a", PermissionError, errno.EACCES),
        ("open() failed: Too many open files in system; opening a", OSError, errno.ENFILE),
        ("pread() failed: Input/output error; reading a; at byte 64", OSError, errno.EIO),
        ("pread() failed: Stale file handle; reading a; at byte 64", OSError, errno.ESTALE),
        ("write() failed: No space left on device; writing a", OSError, errno.ENOSPC),
        ("pread() failed: nobody knows; reading a", OSError, errno.EIO),
    ],
)
def test_the_systems_errors_keep_their_numbers(text: str, kind: type[OSError], number: int) -> None:
    error = system_error(text, Path("a"))
    assert type(error) is kind
    assert (error.errno, error.filename) == (number, "a")
    assert error.strerror in text


def test_damage_is_a_users_error(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "0").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-70_000])
    with pytest.raises(UserError, match=r"short: is damaged or no ArrayRecord file"):
        RecordReader(tmp_path / "short").read([0])
    flipped = np.frombuffer(whole, np.uint8).copy()
    flipped[whole.index(content(0, 3))] ^= 255
    (tmp_path / "flipped").write_bytes(flipped.tobytes())
    reader = RecordReader(tmp_path / "flipped")
    assert reader.read([0, 4]) == [content(0, 0), content(0, 4)]
    with pytest.raises(UserError, match=r"flipped: is damaged"):
        reader.read([3])


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with RecordWriter(tmp_path / "a.arrayrecord") as writer:
            writer.write(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
