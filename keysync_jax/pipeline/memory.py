"""How much of a device's memory a dub takes: the sizes of its calls."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import numpy as np

from keysync_jax.config import Dtype, ModelConfig
from keysync_jax.errors import UserError
from keysync_jax.pipeline.latents import FRAMES_PER_CALL

Memory = Literal["small", "balanced", "fast"]
"""small: as little as can be, branches of the guidance in turn and one frame a call of the VAE.
balanced: one window a call, and frames that fit half of the free memory.
fast: windows and frames that fit most of it."""

SHARES: dict[Memory, float] = {"balanced": 0.5, "fast": 0.8}
"""Of the free memory, that a call may take."""

MOST_FRAMES, MOST_WINDOWS = 16, 8
"""From which a larger call is no quicker."""

DECODE_BYTES = 1.5 * 2**30
"""Device memory of a 512 x 512 frame while it is decoded, of all that the VAE does the most; as the area."""

WINDOW_BYTES = 2.0 * 2**30
"""Device memory of a full-size window of 64 x 64 latents while it is sampled, three branches at once in bf16;
as the area and the width of the U-Net's first level (320)."""


@dataclass(frozen=True)
class Batches:
    """Sizes of the calls.

    Attributes:
      windows, frames: that each device takes in a call of the sampler, and of the VAE.
      in_turn: whether a window's branches are computed one after another.
    """

    windows: int
    frames: int
    in_turn: bool


def check_memory(memory: str) -> None:
    """Refuses what is no `Memory`."""
    if memory not in get_args(Memory):
        raise UserError(f"the memory is {', '.join(get_args(Memory))}, not {memory}")


def batches(memory: Memory, config: ModelConfig, dtype: Dtype, windows: int | None = None) -> Batches:
    """Sizes of the calls on the devices as they are now.

    They are powers of two, so that runs of about the same free memory have the same programs. A device that
    does not tell its memory (a CPU) is given the same in "fast" as in "balanced".

    Args:
      windows: of a call, where they are given.
    """
    if memory == "small":
        return Batches(windows or 1, 1, True)
    free = _free_bytes()
    if free is None:
        return Batches(windows or 1, FRAMES_PER_CALL, False)
    frame = DECODE_BYTES * (config.crop_size / 512) ** 2
    frames = _fitting(SHARES[memory] * free, frame, MOST_FRAMES)
    stage = config.interpolation
    window = WINDOW_BYTES * (stage.latent_size / 64) ** 2 * stage.unet.block_out_channels[0] / 320
    window *= 1 if dtype == "bf16" else 2
    most = _fitting(SHARES[memory] * free, window, MOST_WINDOWS) if memory == "fast" else 1
    return Batches(windows or most, frames, False)


def _free_bytes() -> int | None:
    """Of the first device; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def _fitting(free: float, each: float, most: int) -> int:
    return 2 ** int(np.log2(np.clip(free / each, 1, most)))
