"""The plain SVD networks against diffusers', with random weights converted by the table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import UNetConfig, VAEConfig
from keysync_jax.convert.unet import diffusers_unet_table
from keysync_jax.convert.vae import diffusers_vae_table, is_engine_layout, vae_config
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.layers import sinusoid
from keysync_jax.nn.unet import UNet
from keysync_jax.nn.vae import VAE

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

UNET = UNetConfig(
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    attention_levels=(0, 1),
    head_dim=16,
    cross_attention_dim=24,
    addition_embed_dim=3 * 32,
)
FRAMES, SIZE = 5, 8


def randomised(module: Any) -> Any:
    """Every parameter random, mixing factors and norms too: defaults would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 25
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(centre + torch.randn(p.shape, generator=generator) * 0.7 / fan_in**0.5)
    return module.eval()


def state(module: Any) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in module.state_dict().items()}


def relative(ours: Any, theirs: Any) -> float:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def svd_unet() -> Any:
    down = ("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",)
    return randomised(
        diffusers.UNetSpatioTemporalConditionModel(
            in_channels=8,
            out_channels=4,
            down_block_types=down,
            up_block_types=tuple(d.replace("Down", "Up") for d in reversed(down)),
            block_out_channels=UNET.block_out_channels,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=2,
            cross_attention_dim=24,
            num_attention_heads=(2, 4, 4),
            num_frames=FRAMES,
        )
    )


def test_unet_and_its_intermediates_equal_diffusers() -> None:
    theirs = svd_unet()
    graphdef, abstract = shapes(lambda rngs: UNet(UNET, rngs=rngs))
    wanted = {k: v.shape for k, v in abstract.items()}
    table = diffusers_unet_table(UNET, wanted)
    tensors = state(theirs)
    params = table.to_jax(tensors, wanted)
    back = table.to_torch(params)
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    assert len(back) == len(tensors)

    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, FRAMES, SIZE, SIZE, 8), np.float32)
    context = rng.standard_normal((2, 1, 24), np.float32)
    ids = np.array([[6.0, 127.0, 0.02]] * 2, np.float32)
    c_noise = np.array([-1.5, 1.2], np.float32)

    inputs = [torch.tensor(a) for a in (np.moveaxis(x, -1, 2), c_noise, context, ids)]
    with torch.no_grad():
        as_it_is = theirs(*inputs).sample
    # Some of diffusers' resnets have an epsilon of 1e-6 where the engine, and so we, have 1e-5.
    seen: dict[str, Any] = {}
    for name, part in theirs.named_modules():
        if ".resnets." in name and isinstance(part, torch.nn.GroupNorm):
            part.eps = 1e-5
        part.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        theirs(*inputs)

    @jax.jit
    def run(params: Any) -> Any:
        unet, record = bind(graphdef, params), {}
        addition = sinusoid(ids, 32).reshape(2, 1, 96)
        addition = jnp.broadcast_to(addition, (2, FRAMES, 96))
        return unet(x, c_noise, addition, unet.key_value(context), record), record

    out, record = run(params)
    assert relative(np.moveaxis(np.asarray(out), -1, 2), as_it_is) < 1e-4
    compared = 0
    for name, ours in record.items():
        out = seen[name]
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        ours = np.moveaxis(np.asarray(ours), -1, 2).reshape(out.shape)
        assert relative(ours, out) < 1e-5, name
        compared += 1
    assert compared >= 30


@pytest.fixture(scope="module")
def vae_pair() -> tuple[Any, Any, Any]:
    theirs = randomised(
        diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            layers_per_block=2,
            latent_channels=4,
        )
    )
    tensors = state(theirs)
    config = vae_config(tensors, "diffusers' VAE")
    assert config == VAEConfig((32, 32, 64), 2, quant_conv=True)
    assert not is_engine_layout(tensors)
    graphdef, abstract = shapes(lambda rngs: VAE(config, rngs=rngs))
    wanted = {k: v.shape for k, v in abstract.items()}
    table = diffusers_vae_table(config, wanted)
    params = table.to_jax(tensors, wanted)
    back = table.to_torch(params)
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    assert len(back) == len(tensors)
    return theirs, graphdef, params


def test_vae_encoder_equals_diffusers(vae_pair: tuple[Any, Any, Any]) -> None:
    theirs, graphdef, params = vae_pair
    x = np.random.default_rng(2).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.encode(torch.tensor(np.moveaxis(x, -1, 1))).latent_dist
    ours = jax.jit(lambda p: bind(graphdef, p).encode(x))(params)
    assert relative(np.moveaxis(np.asarray(ours.mean), -1, 1), wanted.mean) < 1e-4
    assert relative(np.moveaxis(np.asarray(ours.logvar), -1, 1), wanted.logvar) < 1e-4


@pytest.mark.parametrize("frames", [1, 3])
def test_vae_decoder_equals_diffusers(vae_pair: tuple[Any, Any, Any], frames: int) -> None:
    theirs, graphdef, params = vae_pair
    seen: dict[str, Any] = {}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
        for name, part in theirs.named_modules()
    ]
    z = np.random.default_rng(3).standard_normal((2, frames, 8, 8, 4)).astype(np.float32)
    stacked = torch.tensor(np.moveaxis(z, -1, 2).reshape(-1, 4, 8, 8))
    with torch.no_grad():
        wanted = theirs.decode(stacked, num_frames=frames).sample
    for hook in hooks:
        hook.remove()

    @jax.jit
    def run(params: Any) -> Any:
        record: dict[str, Any] = {}
        return bind(graphdef, params).decode(z * 0.18215, record), record

    ours, record = run(params)
    ours = np.moveaxis(np.asarray(ours), -1, 2).reshape(-1, 3, 32, 32)
    assert relative(ours, wanted) < 1e-4
    # The middle block's parts are in other places there, and its last convolution keeps T apart.
    named = {k: v for k, v in record.items() if k in seen and k != "decoder.time_conv_out"}
    assert len(named) >= 12
    for name, inner in named.items():
        inner = np.moveaxis(np.asarray(inner), -1, 2)
        assert relative(inner.reshape(seen[name].shape), seen[name]) < 1e-4, name
