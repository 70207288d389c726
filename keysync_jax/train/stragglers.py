"""Which host is slow. A step is as slow as the slowest host and takes equally long on all, so each tells
what it did alone: how long it waited for data, and how long until it had handed the step to its devices.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

WHAT = ("waits for data", "prepares a step", "hands a step to its devices")
"""What is compared, seconds a step."""

_TIMES = 3
_LEAST_SECONDS = 0.01


class Stragglers:
    """Compares hosts at every line of metrics.

    Args:
      names: of the processes' hosts.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._streak: Counter[tuple[int, int]] = Counter()

    def add(self, seconds: np.ndarray) -> list[str]:
        """Sentences on hosts that were above median + 3 MAD for the third time in a row.

        Args:
          seconds: of `WHAT`, by process, float `[processes, 3]`.
        """
        middle = np.median(seconds, 0)
        spread = np.median(np.abs(seconds - middle), 0)
        # Equal hosts have no spread: what nobody would feel is not slow.
        slow = seconds > middle + np.maximum(3 * spread, np.maximum(_LEAST_SECONDS, 0.1 * middle))
        found = []
        for process, what in np.ndindex(slow.shape):
            streak = self._streak[process, what] + 1 if slow[process, what] else 0
            self._streak[process, what] = streak
            if streak == _TIMES:
                found.append(
                    f"process {process} on {self._names[process]} {WHAT[what]} for "
                    f"{seconds[process, what]:.3f} s a step, the median host {middle[what]:.3f} s"
                )
        return found
