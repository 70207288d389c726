"""AdamW or Muon with warm-up, what it may move, and the moving average of the weights."""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from keysync_jax.errors import UserError
from keysync_jax.train.config import OptimizerConfig
from keysync_jax.train.muon import scale_by_muon
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

    if config.kind == "muon":
        step = _muon(config, rate)
    else:
        step = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), step) if config.clip else step
    if config.accumulate > 1:
        return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the kernels, AdamW with Nesterov's momentum for the rest."""
    steps = {
        "kernels": optax.chain(
            scale_by_muon(config.eps),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        ),
        "rest": optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=0.0, nesterov=True),
    }

    def split(params: Params) -> dict[str, dict[str, Array]]:
        kernels = {path: x for path, x in params.items() if path.endswith(".kernel")}
        return {"kernels": kernels, "rest": {path: x for path, x in params.items() if path not in kernels}}

    def init(params: Params) -> dict[str, optax.OptState]:
        return {name: steps[name].init(part) for name, part in split(params).items()}

    def update(
        updates: Params, state: dict[str, optax.OptState], params: Params
    ) -> tuple[dict[str, Array], dict[str, optax.OptState]]:
        parts, held = split(updates), split(params)
        done = {name: steps[name].update(parts[name], state[name], held[name]) for name in steps}
        moved = {path: x for part, _ in done.values() for path, x in part.items()}
        return {path: moved[path] for path in updates}, {name: kept for name, (_, kept) in done.items()}

    return optax.GradientTransformation(init, update)


def moving_average(config: OptimizerConfig, ema: Params, params: Params, moved: Array) -> dict[str, Array]:
    """The average after a batch: decays towards the parameters where they moved, else stays.

    Args:
      moved: bool; false for a batch that only accumulates.
    """
    decay = jnp.where(moved, config.ema, 1.0)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, dict(ema), dict(params))
