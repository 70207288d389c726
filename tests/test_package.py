"""The package as it installs: what is in it, what importing it costs, and the command."""

import configparser
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import keysync_jax

ROOT = Path(__file__).parents[1]
MAPPED = ("convert", "configs", "launch")
"""Top-level folders that install as packages of keysync_jax."""


def sources() -> dict[str, Path]:
    """Where each source file installs -> the file."""
    folders = [(ROOT / "keysync_jax", "keysync_jax"), *((ROOT / m, f"keysync_jax/{m}") for m in MAPPED)]
    return {
        f"{place}/{file.relative_to(folder).as_posix()}": file
        for folder, place in folders
        for file in folder.rglob("*.py")
    }


def data() -> set[str]:
    """Where the files install that travel with the sources: the mouth reader, the embedded model, a mark."""
    files = (ROOT / "keysync_jax").rglob("*.safetensors")
    models = (ROOT / "keysync_jax" / "models").rglob("config.json")
    types = (ROOT / "keysync_jax").rglob("py.typed")
    return {file.relative_to(ROOT).as_posix() for file in (*files, *models, *types)}


def modules(prefix: str = "keysync_jax") -> list[str]:
    names = (place.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for place in sources())
    return sorted(name for name in names if f"{name}.".startswith(f"{prefix}."))


def test_the_wheel_holds_all_modules_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("keysync_jax", *MAPPED, "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"keysync_jax-{keysync_jax.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert packed == set(sources()) | data()
    assert len(licences) == 1


def imported_by(names: list[str]) -> set[str]:
    """Every module that a fresh interpreter has loaded after importing these."""
    code = f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def test_importing_everything_is_light():
    loaded = imported_by(modules())
    assert set(modules()) <= loaded
    assert not loaded & {"torch", "transformers", "diffusers", "mediapipe", "face_alignment", "matplotlib"}


@pytest.mark.parametrize(
    ("package", "unwanted"), [("media", {"jax", "jaxlib", "flax"}), ("diffusion", {"flax", "cv2", "av"})]
)
def test_importing_a_layer_stays_inside_its_means(package, unwanted):
    names = modules(f"keysync_jax.{package}")
    assert len(names) > 1
    assert not imported_by(names) & unwanted


def test_the_command_is_there():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    command, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert command == "keysync"
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
