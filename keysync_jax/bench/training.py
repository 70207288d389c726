"""The training step at several settings: its time on the devices that are here, and the memory it takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from keysync_jax.ahead.chips import device_peak, first_line
from keysync_jax.ahead.program import TooLargeError, compiled
from keysync_jax.backend import computing
from keysync_jax.bench.measure import Timing, nothing_stored
from keysync_jax.bench.report import against
from keysync_jax.bench.sizes import Size
from keysync_jax.config import Dtype
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.pipeline.phases import peak_bytes
from keysync_jax.processes import CrashedError, Workers
from keysync_jax.train.ahead import summary
from keysync_jax.train.config import TrainConfig
from keysync_jax.train.config_file import with_settings
from keysync_jax.train.flops import batch_shapes, step_flops
from keysync_jax.train.mesh import mesh_of
from keysync_jax.train.sharding import lowered_step, place, place_batch, shardings, state_from
from keysync_jax.train.start import perceptual_shapes, random_weights, vae_shapes
from keysync_jax.train.step import init_state, make_stage, make_step

VARIED = (
    "remat=none",
    "remat=layer",
    "loss.pixel=none",
    "optimizer.accumulate=4",
    "optimizer.kind=muon",
    "optimizer.ema=0.999",
)
"""What is changed in turn, everything else as it is."""


@dataclass(frozen=True)
class Setting:
    """A run's settings, and what of them the row is about."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Trained:
    """One row of the table.

    Attributes:
      name: what was changed; "as it is" for the settings that the others differ from.
      note: the settings that time and memory depend on.
      timing: seconds of one batch; with `optimizer.accumulate` its share of an update. None where the step
        did not fit the device's memory.
      clips: of a batch, over all devices.
      flop: of a batch over all devices, without what is computed again.
      peak: bf16 operations a second of all devices together by their maker's sheet.
      arguments, temporaries: bytes on a device by the compiler's count; results lie where arguments did.
      device_bytes: peak of a device's memory; None where the platform does not tell.
      host_bytes: peak of the process.
    """

    name: str
    note: str
    device: str
    devices: int
    compile_seconds: float = 0.0
    timing: Timing | None = None
    clips: int = 0
    flop: int = 0
    peak: float | None = None
    arguments: int = 0
    temporaries: int = 0
    device_bytes: int | None = None
    host_bytes: int = 0
    fault: str = ""

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.timing.median if self.timing else 0.0

    @property
    def flop_per_second(self) -> float:
        return self.flop / self.timing.median if self.timing else 0.0

    @property
    def share_of_peak(self) -> float | None:
        return None if self.peak is None else self.flop_per_second / self.peak


def base_config(size: Size, dtype: Dtype, batch: int) -> TrainConfig:
    """The paper's settings at a size, but for the clips of a step."""
    return TrainConfig(size.stage, size.vae, batch_size=batch, dtype=dtype)


def devices_here() -> int:
    """How many devices this host has, found out by a process that does not keep them."""
    with Workers(_count_devices, 1) as workers:
        return workers.submit(None).result()


def _count_devices(_: None) -> int:
    return jax.device_count()


def settings_of(
    base: TrainConfig, varied: Sequence[str], given: Sequence[str] = (), name: str = "as it is"
) -> list[Setting]:
    """The config as it is, then with each change alone.

    Args:
      varied: `section.key=value`; several in one, `a=1;b=2`, are one change.
      given: the same, of all of them.
      name: of the row without a change.

    Raises:
      UserError: a change is none of the config's keys, or its value not of the key's type.
    """
    base = _with(base, given)
    changed = {change: _with(base, change.split(";")) for change in varied}
    return [
        Setting(name, base),
        *(Setting(change, config) for change, config in changed.items() if config != base),
    ]


