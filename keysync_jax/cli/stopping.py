"""SIGTERM and SIGHUP end a command as Ctrl-C does: in order, with nothing half written and the work kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Raised in the main thread where it is when a signal comes.

    Attributes:
      code: exit code of the command, 128 + the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def stopping_in_order(active: bool = True) -> Iterator[None]:
    """Makes the first of `SIGNALS` raise `Stopped` in the block; the later ones let it end in order.

    A signal that the process was started to ignore (nohup) stays ignored. Does nothing where not `active`,
    and outside the main thread, where Python handles no signals.
    """
    if not active or threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
