"""The release's whole pipeline on a clip."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .networks import Book, Inputs, load_tensors
from .precision import computing

CLIP_OPTIONS = {
    **{"cond_aug": 0.0, "decoding_t": 1, "resize_size": 512, "compute_until": 45, "audio_emb_type": "hubert"},
    **{"add_zero_flag": True, "n_batch": 3, "n_batch_keyframes": 3, "extra_audio": None, "recompute": True},
    "force_uc_zero_embeddings": ["cond_frames", "audio_emb"],
}
"""What scripts/inference.sh gives its pipeline."""


def clip_entries(part: dict[str, Any], engines: dict[str, Any], x: Inputs, book: Book, folder: Path) -> None:
    """The release's pipeline on a clip whose latents, features, landmarks and noise are given.

    Its files are written into `folder`, a new one, as its preparation would; the picture, of which it takes
    the size alone, is black.
    """
    import torch

    pipeline: Any = importlib.import_module("scripts.sampling.dubbing_pipeline")
    latents = x["latents"]
    write_clip(folder, x)
    picture = torch.zeros(len(latents), 3, *(8 * side for side in latents.shape[2:]), dtype=torch.uint8)
    pipeline.read_video = lambda *_, **__: (picture,)
    pipeline.save_audio_video = lambda *_, **__: None
    pipeline.load_safetensors = lambda path: {
        name: tensor.to(torch.get_default_dtype()) for name, tensor in load_tensors(Path(path)).items()
    }
    notes = ClipNotes(pipeline, part["precision"], x)
    with notes.taken(engines["interpolation"]):
        pipeline.sample(
            engines["interpolation"].eval(),
            engines["keyframe"].eval(),
            video_path=str(folder / "clip.mp4"),
            audio_path=str(folder / "clip_hubert_emb.safetensors"),
            output_folder=str(folder / "out"),
            device=x.device,
            **CLIP_OPTIONS,
        )
    for name, whole in notes.whole().items():
        book.put(f"out/{name}", whole)


def write_clip(folder: Path, x: Inputs) -> None:
    """A clip's files under the names that the pipeline looks for."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in x.tensors.items()}
    save_file({"latents": arrays["latents"]}, folder / "clip_video_512_latent.safetensors")
    save_file({"audio": arrays["audio_keyframe"]}, folder / "clip_hubert_emb.safetensors")
    save_file({"audio": arrays["audio_interpolation"]}, folder / "clip_wavlm_emb.safetensors")
    np.save(folder / "clip.npy", arrays["landmarks"])


class ClipNotes:
    """Stands between the pipeline and its two stages: gives noise and precision, notes what they make."""

    def __init__(self, pipeline: Any, precision: dict[str, str], x: Inputs):
        self.pipeline, self.precision, self.device = pipeline, precision, x.device
        self.calls, self.windows = iter(x["noise_keyframes"]), iter(x["noise_windows"])
        self.parts: dict[str, list[Any]] = {"masks": [], "keyframes": [], "windows": [], "frames": []}
        self.sample_keyframes = pipeline.sample_keyframes
        self.sample_interpolation = pipeline.sample_interpolation
        self.merge = pipeline.merge_overlapping_segments

    @contextlib.contextmanager
    def taken(self, interpolation: Any) -> Iterator[None]:
        """Puts itself between them while the block runs."""
        import torch

        before = torch.randn, torch.Tensor.cuda, torch.autocast
        self.pipeline.sample_keyframes = self.keyframes
        self.pipeline.sample_interpolation = self.between
        self.pipeline.merge_overlapping_segments = self.merged
        self.decode = interpolation.decode_first_stage
        interpolation.decode_first_stage = self.decoded
        torch.autocast = self.autocast
        if self.device == "cpu":
            torch.Tensor.cuda = lambda tensor, *_, **__: tensor
        try:
            yield
        finally:
            torch.randn, torch.Tensor.cuda, torch.autocast = before

    def autocast(self, _: str, enabled: bool = True, **__: Any) -> Any:
        """The pipeline may leave autocast, as its decoder does; entering it is `precision`'s."""
        import torch

        return contextlib.nullcontext() if enabled else torch.amp.autocast(self.device, enabled=False)

    def keyframes(self, *args: Any, **kwargs: Any) -> Any:
        """A group of keyframe calls."""
        import torch

        torch.randn = lambda shape, **_: next(self.calls).reshape(shape).clone()
        with computing(self.precision["keyframe"], self.device):
            return self.sample_keyframes(*args, **kwargs)

    def between(
        self, model: Any, z: Any, x: Any, audio: Any, gt: Any, masks: Any, *rest: Any, **named: Any
    ) -> Any:
        """The windows of a group; it begins with the last keyframe of the group before."""
        import torch

        def noise(shape: Any, **_: Any) -> Any:
            return torch.stack([next(self.windows) for _ in masks]).reshape(shape)

        kept = torch.stack([frame for drop, frame in zip(named["to_remove"], z, strict=False) if not drop])
        shown = torch.cat([masks[0], *(mask[1:] for mask in masks[1:])])
        for name, found in (("keyframes", kept), ("masks", shown)):
            self.parts[name].append(found[1:] if self.parts[name] else found)
        torch.randn = noise
        with computing(self.precision["interpolation"], self.device):
            return self.sample_interpolation(model, z, x, audio, gt, masks, *rest, **named)

    def decoded(self, z: Any) -> Any:
        """Windows' latents on their way to the decoder."""
        self.parts["windows"].append(z)
        return self.decode(z)

    def merged(self, segments: Any, overlap: int) -> Any:
        """Frames in [0, 1] before they become bytes."""
        self.parts["frames"].append(self.merge(segments, overlap))
        return self.parts["frames"][-1]

    def whole(self) -> dict[str, Any]:
        """What all groups made. Of frames the pipeline replaces each group's last by the next one's first."""
        import torch

        *groups, last = self.parts["frames"]
        parts = self.parts | {"frames": [*(frames[:-1] for frames in groups), last]}
        return {name: torch.cat(found) for name, found in parts.items()}
