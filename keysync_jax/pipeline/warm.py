"""Compiling what a dub runs before there is anything to dub."""

from keysync_jax.model import Model
from keysync_jax.pipeline.devices import local_devices
from keysync_jax.pipeline.dub import DubSettings, sampling_of
from keysync_jax.pipeline.memory import batches
from keysync_jax.pipeline.phases import Phases
from keysync_jax.pipeline.programs import Compiling, programs
from keysync_jax.pipeline.windows import make_plan, padded_length


def warm(
    model: Model, settings: DubSettings | None = None, frames: int = 1500, show_progress: bool = False
) -> Phases:
    """Compiles the programs of a dub, into the store of compiled programs where there is one.

    Of the settings those count that programs depend on: steps, dtype, memory, windows_per_call and devices.

    Args:
      model: of which the config alone is read.
      frames: of the dubs to come; it matters where they have fewer windows than there is room for, in all
        devices' calls together.

    Returns:
      One phase, "compiling", with what was compiled and not found.
    """
    settings, phases = settings or DubSettings(), Phases(show=show_progress)
    config, dtype = model.config, settings.compute_dtype
    sizes = batches(settings.memory, config, dtype, settings.windows_per_call)
    sampling = sampling_of(config, settings, local_devices(settings.devices), sizes)
    wanted = programs(
        config,
        dtype,
        sampling,
        sizes.frames,
        make_plan(padded_length(frames)),
        decoder=settings.component(config),
    )
    count = sum(map(len, wanted.values()))
    with (
        phases.phase("compiling", count, "programs") as advance,
        Compiling(wanted, dtype) as compiling,
    ):
        for phase, lowers in wanted.items():
            compiling.wait(phase)
            advance(len(lowers))
    return phases
