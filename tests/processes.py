"""What tests of processes share: which ones a process started, and whether they have ended."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def children(pid: int) -> set[int]:
    """Processes that a process started and that have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = rest.split()[:2]
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"after {seconds} s not yet: {what}"
        time.sleep(0.02)


def hidden_names(folder: Path) -> list[str]:
    """What is hidden anywhere below a folder."""
    return [name for _, folders, files in os.walk(folder) for name in (*folders, *files) if name[0] == "."]
