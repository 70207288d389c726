"""The extras: which module each brings, and what a command says where one is not installed."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.extras import EXTRAS, needed_for, require

ROOT = Path(__file__).parents[1]
BASE = {"av", "cv2", "flax", "jax", "ml_dtypes", "numpy", "scipy", "tqdm"}
"""Modules of what a plain install brings."""
MODULES = {"absl-py": "absl", "orbax-checkpoint": "orbax", "opencv-python-headless": "cv2"}
"""Modules that are not named as their packages."""


def packages(requirements: str) -> set[str]:
    """Modules of the packages that a list of requirements names, without those of other extras."""
    names = (re.split(r"[\[<>=~; ]", line)[0] for line in requirements.split("\n") if line)
    return {MODULES.get(name, name.replace("-", "_")) for name in names} - {"keysync_jax"}


def test_each_module_is_in_the_extra_that_is_named():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert packages(setup["options"]["install_requires"]) == BASE
    for extra in ("convert", "data", "hub", "landmarks", "train"):
        named = {module for module, brought_by in EXTRAS.items() if brought_by == extra}
        assert packages(setup["options.extras_require"][extra]) == named
    assert packages(setup["options.extras_require"]["face-alignment"]) == {"face_alignment", "torch"}


def test_whatever_is_imported_is_installed_or_in_an_extra():
    imported = set()
    for folder in ("keysync_jax", "convert", "configs", "launch"):
        # What runs in the release's Python imports what is there; tests/parity has a test of its own for it.
        for file in set((ROOT / folder).rglob("*.py")) - set((ROOT / "keysync_jax/parity/capture").iterdir()):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
    # jax brings jaxlib; W&B may be there or not, a run says that it is left out.
    known = sys.stdlib_module_names | BASE | {"keysync_jax", "jaxlib", "wandb"}
    # libtpu is imported by jax alone.
    assert imported - known == set(EXTRAS) - {"libtpu"}


PLAIN = ("array_record", "face_alignment", "grain", "mediapipe", "ml_collections", "tensorboardX", "torch")
"""What a plain install has not."""


def outcomes(commands: list[list[str]], hidden: tuple[str, ...], folder: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of each command, in an interpreter that does not find some modules."""
    code = (
        "import contextlib, io, json, sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "from keysync_jax.cli import main\n"
        f"for command in json.loads({json.dumps(commands)!r}):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said: rc = main(command)\n"
        "    print('outcome', json.dumps([rc, said.getvalue()]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.removeprefix("outcome ") for line in run.stdout.splitlines() if line.startswith("outcome ")]
    return [tuple(json.loads(line)) for line in lines]


def test_a_command_names_the_extra_that_it_needs(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    torch = ["--keyframe=weights.pt", "--interpolation=b.pt", "--vae=c", *("--audio-keyframe", "hubert=d")]
    train = ["train", "--config", "configs/keyframe_tiny.py", "--workdir", "made"]
    needs = {
        "train": (train, "ml_collections", "train"),
        "dry run": ([*train, "--dry-run"], "ml_collections", "train"),
        "init": (
            ["init", "--vae=run", "--keyframe=configs/keyframe.py", "--interpolation=i.py", "-o", "made"],
            "ml_collections",
            "train",
        ),
        "export": (["export", "run", "--base", "model", "-o", "made"], "array_record", "data"),
        "prepare": (["prepare", "clip.mp4", "-o", "made"], "array_record", "data"),
        "check": (["prepare", "--check", "data"], "array_record", "data"),
        "convert": (
            ["convert", *torch, "--audio-interpolation", "hubert=d", "-o", "made"],
            "torch",
            "convert",
        ),
    }
    found = outcomes([command for command, _, _ in needs.values()], PLAIN, tmp_path)
    for name, (rc, said), (_, module, extra) in zip(needs, found, needs.values(), strict=True):
        assert rc == 2, name
        sentence = said.splitlines()[-1]  # `convert` has drawn its bar by then.
        assert sentence.startswith("keysync: "), name
        assert f"{module}, which is not installed: pip install 'keysync_jax[{extra}]'" in sentence, name
    assert not (tmp_path / "made").exists()


def test_what_a_run_imports_late_is_missed_before_it_begins(tmp_path):
    command = ["train", "--config", "configs/keyframe_tiny.py", "--workdir", "made"]
    ((rc, said),) = outcomes([command], ("tensorboardX",), tmp_path)
    assert (rc, said) == (
        2,
        "keysync: keysync train needs tensorboardX, which is not installed: "
        "pip install 'keysync_jax[train]'\n",
    )
    assert not (tmp_path / "made").exists()


def test_pickles_cannot_be_written_without_torch(tmp_path, capsys, monkeypatch):
    from keysync_jax.model import DEFAULT

    monkeypatch.setitem(sys.modules, "torch", None)
    command = ["export", str(DEFAULT), "--to", "reference", "--pickled", "-o", str(tmp_path / "made")]
    assert main(command) == 2
    assert (
        "made: writing .pt files needs torch, which is not installed: pip install" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_config_that_imports_something_else_is_the_configs_fault(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import no_such_module")
    assert main(["train", "--config", str(tmp_path / "mine.py"), "--dry-run"]) == 2
    assert "mine.py: cannot be read (No module named 'no_such_module')" in capsys.readouterr().err


def test_other_modules_that_are_missing_are_faults_of_the_program():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needed_for("this"):
        import no_such_module  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        require("no_such_module")
    with pytest.raises(UserError, match=r"this needs orbax, .*\[train\]"), needed_for("this"):
        raise ModuleNotFoundError(name="orbax.checkpoint.v1")
