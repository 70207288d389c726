"""Whether the machine is to blame: what is seen through causes, libraries and process borders."""

import errno
import os
import pickle

import av
import cv2
import pytest

from keysync_jax.errors import UserError, machine_fault

MACHINES = [
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EROFS,
    errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.ENOTCONN, errno.EREMOTEIO, errno.EBUSY,
]  # fmt: skip


def raised(error: BaseException, *, hidden: bool = False) -> UserError:
    """A UserError about another error, as `raise ... from error` makes it, or as `from None` does."""
    try:
        try:
            raise error
        except BaseException as reason:
            raise UserError("cannot be read") from (None if hidden else reason)
    except UserError as user_error:
        return user_error


@pytest.mark.parametrize("number", MACHINES)
@pytest.mark.parametrize("hidden", [False, True])
def test_the_machines_errors_are_seen_behind_a_sentence(number: int, hidden: bool) -> None:
    for reason in (OSError(number, os.strerror(number), "clip.mp4"), raised(OSError(number, "", "clip.mp4"))):
        fault = machine_fault(raised(reason, hidden=hidden))
        assert fault is not None
        fault = pickle.loads(pickle.dumps(fault))
        assert (fault.errno, fault.filename) == (number, "clip.mp4")
        assert os.strerror(number) in fault.strerror


@pytest.mark.parametrize(
    "error",
    [
        UserError("the file is full of errors: out of memory"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "clip.mp4"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "clip.mp4"),
        OSError("no number"),
        ValueError("wrong"),
        av.error.InvalidDataError(1094995529, "Invalid data", "clip.mp4"),
    ],
)
def test_what_is_wrong_with_a_file_is_not_the_machines(error: Exception) -> None:
    assert machine_fault(error) is None
    assert machine_fault(raised(error)) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 GiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate\nmore"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        cv2.error("OpenCV(5.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_lack_of_memory_has_its_number(error: Exception) -> None:
    fault = machine_fault(raised(error))
    assert fault is not None
    assert fault.errno == errno.ENOMEM
    assert str(error).partition("\n")[0] in fault.strerror
    assert "\n" not in fault.strerror


def test_what_ffmpeg_says_of_damaged_files_too_does_not_count() -> None:
    for damaged in (errno.EIO, errno.EPERM, errno.ENOMEM):
        with pytest.raises(av.error.FFmpegError) as error:
            av.error.err_check(-damaged)
        assert machine_fault(error.value) is None
    for machines in (errno.ESTALE, errno.EACCES, errno.EMFILE):
        with pytest.raises(av.error.FFmpegError) as error:
            av.error.err_check(-machines, "clip.mp4")
        fault = machine_fault(error.value)
        assert fault is not None
        assert (fault.errno, fault.filename) == (machines, "clip.mp4")