def _with(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    changed = with_settings(config, settings)
    assert isinstance(changed, TrainConfig)
    return changed


def measured_apart(settings: Sequence[Setting], repeats: int) -> list[Trained]:
    """Measures each setting in a process of its own: peaks are its own, and one that fails harms no other.

    Nothing of this process may hold the devices.
    """
    rows = []
    for setting in settings:
        with Workers(_measured_task, 1) as workers:
            try:
                rows.append(workers.submit((setting, repeats)).result())
            except (CrashedError, OSError) as error:
                rows.append(Trained(setting.name, summary(setting.config), "", 0, fault=str(error)))
    return rows


def _measured_task(task: tuple[Setting, int]) -> Trained:
    return measure_step(*task)


def measure_step(setting: Setting, repeats: int) -> Trained:
    """Compiles and times the step of a run on all devices of this host, on random weights and a random batch.

    Args:
      repeats: timed updates, after one that is not.

    Raises:
      UserError: the batch or the mesh does not fit the devices.
    """
    config, device = setting.config, jax.devices()[0]
    where = (setting.name, summary(config), device.device_kind, jax.device_count())
    try:
        with computing(config.dtype), nothing_stored():
            return _measured(config, where, repeats)
    except (TooLargeError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, TooLargeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Trained(*where, fault=f"does not fit: {first_line(error)}")


def _measured(config: TrainConfig, where: tuple[str, str, str, int], repeats: int) -> Trained:
    mesh = mesh_of(config)
    graphdef, wanted = shapes(make_stage(config))
    vae = vae_shapes(config) if config.loss.pixel != "none" else None
    judge = perceptual_shapes(config)
    step, batch = make_step(config, graphdef, vae, judge), batch_shapes(config)
    abstract = jax.eval_shape(lambda params: init_state(config, params), wanted)
    program, seconds = compiled(lambda: lowered_step(mesh, step, abstract, batch))
    state = state_from(mesh, config, random_weights(wanted, config.seed))
    aids = {name: _like(random_weights(params, 0), params) for name, params in step.aids.items()}
    aids = place(aids, shardings(mesh, config.mesh, aids))
    rows = place_batch(mesh, _random_batch(batch))
    taken, calls = [], config.optimizer.accumulate
    for _ in range(repeats + 1):
        before = time.perf_counter()
        for _ in range(calls):
            state, metrics = program(state, aids, rows)
        jax.block_until_ready(metrics["loss"])
        jax.block_until_ready(state.step)
        taken.append((time.perf_counter() - before) / calls)
    memory, one = program.memory_analysis(), device_peak(where[2])
    return Trained(
        *where,
        seconds,
        Timing.of(taken[1:]),
        config.batch_size,
        step_flops(config, graphdef, wanted, vae, judge),
        None if one is None else one * where[3],
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        _peak_of_device(),
        peak_bytes(),
    )


def _like(arrays: dict[str, np.ndarray], wanted: Any) -> dict[str, np.ndarray]:
    return {path: x.astype(wanted[path].dtype) for path, x in arrays.items()}


def _random_batch(wanted: Any) -> Any:
    """Arrays of these shapes: latents and features normal, masks 0 or 1, pixels of any brightness."""
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if shape.dtype == np.uint8:
            most = 256 if shape.shape[-1] == 3 else 2
            return rng.integers(0, most, shape.shape, np.uint8)
        if shape.dtype == np.int32:
            return np.zeros(shape.shape, np.int32)
        return np.asarray(0.3 * rng.standard_normal(shape.shape, np.float32), shape.dtype)

    return jax.tree.map(draw, wanted)


def _peak_of_device() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def train_table(rows: Sequence[Trained], before: dict[str, float] | None = None) -> str:
    """Lines of text.

    Args:
      before: median seconds of an earlier report by the row's name.
    """
    heads = ("clips/s", "TFLOP", "TFLOP/s", "of peak", "args GiB", "temp GiB", "peak GiB", "host GiB")
    lines = [
        f"{'train':<24}{'compile s':>10}{'s a step':>10}{'spread':>16}"
        + "".join(f"{head:>10}" for head in heads)
        + ("" if before is None else f"{'before s':>10}{'ratio':>7}")
    ]
    for row in rows:
        t = row.timing
        if t is None:
            lines.append(f"{row.name:<24}{row.fault}")
            continue
        lines.append(
            f"{row.name:<24}{row.compile_seconds:>10.1f}{t.median:>10.4f}{f'{t.lowest:.4f}-{t.highest:.4f}':>16}"
            + "".join(f"{cell:>10}" for cell in cells(row))
            + ("" if before is None else against(before.get(row.name), t.median))
        )
    first = rows[0]
    return "\n".join([*lines, f"{first.name}: {first.note}; {first.devices} x {first.device}"])


def cells(row: Trained) -> list[str]:
    """What a row tells beside its times."""
    gib = [row.arguments, row.temporaries, row.device_bytes, row.host_bytes]
    return [
        f"{row.clips_per_second:.2f}",
        f"{row.flop / 1e12:.3g}",
        f"{row.flop_per_second / 1e12:.3g}",
        "-" if row.share_of_peak is None else f"{row.share_of_peak:.1%}",
        *("-" if size is None else f"{size / 2**30:.2f}" for size in gib),
    ]


def mesh_settings(text: str) -> list[str]:
    """`data=2,fsdp=8` as settings.

    Raises:
      UserError: it is not of this form.
    """
    parts = text.split(",")
    if not all(part.partition("=")[1] for part in parts):
        raise UserError(f"--mesh {text}: write the axes as data=N,fsdp=N")
    return [f"mesh.{part}" for part in parts]
