"""Floating-point operations of a training step, from shapes alone.

Counted are matrix products and convolutions, which are nearly all of the work: 2 operations a
multiply-add in the forward pass, and as many again for each operand that needs a gradient. So frozen
weights cost no gradient of their own, and what is recomputed in the backward pass is not counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from keysync_jax.config import GuidanceConfig
from keysync_jax.diffusion.guidance import calls
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.model import Network
from keysync_jax.pipeline.sampling import guidance_of
from keysync_jax.train.autoencoder import FrameBatch, VAEStep
from keysync_jax.train.batch import Batch
from keysync_jax.train.config import TrainConfig, VAETrainConfig
from keysync_jax.train.distill import DistillStep, TrajectoryBatch, trajectory_shapes
from keysync_jax.train.optimizer import partition
from keysync_jax.train.step import draw_clips, draw_noise, make_step
from keysync_jax.train.trajectories import MOST_WINDOWS
from keysync_jax.typing import Params


def batch_shapes(config: TrainConfig) -> Batch:
    """Shapes of a global batch from datasets that store posteriors."""
    stage, b = config.stage, config.batch_size
    t, side, c = stage.frames, stage.latent_size, config.vae.latent_channels
    references = 1 if stage.kind == "keyframe" else 0
    pixels = side * config.vae.factor if config.loss.pixel != "none" else 0
    latents = jax.ShapeDtypeStruct((b, t, side, side, c), jnp.float16)
    reference = jax.ShapeDtypeStruct((b, references, side, side, c), jnp.float16)
    return Batch(
        mean=latents,
        logvar=latents,
        reference_mean=reference,
        reference_logvar=reference,
        audio=jax.ShapeDtypeStruct((b, t, 2, stage.audio_dim), jnp.float32),
        mask=jax.ShapeDtypeStruct((b, t, side, side, 1), jnp.uint8),
        frame=jax.ShapeDtypeStruct((b, pixels, pixels, 3), jnp.uint8),
        frame_index=jax.ShapeDtypeStruct((b,), jnp.int32),
    )


def frame_batch_shapes(config: VAETrainConfig) -> FrameBatch:
    """Shapes of a global batch of a VAE's run."""
    shape = (config.batch_size, config.crop_size, config.crop_size)
    return FrameBatch(
        frame=jax.ShapeDtypeStruct((*shape, 3), jnp.uint8), mouth=jax.ShapeDtypeStruct((*shape, 1), jnp.uint8)
    )


def step_flops(
    config: TrainConfig,
    graphdef: nnx.GraphDef,
    params: Params,
    vae: Network | None = None,
    perceptual: Network | None = None,
) -> int:
    """Operations of one step over all devices; nothing is allocated or compiled.

    Args:
      graphdef: as `make_step` takes it.
      params: every parameter of the stage, or its shape.
      vae, perceptual: as `make_step` takes them; shapes will do.
    """
    step = make_step(config, graphdef, vae, perceptual)
    trainable, frozen = partition(config.optimizer, params)

    def loss(trainable: Params, frozen: Params, aids: dict[str, Params], batch: Batch) -> Any:
        key = jax.random.key(0)
        clips = draw_clips(config, batch, key)
        noise = draw_noise(config.loss, clips.gt.shape, key, config.drops_by_frame)
        return step.loss({**frozen, **trainable}, aids, clips, noise)[0]

    jaxpr = jax.make_jaxpr(loss)(trainable, frozen, step.aids, batch_shapes(config)).jaxpr
    needed = [i < len(trainable) for i in range(len(jaxpr.invars))]
    return training_flops(jaxpr, needed)[0]


def distill_step_flops(
    config: TrainConfig, graphdef: nnx.GraphDef, params: Params, vae: Network | None = None
) -> int:
    """Operations of one step of a distillation over all devices; nothing is allocated or compiled.

    Args:
      vae: as `DistillStep` has it; shapes will do.
    """
    step = DistillStep(config, graphdef, vae)
    trainable, frozen = partition(config.optimizer, params)

    def loss(trainable: Params, frozen: Params, aids: dict[str, Params], batch: TrajectoryBatch) -> Any:
        return step.loss({**frozen, **trainable}, aids, batch)[0]

    jaxpr = jax.make_jaxpr(loss)(trainable, frozen, step.aids, trajectory_shapes(config)).jaxpr
    return training_flops(jaxpr, [i < len(trainable) for i in range(len(jaxpr.invars))])[0]


