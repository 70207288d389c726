"""The training step compiled for chips that are not here."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from keysync_jax.ahead.program import TooLargeError, compiled
from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.train.ahead import savings, step_ahead, step_shapes
from keysync_jax.train.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.mesh import make_mesh
from keysync_jax.train.sharding import _jitted
from keysync_jax.train.step import init_state
from tests.train.smallest_config import smallest

CONFIG = str(Path(__file__).parent / "smallest_config.py")
HAS_LIBTPU = find_spec("libtpu") is not None


def for_four(**settings: object) -> TrainConfig:
    return dataclasses.replace(smallest(), batch_size=4, **settings)  # type: ignore[arg-type]


def test_what_does_not_fit_names_the_settings_that_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise TooLargeError("Used 20.1G of 15.75G hbm")

    monkeypatch.setattr("keysync_jax.train.ahead.compiled", too_large)
    with pytest.raises(UserError) as error:
        step_ahead(for_four(mesh=MeshConfig(fsdp=2)), [jax.devices("cpu")[0]] * 4)
    assert str(error.value) == (
        "the step does not fit 4 x cpu: Used 20.1G of 15.75G hbm; it may fit with dtype=bf16, "
        "or remat=block, or remat=layer, or mesh.fsdp=4"
    )


def test_only_settings_that_are_not_so_yet_are_named() -> None:
    frugal = for_four(dtype="bf16", remat="layer", mesh=MeshConfig(data=1, fsdp=-1))
    assert savings(frugal, 4) == ["mesh.height=2 on 8 chips"]
    assert savings(dataclasses.replace(frugal, mesh=MeshConfig(fsdp=-1, height=4)), 16) == [
        "more than 16 chips"
    ]
    lavish = dataclasses.replace(
        frugal, batch_size=8, loss=LossConfig(pixel="l2"), optimizer=OptimizerConfig(ema=0.99)
    )
    assert savings(lavish, 4) == [
        "a smaller batch_size with optimizer.accumulate",
        "optimizer.ema=0",
        "loss.pixel=none",
    ]


def test_other_faults_of_the_compiler_are_not_taken_for_too_little_memory() -> None:
    class Lowered:
        def __init__(self, message: str):
            self.message = message

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(self.message)

    with pytest.raises(TooLargeError, match=r"^much$"):
        compiled(lambda: Lowered("RESOURCE_EXHAUSTED: much.\nand a table"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiled(lambda: Lowered("INTERNAL: a fault"))


def test_the_decoder_is_gathered_before_it_computes() -> None:
    """Its weights are less than its activations, which a step would send from chip to chip otherwise."""
    config = dataclasses.replace(smallest(), loss=LossConfig(pixel="l2"))
    mesh = make_mesh(config.mesh, config.batch_size, jax.devices()[:1])
    step, params, batch = step_shapes(config)
    state = jax.eval_shape(lambda params: init_state(config, params), params)
    jitted, _ = _jitted(mesh, step, state)
    traced = str(jax.make_jaxpr(jitted)(state, step.aids, batch))
    assert traced.count(" sharding_constraint") == len(step.aids["vae"]) > 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--topology", "v5e:2x2", "--workdir", "w"], "--topology goes with --dry-run"),
        (["--topology", "v5e:2x2", "--dry-run", "--devices", "4"], "both say how many devices there are"),
        (["--slices", "2", "--dry-run"], "--slices goes with --topology"),
        (["--slices", "2", "--workdir", "w"], "--slices goes with --dry-run --topology"),
    ],
)
def test_a_topology_is_for_the_dry_run(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", CONFIG, *options]) == 2
    assert sentence in capsys.readouterr().err


def test_without_libtpu_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("keysync_jax.extras.find_spec", lambda _: None)
    assert main(["train", "--config", CONFIG, "--dry-run", "--topology", "v5e:2x2"]) == 2
    assert "keysync train --dry-run --topology needs libtpu" in capsys.readouterr().err


def test_a_topology_is_of_tpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", CONFIG, "--dry-run", "--topology", "h100:8"]) == 2
    assert "cannot compile for the topology h100:8: it is no TPU's (v5e:4x8," in capsys.readouterr().err


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu (the extra tpu) is not installed")
def test_the_smallest_step_for_four_chips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "step.json"
    options = ["--dtype", "bf16", "--aot", "v5e:2x2", "--mesh", "data=2,fsdp=2", "--json", str(report)]
    assert main(["bench", "train", "--config", CONFIG, *options]) == 0
    assert "fits in 16 GiB" in capsys.readouterr().out
    (row,) = json.loads(report.read_text())["rows"]
    assert row["devices"] == 4
    sent = row["played"]["traffic"]
    # Every device has half of each parameter, so all are gathered, and gradients summed over both axes.
    assert sent["all-gather"]["bytes"] > 0
    assert 0 < sent["all-reduce"]["waited"] <= sent["all-reduce"]["seconds"] * (1 + 1e-9)
    assert row["counted"]["convolutions"]["flop"] > 0
