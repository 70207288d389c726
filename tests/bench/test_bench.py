"""The benchmark: what it counts, what it compares, what it writes."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.bench import report
from keysync_jax.bench.measure import Measured, Timing, flop_of, fresh_store, measure
from keysync_jax.bench.sizes import SIZES, size_of
from keysync_jax.bench.torch_side import torch_call
from keysync_jax.bench.workloads import Workload, random_arrays, workloads
from keysync_jax.cli import main
from keysync_jax.errors import UserError

CONDITIONS = report.Conditions("tiny", "fp32", 1, "cpu", 2, {"jax": "0", "keysync_jax": "0"})


def product(n: int = 64) -> Workload:
    def run(params: Any, inputs: Any) -> Any:
        return inputs["x"] @ params["kernel"]

    shape = jax.ShapeDtypeStruct((n, n), jnp.float32)
    return Workload("product", run, {"kernel": shape}, {"x": shape}, 2, "a product")


def row(name: str = "unet", median: float = 0.5, other: float | None = None) -> Measured:
    theirs = None if other is None else Timing(other, other, other, 3)
    return Measured(
        name, "14 frames", 1.5, Timing(median, 0.4, 0.6, 3), 14, 10**12, 4e12, 2**30, 2**31, theirs
    )


def test_operations_and_rates_by_hand() -> None:
    assert flop_of(product(64)) == 2 * 64**3
    found = row(other=2.0)
    assert (found.frames_per_second, found.flop_per_second, found.share_of_peak) == (28, 2e12, 0.5)
    assert found.ratio == 0.25
    assert row().ratio is None


def test_the_full_network_has_the_known_work() -> None:
    """1.5 B parameters; about 17 TFLOP a window and branch."""
    (unet,) = workloads("unet", size_of("full"), "bf16", 1)
    assert flop_of(unet) / 1e12 == pytest.approx(17, rel=0.1)
    assert sum(np.prod(p.shape) for p in unet.params.values()) == pytest.approx(1.5257e9, rel=1e-3)


@pytest.mark.parametrize("size", ["tiny", "mid"])
@pytest.mark.parametrize("part", ["unet", "vae", "audio", "sampler"])
def test_every_part_can_be_run_at_every_size(part: str, size: str) -> None:
    for workload in workloads(part, SIZES[size], "bf16", 2):
        out = jax.eval_shape(workload.run, workload.params, workload.inputs)
        assert all(x.shape[0] == 2 for x in jax.tree.leaves(out))
        assert workload.frames >= 2


def test_with_little_memory_the_sampler_takes_branches_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "keysync_jax.bench.workloads"
    monkeypatch.setattr(f"{module}.sample_windows", lambda *_: "together")
    monkeypatch.setattr(f"{module}.sample_windows_in_turn", lambda *_: "in turn")
    for memory, how in (("balanced", "together"), ("small", "in turn")):
        (made,) = workloads("sampler", SIZES["tiny"], "bf16", 1, memory)
        assert made.run(made.params, made.inputs) == how
        assert made.note.endswith(" in turn") == (memory == "small")


def test_calls_take_turns_and_the_first_does_not_count() -> None:
    order = []

    def beside(arrays: dict[str, Any]) -> Any:
        np.testing.assert_array_equal(arrays["params"]["kernel"], random_arrays(product().params)["kernel"])

        def call() -> None:
            order.append("other")
            time.sleep(0.2 if len(order) == 1 else 0.01)

        return call

    found = measure(product(), 3, beside)
    assert len(order) == 4
    assert found.timing.calls == 3
    assert found.other is not None
    assert 0.01 <= found.other.median <= found.other.highest < 0.2
    assert found.device_bytes == 3 * 64 * 64 * 4
    assert found.compile_seconds > 0


@pytest.mark.parametrize("name", ["vae encode", "vae decode"])
def test_pytorch_does_the_same_work(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    size = size_of("tiny")
    workload = next(w for w in workloads("vae", size, "fp32", 1) if w.name == name)
    params, inputs = random_arrays(workload.params), random_arrays(workload.inputs, seed=1)
    ours = np.asarray(jax.jit(workload.run)(params, inputs)).squeeze()
    theirs = torch_call(workload, size, "fp32", False)({"params": params, "inputs": inputs})()
    theirs = np.moveaxis(getattr(theirs, "sample", theirs).numpy(), 1, -1).squeeze()
    if name == "vae decode":  # Ours takes scaled latents.
        raw = {"latents": inputs["latents"] * np.float32(size.vae.scale_factor)}
        ours = np.asarray(jax.jit(workload.run)(params, raw)).squeeze()
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_a_report_is_compared_with_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    report.save(path, CONDITIONS, [row(median=1.0), row("sampler")])
    earlier = report.read(path)
    report.check(earlier, CONDITIONS)
    now = [row(), row("vae encode")]
    assert report.comparable(earlier, now) == {"unet": 1.0}
    assert report.comparable(earlier, [dataclasses.replace(row(), note="13 frames")]) == {}
    text = report.table(CONDITIONS, now, report.comparable(earlier, now))
    assert "1.0000   0.50" in text
    assert text.count(" -") >= 1
    other = report.Conditions("tiny", "bf16", 1, "cpu", 2, {})
    with pytest.raises(UserError, match="was measured with dtype fp32, this run with bf16"):
        report.check(earlier, other)
    path.write_text(json.dumps({"format": "x"}))
    with pytest.raises(UserError, match="not a report of keysync bench"):
        report.read(path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["vea"], "there is nothing named vea to measure"),
        (["--size", "huge"], "there is no size huge"),
        (["--batch", "0"], "--batch takes 1 or more"),
        (["--repeats", "0"], "--repeats takes 1 or more"),
        (["--torch-compile"], "goes with --against torch"),
        (["unet", "--memory", "small"], "--memory goes with bench sampler and bench dub"),
        (["--against", "absent.json"], "absent.json: cannot be read as a report"),
    ],
)
def test_bad_arguments_get_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_fresh_store_has_each_program_once_and_leaves_the_settings(tmp_path: Path) -> None:
    def program(x: jax.Array) -> jax.Array:
        return jnp.sin(x) @ x.T + 3.25

    before = jax.config.jax_compilation_cache_dir
    found = []
    jax.clear_caches()  # What other tests compiled would not be compiled again.
    with fresh_store(tmp_path):
        for _ in range(2):
            jax.jit(program)(jnp.ones((3, 5)))
            found.append({path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")})
            jax.clear_caches()
    assert len([name for name in found[0] if name.startswith("jit_program")]) == 1
    assert found[0] == found[1]
    assert jax.config.jax_compilation_cache_dir == before
