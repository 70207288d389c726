"""Weights of the networks that judge, by the rule that the golden numbers follow."""

import json
from pathlib import Path

import numpy as np

from keysync_jax.parity import rules


def syncnet_tensors(golden: Path) -> dict[str, np.ndarray]:
    """A state dict in the layout of `syncnet_v2.model`."""
    keys = json.loads((golden / "dev.syncnet.json").read_bytes())["keys"]
    return {key: by_rule(f"syncnet.{key}", tuple(shape)) for key, shape in keys.items()}


def by_rule(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor; a variance is positive, a count of batches zero."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return np.abs(rules.array(name, shape)) + np.float32(0.5)
    return rules.weight(name, shape)
