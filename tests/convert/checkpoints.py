"""Writes checkpoints in the containers of the PyTorch release; the tests' counterpart of its savers."""

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


def to_torch(tensors: Mapping[str, np.ndarray]) -> "OrderedDict[str, Any]":
    """numpy arrays (bfloat16 too) -> torch tensors, bit for bit, each with memory of its own."""
    import torch

    def convert(x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.tensor(x.view(np.int16)).view(torch.bfloat16)
        return torch.tensor(x)

    return OrderedDict((name, convert(x)) for name, x in tensors.items())


def save_bare(path: Path, tensors: Mapping[str, np.ndarray], **options: Any) -> Path:
    """A `.bin` or `.pt` that is the state dict itself."""
    return _save(path, to_torch(tensors), **options)


def save_lightning(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A `.ckpt` of Lightning: the tensors under `state_dict` amid the training state."""
    state = {
        "epoch": 3,
        "global_step": 60_000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": to_torch(tensors),
        "optimizer_states": [{"state": {0: {"exp_avg": to_torch({"m": np.zeros(3, np.float32)})["m"]}}}],
        "callbacks": {"ModelCheckpoint": {"best_model_path": "", "best_k_models": {}}},
        "hparams_name": "kwargs",
    }
    return _save(path, state)


def save_deepspeed(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A `.pt` as DeepSpeed's engine writes its model states through Lightning."""
    import torch

    module = to_torch({"_forward_module." + name: x for name, x in tensors.items()})
    state = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, torch.Size(x.shape)) for name, x in module.items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 60_000,
        "dp_world_size": 32,
        "ds_config": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        "ds_version": "0.14.4",
        "args": argparse.Namespace(local_rank=0),
    }
    return _save(path, state)


def save_microsoft(path: Path, tensors: Mapping[str, np.ndarray], cfg: Mapping[str, Any]) -> Path:
    """A `.pt` in the layout of Microsoft's WavLM."""
    return _save(path, {"cfg": dict(cfg), "model": to_torch(tensors)})


def _save(path: Path, content: Any, **options: Any) -> Path:
    import torch

    torch.save(content, path, **options)
    return path
