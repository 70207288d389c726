"""The package as it installs: what is in it, what importing it costs, and the command."""

import configparser
import importlib
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import keysync_jax

ROOT = Path(__file__).parents[1]
MAPPED = ("convert", "configs", "launch")
"""Top-level folders that install as packages of keysync_jax."""


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def sources() -> dict[str, Path]:
    """Where each source file installs -> the file."""
    folders = [(ROOT / "keysync_jax", "keysync_jax"), *((ROOT / m, f"keysync_jax/{m}") for m in MAPPED)]
    return {
        f"{place}/{file.relative_to(folder).as_posix()}": file
        for folder, place in folders
        for file in folder.rglob("*.py")
    }


def data() -> set[str]:
    """Where the files install that travel with the sources: mouth reader, model, floors, a mark, pages."""
    files = (ROOT / "keysync_jax").rglob("*.safetensors")
    models = (ROOT / "keysync_jax" / "models").rglob("config.json")
    types = (ROOT / "keysync_jax").rglob("py.typed")
    floors = (ROOT / "keysync_jax").rglob("floors.json")
    evaluation = ROOT / "keysync_jax" / "evaluation"
    pages = [file for kind in ("css", "html", "js") for file in evaluation.rglob(f"*.{kind}")]
    found = {file.relative_to(ROOT).as_posix() for file in (*files, *models, *types, *floors, *pages)}
    return found | {f"keysync_jax/launch/cluster/{file.name}" for file in (ROOT / "launch/cluster").iterdir()}


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


def requirements(python: str) -> dict[str, Requirement]:
    """What the package and its extras require under one Python, by name; the package itself left out."""
    lists = [setup()["options"]["install_requires"], *setup()["options.extras_require"].values()]
    parsed = [Requirement(line) for text in lists for line in text.split("\n") if line]
    wanted = [r for r in parsed if r.marker is None or r.marker.evaluate({"python_version": python})]
    named = {r.name.lower().replace("_", "-"): r for r in wanted if r.specifier}
    return {name: r for name, r in named.items() if name != "keysync-jax"}


def constrained(python: str) -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    wanted = [r for r in parsed if r.marker is None or r.marker.evaluate({"python_version": python})]
    found = {r.name.lower().replace("_", "-"): str(r.specifier).removeprefix("==") for r in wanted}
    assert len(found) == len(wanted)
    return found


NOT_TESTED_WITH = ("face-alignment", "gcsfs", "onnxruntime", "pyiqa", "setuptools", "torch-fidelity")


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_versions_that_are_tested_are_among_those_that_install(python):
    tested = constrained(python)
    for name, requirement in requirements(python).items():
        if name not in NOT_TESTED_WITH:
            assert requirement.specifier.contains(tested[name]), name


# Flax fails to import, each pair as it was tried.
BROKEN = [
    ("0.10.2", "0.12.0"),
    ("0.11.1", "0.12.6"),
    ("0.11.1", "0.12.8"),
    ("0.11.2", "0.12.9"),
    ("0.12.0", "0.12.9"),
]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_no_pair_of_jax_and_flax_that_fails_can_be_installed(python):
    wanted = requirements(python)
    for jax, flax in [*BROKEN, ("1.0", "0.12.12"), ("0.10.2", "1.0")]:
        assert not (wanted["jax"].specifier.contains(jax) and wanted["flax"].specifier.contains(flax))


def planned(folder: Path, target: str) -> str:
    """What `make TARGET` would run there."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "VENV"))
    }
    command = ["make", "--dry-run", target]
    return subprocess.run(command, cwd=folder, env=ours, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_the_demo_installs_only_what_the_package_imports(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    demo, test = planned(tmp_path, "demo"), planned(tmp_path, "test")
    assert "-c constraints.txt -e .\n" in demo
    assert "[dev]" not in demo
    assert test.index("-c constraints.txt -e .\n") < test.index("-c constraints.txt -e '.[dev]'\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "base").touch()
    assert "pip install" not in planned(tmp_path, "demo")
    assert "-e '.[dev]'" in planned(tmp_path, "test")
    (tmp_path / ".venv" / "installed").touch()
    assert "pip install" not in planned(tmp_path, "demo") + planned(tmp_path, "test")


def test_the_help_comes_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from keysync_jax.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.startswith("usage: keysync")
    assert set(shown.splitlines()[-1].split()) - sys.stdlib_module_names == {"keysync_jax"}
    # Of the processor, not of the clock: other programs do not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_command_is_there():
    command, _, target = setup()["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert command == "keysync"
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
