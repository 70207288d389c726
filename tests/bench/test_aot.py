"""Compiling for a machine that is not here."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.ahead.chips import Chip
from keysync_jax.ahead.hlo import KINDS, Cost
from keysync_jax.ahead.program import Ahead, table
from keysync_jax.bench.aot import least_bytes
from keysync_jax.bench.sizes import size_of
from keysync_jax.bench.workloads import Workload, workloads
from keysync_jax.cli import main

HAS_LIBTPU = find_spec("libtpu") is not None


def test_without_libtpu_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("keysync_jax.extras.find_spec", lambda _: None)
    assert main(["bench", "vae", "--aot", "v5e:2x2"]) == 2
    error = capsys.readouterr().err
    assert "keysync bench --aot needs libtpu, which is not installed: pip install 'keysync_jax[tpu]'" in error


@pytest.mark.parametrize("option", [["--against", "torch"], ["--repeats", "3"]])
def test_nothing_runs_so_nothing_is_compared(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--aot", "v5e:2x2", *option]) == 2
    assert "--aot runs nothing" in capsys.readouterr().err


def test_what_must_move_by_hand() -> None:
    def run(params: Any, x: Any) -> Any:
        with jax.named_scope("attention"):
            scores = jnp.einsum("bnd,bmd->bnm", x["q"], x["k"])
            out = jnp.einsum("bnm,bmd->bnd", jax.nn.softmax(scores), x["k"])
        with jax.named_scope("norm"):
            out = out - out.mean(-1, keepdims=True)
            out = out * jax.lax.rsqrt((out * out).mean(-1, keepdims=True))

        def step(y: Any, _: None) -> tuple[Any, None]:
            return y @ params["w"], None

        return jax.lax.scan(step, out, length=3)[0]

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    made = Workload("w", run, {"w": shape(8, 8)}, {"q": shape(2, 50, 8), "k": shape(2, 30, 8)}, 1, "")
    tokens, keys = 2 * 50 * 8, 2 * 30 * 8
    found = least_bytes(made)
    assert found["attention"] == 4 * (tokens + keys + keys + tokens)
    assert found["norms"] == 4 * 2 * tokens
    assert found["products"] == 4 * 3 * (tokens + 8 * 8 + tokens)
    assert found["convolutions"] == found["collectives"] == found["copies"] == found["rest"] == 0


def test_the_full_network_by_hand() -> None:
    (unet,) = workloads("unet", size_of("full"), "bf16", 1)
    found = least_bytes(unet)
    # At each of three sizes 5 transformers, at the fourth one; in each 2 of 3 attentions among many tokens or
    # frames move 4 activations, those to the audio 2 (and 14 keys).
    activations = [14 * (64 // 2**level) ** 2 * 320 * min(2**level, 4) for level in range(4)]
    by_hand = 2 * sum(n * (2 * 4 + 2 * 2) * a for n, a in zip((5, 5, 5, 1), activations, strict=True))
    assert found["attention"] == pytest.approx(by_hand, rel=0.02)
    weights = 2 * sum(np.prod(p.shape) for n, p in unet.params.items() if n.endswith("kernel"))
    assert found["products"] + found["convolutions"] > weights


def test_the_table_says_whether_it_fits() -> None:
    cost = dict.fromkeys(KINDS, Cost(1e12, 2e9, 1e9))
    made = Ahead(
        "unet", "a window", "TPU v5 lite", Chip(197e12, 819e9, 16 * 2**30), 3.0, 2**30, 0, 20 * 2**30, 0,
        cost, dict.fromkeys(KINDS, 1e-3), dict.fromkeys(KINDS, 5e8), [],
    )  # fmt: skip
    text = table(made)
    assert "alone: arithmetic 35.5 ms, HBM 8.55 ms; the limit: arithmetic" in text
    assert "does not fit in 16 GiB" in text
    assert [line.split() for line in text.splitlines() if line.startswith("all")] == [
        ["all", "7", "14", "7", "3.5", "7"]
    ]


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu (the extra tpu) is not installed")
def test_a_tiny_vae_for_a_v5e(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "vae.json"
    assert main(["bench", "vae", "--aot", "v5e:2x2", "--dtype", "bf16", "--json", str(report)]) == 0
    assert "fits in 16 GiB" in capsys.readouterr().out
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows] == ["vae encode", "vae decode"]
    for row, workload in zip(rows, workloads("vae", size_of("tiny"), "bf16", 1), strict=True):
        assert row["counted"]["convolutions"]["flop"] > 0
        assert sum(kind["bytes"] for kind in row["counted"].values()) > sum(least_bytes(workload).values())
    assert main(["bench", "vae", "--aot", "v99:2x2"]) == 2
    assert "cannot compile for the topology v99:2x2" in capsys.readouterr().err
