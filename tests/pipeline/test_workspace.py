"""One run at a time has a workspace, whatever the others do in between."""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.pipeline.workspace import Workspace


def test_a_run_that_waits_while_the_lock_is_removed_does_not_share_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the lock file, the first ends and removes it, the second locks what it has open."""
    output, flock = tmp_path / "out.mp4", fcntl.flock
    first = Workspace(output, {})
    ended = []

    def lock(held: Any, how: int) -> None:
        if not ended:
            ended.append(True)
            first.remove()
            first.__exit__(None, None, None)
        flock(held, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with Workspace(output, {}) as second:
        assert ended
        with pytest.raises(UserError, match="another run is making it now"):
            Workspace(output, {})
        second.remove()
    assert not list(tmp_path.iterdir())


LOOP = """
import os, sys, time
from pathlib import Path
from keysync_jax.errors import UserError
from keysync_jax.pipeline.workspace import Workspace

output, until = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
inside, had = output.with_name("inside"), 0
while time.monotonic() < until:
    try:
        with Workspace(output, {}) as work:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
            had += 1
            inside.unlink()
            work.remove()
    except UserError:
        pass
print(had)
"""


def test_processes_that_take_and_leave_it_never_meet_inside(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOOP, str(tmp_path / "out.mp4"), "1.5"]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], results[0][1] + results[1][1] + results[2][1]
    assert sum(int(out) for out, _ in results) > 50
    assert not list(tmp_path.iterdir())


def _one_row(work: Workspace, error: type[BaseException]) -> None:
    work.array("rows", (3, 2)).append(np.ones((1, 2)))
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_workspace_goes_where_there_is_nothing_to_keep(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Workspace(tmp_path / "out.mp4", {}):
        raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(error), Workspace(tmp_path / "out.mp4", {}) as work:
        _one_row(work, error)
    assert [path.name for path in tmp_path.iterdir()] == [".out.mp4.work"]
    with Workspace(tmp_path / "out.mp4", {}) as work:
        assert work.array("rows", (3, 2)).done == 1
