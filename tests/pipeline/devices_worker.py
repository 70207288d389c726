"""Both stages and the VAE on one device and on all of this process's; prints one JSON line of what differs.

`python -m tests.pipeline.devices_worker`, with XLA_FLAGS=--xla_force_host_platform_device_count=N.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.monitoring
import numpy as np

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.diffusion.guidance import Separated
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.model import Network
from keysync_jax.nn.functional import init
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.pipeline.devices import Devices, _on_each, local_devices
from keysync_jax.pipeline.generate import Clip, Features, Sampling, interpolation, keyframes, lowered
from keysync_jax.pipeline.latents import (
    _encode,
    decode_frames,
    decoder_program,
    encode_frames,
    encoder_program,
)
from keysync_jax.pipeline.programs import Compiling
from keysync_jax.pipeline.windows import make_plan

FRAMES, SIZE = 13 * 11 + 1, 8
"""Eleven windows: a call of eight, and one that is filled up; and one window of keyframes, by branch."""

VAE_SIZES = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)


def unet(channels: int) -> UNetConfig:
    return UNetConfig(
        in_channels=channels,
        block_out_channels=(16,),
        layers_per_block=1,
        attention_levels=(),
        head_dim=16,
        cross_attention_dim=8,
        addition_embed_dim=8,
        norm_groups=4,
    )


def stage_config(kind: Any) -> StageConfig:
    return StageConfig(kind, "hubert", unet({"keyframe": 8, "interpolation": 9}[kind]), latent_size=SIZE)


def networks() -> dict[str, Network]:
    made = {}
    for kind in ("keyframe", "interpolation"):
        config = stage_config(kind)
        graphdef, params = init(lambda rngs, config=config: stage(config, rngs=rngs))
        # What is initialised with zeros would hide a difference.
        made[kind] = Network(graphdef, {k: x + 0.01 for k, x in params.items()})
    made["vae"] = Network(*init(lambda rngs: VAE(VAE_SIZES, rngs=rngs)))
    return made


@contextmanager
def counted() -> Iterator[list[str]]:
    """Programs that were compiled, or found on disk, in the block."""
    made: list[str] = []
    active = True

    def listen(event: str, duration_secs: float, **named: str | int) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            made.append(str(named["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield made
    active = False


def compile_ahead(nets: dict[str, Network], devices: Devices) -> None:
    """From shapes and in threads, as a dub does it."""
    shapes = {k: Network(n.graphdef, jax.tree.map(shape_of, n.params)) for k, n in nets.items()}
    sampling = Sampling(Separated(), align_your_steps(), devices=devices)
    configs = {k: stage_config(k) for k in ("keyframe", "interpolation")}
    latent = (SIZE, SIZE, VAE_SIZES.latent_channels)
    plan = make_plan(FRAMES)
    windows = {"keyframe": len(plan.keyframe_calls), "interpolation": len(plan.windows)}
    lowers = [partial(lowered, configs[k], shapes[k], sampling, n) for k, n in windows.items()]
    lowers += [
        partial(encoder_program, shapes["vae"], 2 * SIZE, 2, devices),
        partial(decoder_program, shapes["vae"], latent, 2, devices),
    ]
    with Compiling({"all": lowers}, "bf16") as compiling:
        compiling.wait("all")


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def everything(nets: dict[str, Network], devices: Devices, first: int = 0) -> dict[str, Any]:
    """Latents and frames of the whole path."""
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (21, 2 * SIZE, 2 * SIZE, 3), np.uint8)
    encoded = np.concatenate(list(encode_frames(nets["vae"], pictures, devices=devices)))
    shown = np.arange(FRAMES) % len(pictures)
    masks = draw.integers(0, 2, (len(pictures), SIZE, SIZE), np.uint8)
    clip, plan = Clip(encoded, masks, shown), make_plan(FRAMES)
    features = Features("hubert", draw.standard_normal((FRAMES, 2, 768), np.float32))
    sampling = Sampling(Separated(), align_your_steps(), devices=devices)
    keys = np.concatenate(list(keyframes(nets["keyframe"], clip, plan, features, sampling)))
    windows = np.stack(
        list(interpolation(nets["interpolation"], clip, plan, features, keys, sampling, first))
    )
    decoded = np.concatenate(list(decode_frames(nets["vae"], encoded, devices=devices)))
    return {"encoded": encoded, "keyframes": keys, "windows": windows, "decoded": decoded.astype(float)}


@contextmanager
def guarded() -> Iterator[list[str]]:
    """In the block nothing may move between host and devices within a call, but for what is put there."""
    calls: list[str] = []
    run = Devices.run

    def run_guarded(self: Devices, function: Any, *inputs: Any) -> Any:
        calls.append(getattr(function, "__name__", ""))
        with jax.transfer_guard("disallow"):
            return run(self, function, *inputs)

    Devices.run = run_guarded  # type: ignore[method-assign]
    yield calls
    Devices.run = run  # type: ignore[method-assign]


def guard_notices(nets: dict[str, Network], devices: Devices) -> bool:
    """Whether rows that were not put onto the devices would have been found."""
    try:
        with guarded():
            rows = np.zeros((2 * len(devices), 2 * SIZE, 2 * SIZE, 3), np.uint8)
            devices.run(_encode, devices.network(nets["vae"]), rows)
    except jax.errors.JaxRuntimeError as error:
        return "Disallowed host-to-device transfer" in str(error)
    return False


def main() -> None:
    nets, many, one = networks(), local_devices(), local_devices(1)
    alone = everything(nets, one)
    with counted() as compiled:
        compile_ahead(nets, many)
        split = everything(nets, many)
    with counted() as again, guarded() as calls:
        rest = everything(nets, many, first=3)
    found = {
        "devices": len(many),
        "differences": {k: float(np.abs(split[k] - alone[k]).max()) for k in alone},
        "compiled": compiled.count("jit(_on_each)"),
        "sizes": {k: float(np.abs(alone[k]).max()) for k in alone},
        "resumed": float(np.abs(rest["windows"] - alone["windows"][3:]).max()),
        "compiled_again": len(again),
        "programs": _on_each._cache_size(),
        "calls": calls,
        "guard_notices": guard_notices(nets, many),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
