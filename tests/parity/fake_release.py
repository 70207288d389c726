"""A stand-in for the release: a checkout's folders, and a Python that leaves what a test wants."""

import json
import stat
import sys
from pathlib import Path

from keysync_jax.parity.release import TREES


def checkout(folder: Path) -> Path:
    """Folders of the release's names; what is in them is another release's."""
    for tree in TREES:
        (folder / tree).mkdir(parents=True)
        (folder / tree / "something.py").write_text("x = 1\n")
    return folder


def python(path: Path, script: str) -> Path:
    """An interpreter that runs a script whatever it is told to; the script knows `folder` and `request`.

    `answer(**arrays)` in it answers with a zero for every module that was asked for, and with the arrays.
    """
    preamble = """
        import json, os, signal, sys, time
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file
        folder = Path(sys.argv[-1])
        request = json.loads((folder / "request.json").read_text())

        def answer(leave_out="", **instead):
            orders = {}
            for part in request["networks"]:
                entries = {e: np.zeros(1, np.float32) for e in part["modules"] if e != leave_out}
                entries |= {k.replace("__", "/"): x for k, x in instead.items()}
                save_file(entries, folder / f"{part['network']}.safetensors")
                orders[part["network"]] = list(entries)
            (folder / "answer.json").write_text(json.dumps({"orders": orders}))
    """
    lines = [line[8:] for line in preamble.strip("\n").splitlines()]
    path.write_text("\n".join([f"#!{sys.executable}", *lines, script, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def failing(sentence: str) -> str:
    """A script that answers as `capture` does where it cannot go on."""
    content = json.dumps({"sentence": sentence})
    return f"(folder / 'failure.json').write_text({content!r}); sys.exit(3)"