def teacher_flops(config: TrainConfig, graphdef: nnx.GraphDef, params: Params) -> int:
    """Operations that make a distillation's trajectories, at most: with the paper's table and guidance.

    Every stretch of a clip is taken to be as long as it can be, and its keyframes to be the teacher's.

    Args:
      graphdef: of `make_stage(config)`.
    """
    assert config.distill is not None
    own = replace(config, distill=replace(config.distill, decoded=0.0, truth=0.0), batch_size=1)
    own = replace(own, optimizer=replace(own.optimizer, frozen=()))
    sigmas = align_your_steps()
    branches = calls(guidance_of(GuidanceConfig(), sigmas), len(sigmas) - 1)
    windows = 1 if config.stage.kind == "keyframe" else 1 + MOST_WINDOWS
    # A step is the network forwards, and backwards twice as much, all of its weights being trained.
    return distill_step_flops(own, graphdef, params) // 3 * branches * windows * config.distill.clips


def vae_step_flops(
    config: VAETrainConfig, graphdef: nnx.GraphDef, params: Params, vae: Network | None = None
) -> int:
    """Operations of one step of a VAE's run over all devices; nothing is allocated or compiled.

    Args:
      vae: as `VAEStep` has it; shapes will do.
    """
    step = VAEStep(config, graphdef, vae)
    trainable, frozen = partition(config.optimizer, params)

    def loss(trainable: Params, frozen: Params, aids: dict[str, Params], batch: FrameBatch) -> Any:
        return step.loss({**frozen, **trainable}, aids, batch, jax.random.key(0))[0]

    jaxpr = jax.make_jaxpr(loss)(trainable, frozen, step.aids, frame_batch_shapes(config)).jaxpr
    return training_flops(jaxpr, [i < len(trainable) for i in range(len(jaxpr.invars))])[0]


def training_flops(jaxpr: Jaxpr, needed: Sequence[bool]) -> tuple[int, list[bool]]:
    """Operations of a function and of its gradient.

    Args:
      jaxpr: of the forward pass.
      needed: for each of its arguments, whether its gradient is needed.

    Returns:
      The count, and for each result whether it depends on an argument that is needed.
    """
    flags = dict(zip(jaxpr.invars, needed, strict=True))

    def flag(x: Any) -> bool:
        return not isinstance(x, Literal) and flags.get(x, False)

    count = 0
    for eqn in jaxpr.eqns:
        operands = [flag(x) for x in eqn.invars]
        here, results = _equation(eqn, operands)
        count += here
        flags.update(zip(eqn.outvars, results, strict=True))
    return count, [flag(x) for x in jaxpr.outvars]


def _equation(eqn: Any, needed: list[bool]) -> tuple[int, list[bool]]:
    if eqn.primitive.name == "scan":
        return _scan(eqn, needed)
    if eqn.primitive.name == "while":
        raise NotImplementedError("a loop of unknown length has no known number of operations")
    results = [any(needed)] * len(eqn.outvars)
    if forward := _product(eqn):
        return forward * (1 + sum(needed[:2])), results
    inner = list(inner_jaxprs(eqn))
    if not inner:
        return 0, results
    # A `cond` takes the branch's number before what the branches take; the longest one counts.
    return max(
        (training_flops(j, needed[len(needed) - len(j.invars) :]) for j in inner), key=lambda found: found[0]
    )


def _scan(eqn: Any, needed: list[bool]) -> tuple[int, list[bool]]:
    (body,) = inner_jaxprs(eqn)
    # JAX 0.11 calls the numbers of constants and carries otherwise than 0.10, so both are counted here.
    carries = len(body.outvars) - _with_more_axes(eqn.outvars, body.outvars)
    consts = len(body.invars) - _with_more_axes(eqn.invars, body.invars) - carries
    while True:
        count, results = training_flops(body, needed)
        carry = [a or b for a, b in zip(needed[consts:], results[:carries], strict=False)]
        if carry == needed[consts : consts + carries]:
            return count * eqn.params["length"], results
        needed = [*needed[:consts], *carry, *needed[consts + carries :]]


def _with_more_axes(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many of a scan's variables have an axis, that of its steps, which its body's have not."""
    return sum(len(x.aval.shape) > len(y.aval.shape) for x, y in zip(outer, inner, strict=True))


def inner_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """The functions that an equation calls, in its forward pass."""
    for name, value in eqn.params.items():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr) and name in ("jaxpr", "call_jaxpr", "branches"):
                yield part.jaxpr if isinstance(part, ClosedJaxpr) else part


def _product(eqn: Any) -> int:
    """Operations of a matrix product, a convolution or a fused attention; 0 for all else."""
    name, shapes = eqn.primitive.name, [x.aval.shape for x in eqn.invars]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][i] for i in contracted)
    if name == "conv_general_dilated":
        out_features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) // out_features
    if name.startswith("dot_product_attention_fwd"):
        # Two products: `[B, N, heads, D]` with the keys `[B, M, heads, D]`, then with the values.
        return 4 * math.prod(shapes[0]) * shapes[1][1]
    return 0
