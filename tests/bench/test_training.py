"""The training step at several settings."""

import dataclasses
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import jax
import pytest

from keysync_jax.bench import training
from keysync_jax.bench.measure import Timing
from keysync_jax.bench.sizes import size_of
from keysync_jax.bench.training import (
    VARIED,
    Setting,
    Trained,
    base_config,
    measure_step,
    measured_apart,
    mesh_settings,
    settings_of,
    train_table,
)
from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.train.flops import step_flops
from keysync_jax.train.step import make_stage
from tests.train.smallest_config import smallest


def test_each_change_stands_alone() -> None:
    base = base_config(size_of("full"), "bf16", 32)
    found = settings_of(base, [*VARIED, "remat=block", "remat=none;loss.pixel=none"])
    # A change to what is so already is no other setting.
    assert [s.name for s in found] == ["as it is", *VARIED, "remat=none;loss.pixel=none"]
    by_name = {setting.name: setting.config for setting in found}
    assert by_name["as it is"] == base
    assert (base.remat, base.loss.pixel, base.batch_size) == ("block", "l2", 32)
    assert by_name["remat=none"] == dataclasses.replace(base, remat="none")
    assert by_name["optimizer.accumulate=4"].optimizer.accumulate == 4
    both = by_name["remat=none;loss.pixel=none"]
    assert (both.remat, both.loss.pixel) == ("none", "none")
    with pytest.raises(UserError, match="unknown key 'rematt', did you mean 'remat'"):
        settings_of(base, ["rematt=none"])


def test_a_step_is_compiled_timed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "nothing_stored", nullcontext)
    config = smallest()
    row = measure_step(Setting("as it is", config), 2)
    assert row.fault == ""
    assert row.timing is not None
    assert row.timing.calls == 2
    assert row.flop == step_flops(config, *shapes(make_stage(config)))
    assert row.clips_per_second == pytest.approx(config.batch_size / row.timing.median)
    # Parameters, frozen ones and both moments in fp32 are the arguments, but for a batch.
    wanted = shapes(make_stage(config))[1]
    assert row.arguments > 4 * sum(x.size for x in wanted.values())
    assert row.temporaries > 0
    assert (row.devices, row.peak, row.share_of_peak) == (jax.device_count(), None, None)


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 90 GiB\nmore")

    monkeypatch.setattr(training, "state_from", too_large)
    monkeypatch.setattr(training, "compiled", lambda lower: (None, 1.0))
    row = measure_step(Setting("remat=none", smallest()), 2)
    assert row.timing is None
    assert row.fault == "does not fit: RESOURCE_EXHAUSTED: Out of memory allocating 90 GiB"
    assert "remat=none              does not fit" in train_table([row])


def test_a_setting_whose_process_is_killed_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def __init__(self, *_: object):
            pass

        def __enter__(self) -> "Killed":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, task: tuple[Setting, int]) -> Future[Trained]:
            done: Future[Trained] = Future()
            if task[0].name == "as it is":
                done.set_exception(OSError("a worker process was killed"))
            else:
                done.set_result(Trained(task[0].name, "", "cpu", 1))
            return done

    monkeypatch.setattr(training, "Workers", Killed)
    settings = settings_of(smallest(), ["remat=block"])
    rows = measured_apart(settings, 3)
    assert [row.fault for row in rows] == ["a worker process was killed", ""]


def test_the_table_by_hand() -> None:
    timing = Timing(0.5, 0.4, 0.6, 3)
    row = Trained(
        "as it is", "2 clips", "TPU v5", 4, 9.5, timing, 2, 10**13, 1e14, 2**30, 2**31, 3 * 2**30, 2**29
    )
    line = train_table([row], {"as it is": 1.0}).splitlines()[1]
    assert line.split()[3:] == [
        *("9.5", "0.5000", "0.4000-0.6000", "4.00", "10", "20", "20.0%", "1.00", "2.00", "3.00", "0.50"),
        *("1.0000", "0.50"),
    ]


def test_a_mesh_in_words() -> None:
    assert mesh_settings("data=2,fsdp=8") == ["mesh.data=2", "mesh.fsdp=8"]
    with pytest.raises(UserError, match="write the axes as data=N,fsdp=N"):
        mesh_settings("2x8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["unet", "--vary", "remat=none"], "--vary goes with bench train"),
        (["train", "--size", "mid", "--config", "x.py"], "give one"),
        (["train", "--config", "absent.py", "--against", "torch"], "is for the networks, not for train"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    assert sentence in capsys.readouterr().err
