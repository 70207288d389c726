"""The one exception that is meant for the user, and whether the machine is to blame for another one."""

import errno
import os
from collections.abc import Iterator


class UserError(Exception):
    """Something the user gave cannot be used; the message is one clear sentence.

    The command line prints the message on stderr and exits with code 2, without a traceback. Every
    other exception is a defect of the program and keeps its traceback.
    """


# Names that are wrong or gone, contents that are wrong, defects of the program. Every other number is the
# machine's: an unknown one ends a run, which goes on later, and loses nothing.
_NOT_THE_MACHINE = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP,
        errno.ENAMETOOLONG, errno.EINVAL, errno.EDOM, errno.ERANGE, errno.EILSEQ, errno.ENOSYS,
        errno.EBADF, errno.ECHILD, errno.EPIPE, errno.ESPIPE, errno.ESRCH,
    }
)  # fmt: skip

# FFmpeg says these of damaged files, too; reading the file tells.
_SAID_OF_DAMAGED_FILES = frozenset({errno.EAGAIN, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EPERM})

# Of XLA and MediaPipe; of torch; of OpenCV; of Python.
_EXHAUSTED = ("RESOURCE_EXHAUSTED", "out of memory", "Insufficient memory", "can't start new thread")


def machine_fault(error: BaseException) -> OSError | None:
    """What the machine could not do, where that is the reason of an exception.

    Disks and mounts that fail, permissions, too little memory or space, too many open files: what is being
    read is not to blame, and the same call can succeed later. What an exception was raised from, or while
    handling what, counts as its reason.

    Returns:
      An error of its own that survives pickling, with number, reason and, where known, the file's name. A
      lack of memory has ENOMEM. None: the machine is not known to be at fault. FFmpeg's EIO, EPERM, ENOMEM
      and some others are none: it says them of damaged files as well.
    """
    for reason in _reasons(error):
        number = _number(reason)
        if number is not None:
            first_line = str(reason).partition("\n")[0]
            words = getattr(reason, "strerror", None) or f"{os.strerror(number)} ({first_line})"
            return OSError(number, words, *filter(None, [getattr(reason, "filename", None)]))
    return None


def _number(error: BaseException) -> int | None:
    """The number of what the machine could not do, as far as this exception itself tells."""
    number = getattr(error, "errno", None)
    if _of_ffmpeg(error):
        number = None if number in _SAID_OF_DAMAGED_FILES else number
    elif _is_exhaustion(error):
        number = errno.ENOMEM
    return number if number in errno.errorcode and number not in _NOT_THE_MACHINE else None


def _is_exhaustion(error: BaseException) -> bool:
    if isinstance(error, OSError | UserError):
        return False
    return isinstance(error, MemoryError) or any(words in str(error) for words in _EXHAUSTED)


def _of_ffmpeg(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "av"


def _reasons(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from or while handling, and so on."""
    waiting, seen = [error], set[int]()
    while waiting:
        reason = waiting.pop()
        if id(reason) not in seen:
            seen.add(id(reason))
            yield reason
            waiting += [other for other in (reason.__context__, reason.__cause__) if other is not None]
