"""What is captured of a stage and of the VAE."""

import contextlib
from collections.abc import Iterator
from typing import Any

from .networks import Book, Inputs


def stage_entries(engine: Any, part: dict[str, Any], x: Inputs, book: Book) -> None:
    """Conditions, the network with its blocks, the denoiser at given levels, both samplers, every step."""
    import torch
    from sgm.modules.diffusionmodules.guiders import VanillaCFG

    names = ("cond_frames", "gt", "audio_emb", "masks")
    batch = {name: x[name] for name in names}
    frames, clips = batch["gt"].shape[2], batch["gt"].shape[0]
    with torch.no_grad():
        with book.hooked(engine, part["modules"]):
            c, uc = engine.conditioner.get_unconditional_conditioning(
                batch, force_uc_zero_embeddings=["cond_frames", "audio_emb"]
            )
        for kind, group in ((c, "cond"), (uc, "uncond")):
            for name in ("concat", "crossattn"):
                book.put(f"{group}/{name}", kind[name])

        def more(windows: int) -> dict[str, Any]:
            return {
                "image_only_indicator": torch.zeros(windows, frames, device=x.device),
                "num_video_frames": frames,
            }

        with book.hooked(engine, part["modules"]):
            book.put("out/network", engine.model(x["x"], x["c_noise"], c, **more(clips)))
        for k, level in enumerate(x["denoiser_sigmas"]):
            sigma = level.expand(clips * frames)
            noisy = x["x"] * level
            book.put(f"out/denoised_{k}", engine.denoiser(engine.model, noisy, sigma, c, **more(clips)))

        def closure(noisy: Any, sigma: Any, conditions: Any) -> Any:
            return engine.denoiser(engine.model, noisy, sigma, conditions, **more(len(noisy) // frames))

        if part["samplers"]:
            with _steps(engine.sampler, book):
                book.put("out/sample_audio_ref", engine.sampler(closure, x["noise"], cond=c, uc=uc))
            engine.sampler.guider = VanillaCFG(part["cfg_scale"])
            book.put("out/sample_cfg", engine.sampler(closure, x["noise"], cond=c, uc=uc))


@contextlib.contextmanager
def _steps(sampler: Any, book: Book) -> Iterator[None]:
    """Notes what each step of a sampler computes: the guided denoised latents, and where it goes."""
    denoise, step, count = sampler.denoise, sampler.sampler_step, [0]

    def noted_denoise(*args: Any) -> Any:
        out = denoise(*args)
        book.put(f"step/{count[0]}/denoised", out)
        return out

    def noted_step(*args: Any) -> Any:
        out = step(*args)
        book.put(f"step/{count[0]}/x", out)
        count[0] += 1
        return out

    sampler.denoise, sampler.sampler_step = noted_denoise, noted_step
    try:
        yield
    finally:
        del sampler.denoise, sampler.sampler_step


def vae_entries(network: Any, part: dict[str, Any], x: Inputs, book: Book) -> None:
    """Moments of frames; latents decoded alone and together; the blocks of both."""
    import torch

    vae = network.first_stage_model
    encoder = {k: m for k, m in part["modules"].items() if ".encoder." in m}
    decoder = {k: m for k, m in part["modules"].items() if ".decoder." in m}
    with torch.no_grad():
        with book.hooked(network, encoder):
            moments = vae.encoder(x["frames"])
        if "quant_conv.weight" in x:
            moments = torch.nn.functional.conv2d(moments, x["quant_conv.weight"], x["quant_conv.bias"])
        mean, logvar = moments.chunk(2, dim=1)
        book.put("out/moments", torch.cat([mean, logvar.clamp(-30, 20)], dim=1))
        z = x["z"]
        with book.hooked(network, decoder):
            book.put("out/decoded_t4", vae.decode(z, timesteps=4))
        book.put("out/decoded_t1", torch.cat([vae.decode(frame[None], timesteps=1) for frame in z]))
