"""`keysync train` as one of several processes, with what a test wants to see of it.

`python -m tests.train.loop_worker [--lagging] PROCESS PROCESSES PORT ARGUMENTS`: runs the command, then
prints one JSON line of the exit code and the programs that were compiled. With `--lagging` this process's
listings of checkpoints are empty, as those of a network file system can be that were made before there were
any.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from keysync_jax.cli import main
from keysync_jax.pipeline.phases import _Compiles


def lag() -> None:
    """Hides what is in a folder `checkpoints` from listings; opening it by name works."""
    empty = tempfile.mkdtemp()

    def hiding(listing: Any) -> Any:
        return lambda folder=".": listing(empty if Path(str(folder)).name == "checkpoints" else folder)

    os.listdir, os.scandir = hiding(os.listdir), hiding(os.scandir)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--lagging":
        lag()
        arguments = arguments[1:]
    process, processes, port, *rest = arguments
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
    os.environ |= {"JAX_NUM_PROCESSES": processes, "JAX_PROCESS_ID": process}
    code = main(["train", "--multihost", *rest])
    print(json.dumps({"code": code, "programs": _Compiles.count}), flush=True)
    sys.exit(code)
