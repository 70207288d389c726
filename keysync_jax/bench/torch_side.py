"""The same work in PyTorch: diffusers' SVD U-Net and VAE and transformers' HuBERT, with the same weights.

Attention is PyTorch's own (SDPA), which these classes take by default.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from keysync_jax.bench.sizes import Size
from keysync_jax.bench.workloads import Workload
from keysync_jax.convert.export import unet_config, vae_config
from keysync_jax.convert.speech import transformers_table
from keysync_jax.convert.unet import diffusers_unet_table
from keysync_jax.convert.vae import diffusers_vae_table
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.extras import needed_for

Call = Callable[[], Any]
Arrays = Mapping[str, np.ndarray]

GUIDANCE = (5.0, 2.0)
"""Scales of audio and identity."""


def torch_call(
    workload: Workload, size: Size, dtype: str, compiled: bool
) -> Callable[[Mapping[str, Arrays]], Call]:
    """For `measure(beside=...)`: makes a call of PyTorch's networks on what a workload computes with.

    On a GPU where PyTorch sees one, else on as many threads as this process may use cores.

    Args:
      compiled: put the network through `torch.compile`; it compiles in the call before the timed ones.

    Raises:
      UserError: torch, diffusers or transformers is not installed.
    """
    with needed_for("keysync bench --against torch"):
        import diffusers  # noqa: F401
        import torch
        import transformers  # noqa: F401
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    makers: dict[str, Callable[[Size, Mapping[str, Arrays], _Place], Call]] = {
        "unet": _unet,
        "vae encode": partial(_vae, encode=True),
        "vae decode": partial(_vae, encode=False),
        "audio": _audio,
        "sampler": _sampler,
    }
    make = makers[workload.name]
    return lambda arrays: _waiting(make(size, arrays, _Place(dtype, compiled)))


class _Place:
    """Device and dtype that networks and arrays go to."""

    def __init__(self, dtype: str, compiled: bool):
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._compiled = compiled

    def network(self, module: Any, tensors: Mapping[str, np.ndarray]) -> Any:
        import torch

        state = {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in tensors.items()}
        module.load_state_dict(state)
        module = module.eval().to(self.device, self.dtype)
        return torch.compile(module) if self._compiled else module

    def array(self, x: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(self.device, self.dtype)


def _waiting(call: Call) -> Call:
    """The call without gradients, which returns when the device is done."""
    import torch

    def run() -> Any:
        with torch.inference_mode():
            result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


def _svd_unet(size: Size, arrays: Mapping[str, Arrays], place: _Place) -> Any:
    from diffusers import UNetSpatioTemporalConditionModel

    inner = {n.removeprefix("unet."): x for n, x in arrays["params"].items() if n.startswith("unet.")}
    table = diffusers_unet_table(size.stage.unet, {name: x.shape for name, x in inner.items()})
    module = UNetSpatioTemporalConditionModel.from_config(unet_config(size.stage))
    return place.network(module, table.to_torch(inner))


def _conditions(size: Size, windows: int, place: _Place) -> tuple[Any, Any]:
    """Context `[B, T, D]` and the number that diffusers embeds in place of an audio vector."""
    import torch

    context = torch.randn(windows, size.stage.frames, size.stage.unet.cross_attention_dim)
    return context.to(place.device, place.dtype), torch.zeros(windows, 1, device=place.device)


def _unet(size: Size, arrays: Mapping[str, Arrays], place: _Place) -> Call:
    unet, x = _svd_unet(size, arrays, place), arrays["inputs"]["x"]
    windows, t, side = x.shape[:3]
    context, ids = _conditions(size, windows, place)
    latents = np.random.default_rng(0).standard_normal((windows, t, size.stage.unet.in_channels, side, side))
    noisy, c_noise = place.array(latents), place.array(arrays["inputs"]["c_noise"])
    return lambda: unet(noisy, c_noise, context, ids)


def _sampler(size: Size, arrays: Mapping[str, Arrays], place: _Place) -> Call:
    """All steps of a batch of windows: three branches in one call, eq. 9, Euler."""
    import torch

    unet, noise = _svd_unet(size, arrays, place), arrays["inputs"]["noise"]
    windows = len(noise)
    context, ids = _conditions(size, 3 * windows, place)
    start = torch.from_numpy(np.moveaxis(noise, -1, 2)).to(place.device)
    extra = size.stage.unet.in_channels - start.shape[2]
    condition = torch.zeros(3 * windows, start.shape[1], extra, *start.shape[3:]).to(place.device)
    sigmas = [float(sigma) for sigma in align_your_steps(10)]
    audio, identity = GUIDANCE

    def denoised(x: Any, sigma: float) -> Any:
        scale = (sigma**2 + 1) ** 0.5
        inside = torch.cat([torch.cat([x / scale] * 3), condition], 2).to(place.dtype)
        c_noise = torch.full((3 * windows,), 0.25 * float(np.log(sigma)), device=place.device)
        out = unet(inside, c_noise.to(place.dtype), context, ids).sample.float()
        none, identified, both = (-sigma / scale * out + torch.cat([x / scale**2] * 3)).chunk(3)
        return none + identity * (identified - none) + audio * (both - identified)

    def call() -> Any:
        x = start * (sigmas[0] ** 2 + 1) ** 0.5
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * (x - denoised(x, sigma)) / sigma
        return x

    return call


def _vae(size: Size, arrays: Mapping[str, Arrays], place: _Place, encode: bool) -> Call:
    from diffusers import AutoencoderKLTemporalDecoder

    params = dict(arrays["params"])
    table = diffusers_vae_table(size.vae, {name: x.shape for name, x in params.items()})
    vae = place.network(
        AutoencoderKLTemporalDecoder.from_config(vae_config(size.vae)), table.to_torch(params)
    )
    if encode:
        frames = place.array(np.moveaxis(arrays["inputs"]["frames"], -1, 1))
        return lambda: vae.encode(frames).latent_dist.mean
    latents = place.array(np.moveaxis(arrays["inputs"]["latents"][:, 0], -1, 1))
    return lambda: vae.decode(latents, num_frames=1)


def _audio(size: Size, arrays: Mapping[str, Arrays], place: _Place) -> Call:
    from transformers import HubertConfig, HubertModel

    speech = size.speech
    config = HubertConfig(
        hidden_size=speech.hidden_size,
        num_hidden_layers=speech.num_hidden_layers,
        num_attention_heads=speech.num_attention_heads,
        intermediate_size=speech.intermediate_size,
        conv_dim=speech.conv_dim,
        layerdrop=0.0,
    )
    module = HubertModel(config)
    tensors = transformers_table(speech).to_torch(dict(arrays["params"]))
    tensors |= {"masked_spec_embed": np.zeros(speech.hidden_size, np.float32)}
    hubert, wave = place.network(module, tensors), place.array(arrays["inputs"]["wave"])
    return lambda: hubert(wave)
