"""How far our numbers may be from the reference's: a stated multiple of how far its own precision takes it.

The floor of an entry is the distance between the reference in a precision and the reference in fp64. A live
run measures every entry's. For golden files without exact numbers `floors.json` holds the largest of each
kind that `keysync parity --reference ... --floors FILE` measured.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from keysync_jax.files import write_json
from keysync_jax.parity.golden import Golden

MULTIPLE = 4
"""Bound over floor; in fp32 ours were at most 2.4 times as far from the exact numbers as the release's."""

_HALF = {"cond": 2e-2, "network": 5e-2, "denoised": 5e-2, "sample": 1e-1, "loss": 2e-2}
_HALF |= {"grad": 1e-1, "vae": 5e-2, "clip": 1e-1}
CEILINGS: dict[str, dict[str, float]] = {
    "fp32": {"cond": 1e-4, "network": 1e-4, "denoised": 1e-4, "sample": 1e-3}
    | {"loss": 1e-5, "grad": 1e-3, "vae": 1e-4, "clip": 1e-3},
    **dict.fromkeys(("tf32", "bf16", "fp16"), _HALF),
}
"""What golden files are held to at most: bounds from before floors were measured; of a clip, sampling's."""

ROUNDING = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Unit roundings; no floor is below what writing a number down costs."""

LARGE = 1000
"""Numbers from which an array's largest error is no matter of luck; smaller ones take their kind's floor."""

VANISHING = 1e-6
"""Share of the largest gradient below which one is nothing but rounding; true ones were above 1e-5 of it."""

FLOORS = Path(__file__).parent / "floors.json"
"""What was measured: size, device, precision -> kind -> floor."""

_NAMES = {
    "out/network": "network",
    "out/sample_audio_ref": "sample",
    "out/sample_cfg": "sample",
    "out/train_loss": "loss",
    "train/loss": "loss",
    "train/loss_latent": "loss",
    "train/loss_pixel": "loss",
    "cond/concat": "cond",
    "cond/crossattn": "cond",
    "uncond/concat": "cond",
    "uncond/crossattn": "cond",
}


def kind_of(entry: str) -> str:
    """The kind of an entry `network/group/name`, empty if it is none that we know."""
    network, _, rest = entry.partition("/")
    group, _, name = rest.partition("/")
    if network == "vae":
        known = group in ("block", "layer") or name == "moments" or name.startswith("decoded_t")
        return "vae" if known else ""
    if network == "clip":
        return "clip" if group == "out" else ""
    if network not in ("keyframe", "interpolation"):
        return ""
    if group == "grad" or rest.startswith("train/grad/"):
        return "mix" if name.endswith("mix_factor") else "grad"
    if rest.startswith("out/denoised_"):
        return "denoised"
    return group if group in ("block", "layer", "step") else _NAMES.get(rest, "")


@cache
def stored_floors(device: str = "cpu") -> dict[str, dict[str, float]]:
    """Precision -> kind -> the largest floor that was measured on a device; empty if none was."""
    floors: dict[str, dict[str, float]] = {}
    for measured in json.loads(FLOORS.read_text()):
        if measured["device"] != device:
            continue
        for precision, kinds in measured["floors"].items():
            known = floors.setdefault(precision, {})
            known |= {kind: max(floor, known.get(kind, 0.0)) for kind, floor in kinds.items()}
    return floors


def write_floors(path: Path, size: str, device: str, floors: dict[str, dict[str, float]]) -> None:
    """Puts what was measured at a size and on a device into a file like `FLOORS`, beside what is there."""
    before = json.loads(path.read_bytes()) if path.is_file() else []
    others = [m for m in before if (m["size"], m["device"]) != (size, device)]
    write_json(path, [*others, {"size": size, "device": device, "floors": floors}])


def scales(arrays: Mapping[str, np.ndarray], entries: Iterable[str]) -> dict[str, float]:
    """What errors of entries are relative to: the array's largest absolute value.

    A gradient that is nothing but rounding (that of a bias before a norm over each channel alone: in exact
    arithmetic it is 0) is measured by the largest gradient of its network.
    """
    found = {entry: float(np.abs(arrays[entry]).max()) for entry in entries}
    groups: dict[str, float] = {}
    for entry, scale in found.items():
        if kind_of(entry) in ("grad", "mix"):
            group = entry.partition("grad/")[0]
            groups[group] = max(scale, groups.get(group, 0.0))
    for entry, scale in found.items():
        largest = groups.get(entry.partition("grad/")[0], 0.0)
        if kind_of(entry) in ("grad", "mix") and scale < VANISHING * largest:
            found[entry] = largest
    return {entry: scale or 1.0 for entry, scale in found.items()}


def distance(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """The largest absolute difference over a scale."""
    return float(np.abs(a - b).max()) / scale


class Bounds:
    """The bounds of a network's entries, relative to their `scales`.

    A mixing factor's gradient is a single number in which nearly everything cancels: in half precision its
    error has no relation to its size, and it has no bound. Nor has any gradient in fp16, which underflows
    without a scaled loss; the release trains in 32 bits and bf16.
    """

    def __init__(self, golden: Golden, entries: Collection[str], dtype: str, device: str = "cpu"):
        network = next(iter(entries), "").partition("/")[0]
        self.dtype, self.device = dtype, device
        self.sizes = {e: math.prod(golden.stored.shapes[e]) for e in entries}
        self.scales = scales(golden.exact or golden.stored, entries)
        # A floor is one precision's; what the reference computed in another says nothing of it.
        alike = golden.exact and golden.precision.get(network, "fp32") == dtype
        self.exact = bool(golden.exact)
        self.floors = {
            e: distance(golden.stored[e], golden.exact[e], self.scales[e]) for e in entries if alike
        }
        self.largest = largest_floors(self.floors)

    def floor(self, entry: str) -> float | None:
        """The measured one, if there is one."""
        return self.floors.get(entry)

    def __getitem__(self, entry: str) -> float:
        kind = kind_of(entry)
        if (kind == "mix" and self.dtype in ("bf16", "fp16")) or (kind == "grad" and self.dtype == "fp16"):
            return math.inf
        if entry not in self.floors:
            return stored_bound(kind, self.dtype, self.device, self.exact)
        floor = self.floors[entry] if self.sizes[entry] >= LARGE else self.largest[kind]
        return MULTIPLE * max(floor, ROUNDING[self.dtype])


def stored_bound(kind: str, dtype: str, device: str, exact: bool = False) -> float:
    """The bound of a kind of entry from stored floors; none (infinity) of a kind that has none there.

    In fp32 a device's own, whose algorithms (Winograd's, say) decide; where it has none, the ceiling counts.

    Args:
      exact: of the distance from exact numbers, as the floor is; else the ceiling counts too.
    """
    ceiling = CEILINGS[dtype].get(kind, math.inf)
    floors = stored_floors(device)
    if not floors and dtype == "fp32" and math.isfinite(ceiling):
        return ceiling
    floor = (floors or stored_floors())[dtype].get(kind, math.inf)
    bound = MULTIPLE * max(floor, ROUNDING[dtype])
    return bound if exact else min(bound, ceiling)


def largest_floors(floors: Mapping[str, float]) -> dict[str, float]:
    """Entry -> floor, to kind -> the largest."""
    largest: dict[str, float] = {}
    for entry, floor in floors.items():
        largest[kind_of(entry)] = max(floor, largest.get(kind_of(entry), 0.0))
    return largest
