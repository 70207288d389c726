"""The golden numbers of the reference, every entry; and that the check can fail."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.parity.compare import compare
from keysync_jax.tensorfile import TensorFile, write_tensors
from tests.train.tiny_training import CPU_FLAGS


def subset(golden: Path, folder: Path, wanted: str, change: float = 0.0) -> Path:
    """A golden file with the entries of one network, the first output changed by a share of its maximum."""
    stored = TensorFile(golden / "tiny.safetensors")
    kept = {k: np.array(stored[k]) for k in stored if k.startswith(wanted)}
    first = next(k for k in kept if "/in/" not in k)
    kept[first].flat[0] += change * np.abs(kept[first]).max()
    write_tensors(folder / "part.safetensors", kept)
    (folder / "part.manifest.json").write_bytes((golden / "tiny.manifest.json").read_bytes())
    return folder / "part"


def test_every_entry_of_the_tiny_networks(golden: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "keysync_jax.cli", "parity", "--golden", str(golden / "tiny")],
        # Large programs that run once.
        env=os.environ | {"XLA_FLAGS": CPU_FLAGS, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "36 of 36 entries within their bounds" in done.stdout


def test_inputs_that_are_not_stored_are_made_by_the_rule(golden: Path, tmp_path: Path) -> None:
    stored = TensorFile(golden / "tiny.safetensors")
    outputs = ("keyframe/out/network", "keyframe/out/denoised_1", "keyframe/cond/concat", "vae/out/moments")
    write_tensors(tmp_path / "bare.safetensors", {k: stored[k] for k in outputs})
    (tmp_path / "bare.manifest.json").write_bytes((golden / "tiny.manifest.json").read_bytes())
    assert all(r.ok for r in compare(tmp_path / "bare"))


def test_command_prints_the_table_and_its_verdict(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "--golden", str(subset(golden, tmp_path, "vae/"))]) == 0
    out = capsys.readouterr().out
    assert "vae/out/decoded_t4" in out
    assert "3 of 3 entries within their bounds" in out
    assert main(["parity", "--golden", str(subset(golden, tmp_path, "vae/", change=3e-4))]) == 1
    out = capsys.readouterr().out
    assert "EXCEEDED" in out
    assert "2 of 3 entries" in out


def test_an_entry_that_cannot_be_run_is_named(golden: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "odd.safetensors", {"keyframe/out/mystery": np.zeros(1, np.float32)})
    (tmp_path / "odd.manifest.json").write_bytes((golden / "tiny.manifest.json").read_bytes())
    with pytest.raises(UserError, match="'keyframe/out/mystery' is none that this program can run"):
        list(compare(tmp_path / "odd"))


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_broken_manifest(golden: Path, tmp_path: Path, content: str | None) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(1)})
    if content is not None:
        (tmp_path / "x.manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest of golden numbers"):
        list(compare(tmp_path / "x"))
