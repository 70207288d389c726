"""Weights and inputs that follow from their names: the rule behind the golden numbers.

Every array is a function of its name and shape alone, so a parity test needs no stored weights.
Names are those of the PyTorch checkpoint, and shapes are in torch's order of axes.

| last part of the name | with x = `array(name, shape)` |
|---|---|
| `mix_factor`, `learned_mask` | x |
| `weight`, two axes or more | 0.7 x / sqrt(fan-in); fan-in: all axes but the first |
| `weight`, one axis (scale of a norm) | 1 + 0.1 x |
| anything else (bias) | 0.05 x |
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np


def array(name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 numbers from PCG64, seeded with the CRC-32 of the name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return rng.standard_normal(tuple(shape), dtype=np.float32)


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """One tensor of a checkpoint: float32, the scale by the table above."""
    x = array(name, shape)
    match name.rpartition(".")[2]:
        case "mix_factor" | "learned_mask":
            return x
        case "weight" if len(shape) >= 2:
            return x * np.float32(0.7 / math.sqrt(math.prod(shape[1:])))
        case "weight":
            return np.float32(1) + np.float32(0.1) * x
        case _:
            return np.float32(0.05) * x
