"""What kept results are bound to: the digest of the code covers every file that a dub runs through."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import keysync_jax
from keysync_jax.pipeline.environment import DUB_CODE, code_digest, environment

ROOT = Path(__file__).parents[2]
MAPPED = ("convert", "configs", "launch")


def run(code: str, *paths: Path) -> str:
    """What a fresh interpreter prints; `paths` come first in its search path."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True, cwd=ROOT.anchor)
    return done.stdout.strip()


def test_the_digest_covers_all_that_a_dub_imports() -> None:
    loaded = run("import keysync_jax.pipeline.dub, sys; print(*sys.modules)").split()
    names = {name.split(".")[1] for name in loaded if name.startswith("keysync_jax.")}
    assert {"nn", "model"} < names
    assert names <= set(DUB_CODE)


def test_the_digest_is_that_of_the_sources_wherever_they_are_installed(tmp_path: Path) -> None:
    """As a wheel installs them, all in one folder, without the links of an editable install."""
    installed = tmp_path / "site" / "keysync_jax"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(Path(keysync_jax.__file__).parent, installed, ignore=ignored)
    for name in MAPPED:
        shutil.copytree(ROOT / name, installed / name, ignore=ignored)
    parts = (*DUB_CODE, *MAPPED)
    code = f"from keysync_jax.pipeline import environment as e; print(e.__file__, e.code_digest(*{parts!r}))"
    here = code_digest(*parts)
    assert run(code, tmp_path / "site") == f"{installed / 'pipeline/environment.py'} {here}"
    with (installed / "nn/vae.py").open("a") as file:
        file.write("# another\n")
    found = run(code, tmp_path / "site").split()[1]
    assert found != here
    with (installed / "launch/train.py").open("a") as file:
        file.write("# another\n")
    assert run(code, tmp_path / "site").split()[1] not in (here, found)


def test_the_environment_names_code_device_and_libraries() -> None:
    found = environment()
    assert found["code"] == code_digest(*DUB_CODE) != environment("synthetic")["code"]
    assert (found["platform"], found["device"]) == ("cpu", "cpu")
    assert {"jax", "jaxlib", "pyav"} <= dict(found["libraries"]).keys()  # type: ignore[call-overload]
