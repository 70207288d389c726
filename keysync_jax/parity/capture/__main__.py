"""Starts the capture: `PYTHON -s capture FOLDER`."""

import importlib
import importlib.util
import sys
from pathlib import Path


def run() -> int:
    """Runs the folder of this file as a package of its own; its files hide no module from the release."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    name = "keysync_capture"
    spec = importlib.util.spec_from_file_location(
        name, here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    program = importlib.import_module(f"{name}.program")
    code: int = program.main(Path(sys.argv[1]).resolve())
    return code


if __name__ == "__main__":
    sys.exit(run())
