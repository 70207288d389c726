"""The loss of a batch and its gradients."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .environment import Refused
from .networks import Book, Inputs

TRAINING = {
    "keyframe": "configs/example_training/keyframes/keyframes_dub.yaml",
    "interpolation": "configs/example_training/interpolation/interpolation_dub.yaml",
}


def train_entries(engine: Any, part: dict[str, Any], x: Inputs, book: Book, checkout: Path) -> None:
    """The loss of a batch and its gradients: the release's own, its draws replaced by given ones."""
    import torch
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    params = OmegaConf.load(checkout / TRAINING[part["network"]]).model.params
    for path, value in part["training_settings"].items():
        OmegaConf.update(params, path, value, force_add=True)
    loss = instantiate_from_config(params.loss_fn_config)
    loss.sigma_sampler = lambda clips: x["train_sigmas"]
    # The conditioner of training: it drops conditions, and may copy the reference first.
    conditioner = instantiate_from_config(params.conditioner_config).to(x.device)
    conditioner.load_state_dict(engine.conditioner.state_dict())
    engine.conditioner = conditioner
    gt = x["gt"]
    clips, frames = gt.shape[0], gt.shape[2]
    batch = {name: x[name] for name in ("cond_frames", "gt", "audio_emb", "masks")}
    batch["original_frames"] = x["original_frames"]
    batch["image_only_indicator"] = torch.zeros(clips, frames, device=x.device)
    batch["num_video_frames"] = frames
    with _given_draws(x):
        parts = loss(engine.model, engine.denoiser, conditioner, gt, batch, engine.first_stage_model)
    total = parts["loss"].mean()
    book.put("train/loss", total[None])
    book.put("train/loss_latent", parts["l2"].mean()[None])
    book.put("train/loss_pixel", parts["pixel_l2"].mean()[None])
    total.backward()
    tensors = dict(engine.named_parameters())
    for name in part["gradients"]:
        book.put(f"train/grad/{name}", tensors[name].grad)


@contextlib.contextmanager
def _given_draws(x: Inputs) -> Iterator[None]:
    """Hands the loss its noise, its frame and its drops; refuses where it asks for another number of them."""
    import torch

    kept = {"reference": x["keep_reference"], "audio": x["keep_audio"]}
    order = iter(kept.items())

    def bernoulli(p: Any, *_: Any, **__: Any) -> Any:
        what, mask = next(order)
        if p.shape != mask.shape:
            raise Refused(f"the release draws {list(p.shape)} drops of the {what}, not {list(mask.shape)}")
        return mask

    def noise(gt: Any, *_: Any, **__: Any) -> Any:
        clips, channels, frames, *_ = gt.shape
        return x["noise"].reshape(clips, frames, channels, *gt.shape[3:]).transpose(1, 2)

    def frame_first(count: int, *_: Any, **__: Any) -> Any:
        return (torch.arange(count) + int(x["frame_index"])) % count

    given = {"randn_like": noise, "bernoulli": bernoulli, "randperm": frame_first}
    before = {name: getattr(torch, name) for name in given}
    try:
        for name, draw in given.items():
            setattr(torch, name, draw)
        yield
    finally:
        for name, draw in before.items():
            setattr(torch, name, draw)
