"""Numerical parity with the PyTorch reference: every entry of a golden file beside what we compute for it.

The weights of a golden file (`golden`) go through the converter, so the table is proven with the
network. One network is in memory at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.errors import UserError
from keysync_jax.parity.bounds import Bounds, distance, kind_of
from keysync_jax.parity.clip import ClipRun
from keysync_jax.parity.golden import Golden
from keysync_jax.parity.ours import PRODUCTS, StageNetwork, VAENetwork
from keysync_jax.typing import Array


@dataclass(frozen=True)
class Comparison:
    """One entry. Every distance is the largest absolute difference over the entry's scale (`bounds.scales`).

    Attributes:
      error: from the exact numbers where there are some, else from the reference's own.
      difference: from the reference's own.
      floor: the reference's own distance from the exact numbers; None where there are none.
      bound: that `error` may have.
    """

    entry: str
    error: float
    difference: float
    floor: float | None
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for a NaN

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.bound)


def compare(prefix: str | Path, dtype: str | Mapping[str, str] = "fp32") -> Iterator[Comparison]:
    """Runs every entry of a golden file, network after network, in the order in which they are computed.

    Args:
      prefix: path without `.manifest.json` and `.safetensors`.
      dtype: one of `ours.DTYPES`, or one for each network; of the computation, as `dub` and `train` compute.

    Raises:
      UserError: a file is missing, an entry is none that this program knows, or tf32 without a GPU.
    """
    if "tf32" in ([dtype] if isinstance(dtype, str) else dtype.values()):
        check_tf32()
    golden = Golden(prefix)
    for entry in golden.stored:
        if "/in/" not in entry and not kind_of(entry):
            raise UserError(f"{golden.stored.path}: entry {entry!r} is none that this program can run")
    runners: dict[str, Callable[[str], Callable[[str], Array]]] = {
        "keyframe": lambda dtype: StageNetwork(golden, "keyframe", dtype),
        "interpolation": lambda dtype: StageNetwork(golden, "interpolation", dtype),
        "vae": lambda dtype: VAENetwork(golden, dtype),
        "clip": lambda _: ClipRun(golden, names),
    }
    names = dict.fromkeys(runners, dtype) if isinstance(dtype, str) else dtype
    for network, make in runners.items():
        if entries := golden.outputs(network):
            name = names[network]
            yield from _compared(golden, make(name), entries, name)


def check_tf32() -> None:
    """Refuses what a device would quietly compute in fp32."""
    if jax.default_backend() != "gpu":
        raise UserError(f"tf32 is a way in which GPUs multiply; JAX computes on {jax.default_backend()} here")


def first_parting(comparisons: Iterable[Comparison]) -> Comparison | None:
    """The first entry, in the order of the computation, that is beyond its bound."""
    return next((c for c in comparisons if not c.ok), None)


def _compared(
    golden: Golden, run: Callable[[str], Array], entries: list[str], dtype: str
) -> Iterator[Comparison]:
    bounds = Bounds(golden, entries, dtype, "cuda" if jax.default_backend() == "gpu" else "cpu")
    for entry in entries:
        with computing(PRODUCTS[dtype]):
            ours = np.asarray(run(entry.partition("/")[2]), np.float32)
        reference = golden.stored[entry]
        if ours.shape != reference.shape:
            raise UserError(
                f"{entry}: the reference has shape {reference.shape}, the manifest's {ours.shape}"
            )
        difference = distance(ours, reference, bounds.scales[entry])
        exact = golden.exact.get(entry)
        error = difference if exact is None else distance(ours, exact, bounds.scales[entry])
        yield Comparison(entry, error, difference, bounds.floor(entry), bounds[entry])
