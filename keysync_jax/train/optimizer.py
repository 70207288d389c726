"""AdamW or Muon with warm-up, what it may move, and the moving average of the weights."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from keysync_jax.errors import UserError
from keysync_jax.train.config import OptimizerConfig
from keysync_jax.typing import Array, Params


def partition(config: OptimizerConfig, params: Params) -> tuple[dict[str, Array], dict[str, Array]]:
    """Splits a network's parameters by path into (trainable, frozen).

    Raises:
      UserError: an entry of `optimizer.frozen` is no regular expression or finds no parameter, or
        nothing is left to train.
    """
    frozen: set[str] = set()
    for pattern in config.frozen:
        found = _found(pattern, params)
        if not found:
            raise UserError(f"optimizer.frozen: {pattern!r} finds no parameter of this network")
        frozen |= found
    if len(frozen) == len(params):
        raise UserError("optimizer.frozen: every parameter of this network is frozen, none is left to train")
    trainable = {path: x for path, x in params.items() if path not in frozen}
    return trainable, {path: x for path, x in params.items() if path in frozen}


def _found(pattern: str, paths: Iterable[str]) -> set[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"optimizer.frozen: {pattern!r} is not a regular expression ({error})") from None
    return {path for path in paths if expression.search(path)}


def learning_rate(config: OptimizerConfig, update: Array) -> Array:
    """Rate of an update, counted from 0: rises linearly over the first `warmup`, then is constant.

    The first update has rate / warmup, not 0, so none is without effect.
    """
    share = (jnp.asarray(update, jnp.float32) + 1) / max(config.warmup, 1)
    return config.learning_rate * jnp.minimum(share, 1.0)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, then AdamW as PyTorch's (decay decoupled, eps beside sqrt(v)) or Muon.

    With `accumulate` above 1 the parameters move at every such batch alone, by the mean gradient.
    """

    def rate(update: Array) -> Array:
        return learning_rate(config, update)

    adam = {"b1": config.b1, "b2": config.b2}
    if config.kind == "muon":
        # Updates of a root mean square of 0.2, about AdamW's (Liu et al., 2025), so that one rate fits both.
        step = optax.contrib.muon(
            rate,
            eps=config.eps,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
            **{f"adam_{name}": value for name, value in adam.items()},
        )
        step = _stacked(step)
    else:
        step = optax.adamw(rate, eps=config.eps, weight_decay=config.weight_decay, **adam)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), step) if config.clip else step
    if config.accumulate > 1:
        return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def _stacked(step: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same step, which sees kernels of one size as a stack and everything else as one vector.

    A network has some hundreds of kernels of some dozen sizes: orthogonalised a stack at a time they compile
    several times faster, and a GPU is given large operations instead of many small ones.
    """

    def init(params: Params) -> optax.OptState:
        return step.init(_stack(params))

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        stacked, state = step.update(_stack(updates), state, None if params is None else _stack(params))
        return _unstack(stacked, updates), state

    return optax.GradientTransformation(init, update)


_REST = "rest"


def _stacks(params: Params) -> dict[str, list[str]]:
    """Name of a stack -> paths of what is in it. A kernel is a matrix: inputs (and places) by outputs."""
    stacks: dict[str, list[str]] = {}
    for path, x in params.items():
        name = f"{x.size // x.shape[-1]} x {x.shape[-1]}" if path.endswith(".kernel") else _REST
        stacks.setdefault(name, []).append(path)
    return stacks


def _stack(params: Params) -> dict[str, Array]:
    stacked = {}
    for name, paths in _stacks(params).items():
        if name == _REST:
            stacked[name] = jnp.concatenate([params[path].reshape(-1) for path in paths])
        else:
            stacked[name] = jnp.stack([params[path].reshape(-1, params[path].shape[-1]) for path in paths])
    return stacked


def _unstack(stacked: Params, like: Params) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    for name, paths in _stacks(like).items():
        edges = np.cumsum([like[path].size for path in paths])[:-1]
        flat = jnp.split(stacked[name], edges) if name == _REST else stacked[name]
        parts |= {path: flat[n].reshape(like[path].shape) for n, path in enumerate(paths)}
    return {path: parts[path] for path in like}


def _matrices(stacks: Params) -> dict[str, Any]:
    """Which axes of each stack are a matrix's rows and columns; None for what is no matrix."""
    dims = optax.contrib.MuonDimensionNumbers
    return {name: None if name == _REST else dims(1, 2) for name in stacks}


def moving_average(config: OptimizerConfig, ema: Params, params: Params, moved: Array) -> dict[str, Array]:
    """The average after a batch: decays towards the parameters where they moved, else stays.

    Args:
      moved: bool; false for a batch that only accumulates.
    """
    decay = jnp.where(moved, config.ema, 1.0)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, dict(ema), dict(params))
