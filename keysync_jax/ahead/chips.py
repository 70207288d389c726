"""Accelerators by their makers' sheets, and the chips of machines that are not here."""

import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from keysync_jax.errors import UserError
from keysync_jax.extras import require

GIB = 2**30

PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)
"""(words of `device_kind`, operations a second): dense bf16, from the makers' data sheets."""


def device_peak(kind: str) -> float | None:
    """Operations a second that one device can do in bf16; None where it is not known.

    Args:
      kind: `jax.devices()[0].device_kind`.
    """
    words = re.split(r"[^a-z0-9]+", kind.lower())
    for name, peak in PEAKS:
        if all(word in words for word in name.lower().split()):
            return peak
    return None


@dataclass(frozen=True)
class Chip:
    """One accelerator by its maker's sheet.

    Attributes:
      peak: bf16 operations a second.
      bandwidth: bytes a second of HBM.
      hbm: bytes of HBM.
      link: bytes a second that one link to a neighbouring chip carries one way; 0 where it is not known.
      ring: chips along a side from which the last one is the first one's neighbour too, in machines of two
        dimensions; in those of three every side must be a multiple of it. 0: never.
      dcn: bytes a second that a chip's share of its data centre's network carries one way; 0 where it is not
        known.
    """

    peak: float
    bandwidth: float
    hbm: int
    link: float = 0.0
    ring: int = 0
    dcn: float = 0.0


SHEETS = {
    "TPU v4": (1228e9, 32 * GIB, 50e9, 4, 0.0),
    "TPU v5 lite": (819e9, 16 * GIB, 50e9, 16, 3.125e9),
    "TPU v5e": (819e9, 16 * GIB, 50e9, 16, 3.125e9),
    "TPU v5": (2765e9, 95 * GIB, 100e9, 4, 6.25e9),
    "TPU v5p": (2765e9, 95 * GIB, 100e9, 4, 6.25e9),
    "TPU v6 lite": (1638e9, 32 * GIB, 100e9, 16, 12.5e9),
    "TPU v6e": (1638e9, 32 * GIB, 100e9, 16, 12.5e9),
}
"""`device_kind` -> HBM's bytes a second and size, a link's bytes a second, chips of a ring, and what a chip's
share of the network between slices carries, bytes a second.

From the maker's documentation, which gives the links of a chip together and both ways: 400 GB/s over 4 links
(v5e), 800 over 4 (v6e), 1200 over 6 (v5p), 600 over 6 (v4). Between slices it gives 25 Gb/s a chip (v5e), 50
(v5p) and 100 (v6e).
"""


_WITHOUT_A_CHIP = {
    # Outside of Google's cloud libtpu would ask its metadata server for minutes, then complain of no answer.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A chip belongs to one process, a compiler to as many as like.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology(name: str, slices: int = 1) -> Any:
    """The chips of a machine that is not here.

    Args:
      name: "v5e:2x2", "v6e:2x2", "v5p:2x2x1" and so on: generation, and chips along each side.
      slices: how many such machines there are, joined by the network of their data centre.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      UserError: it is no TPU's name, libtpu knows no such machine, or could not be started.
    """
    if re.match(r"(v\d|tpu)", name) is None:
        raise UserError(
            f"cannot compile for the topology {name}: it is no TPU's (v5e:4x8, v5p:2x2x4, v6e:4x8 ...); "
            "--dry-run --devices N counts what a run keeps on any devices"
        )
    require("libtpu")
    for variable, value in _WITHOUT_A_CHIP.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, **({"num_slices": slices} if slices > 1 else {})
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"cannot compile for the topology {name} ({first_line(error)})") from error


def chip_of(kind: str) -> Chip:
    """The sheet of a device kind.

    Raises:
      UserError: it is not known.
    """
    peak = device_peak(kind)
    if kind not in SHEETS or peak is None:
        raise UserError(f"nothing is known of the chip {kind}; known are {', '.join(sorted(SHEETS))}")
    return Chip(peak, *SHEETS[kind])


def first_line(error: Exception) -> str:
    """Of an exception's message."""
    return str(error).strip().splitlines()[0]
