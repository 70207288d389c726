"""A file of golden numbers: sizes and tensors' names, inputs and outputs of the PyTorch reference.

`PREFIX.manifest.json` names the sizes and every tensor of the networks, `PREFIX.safetensors` holds
what the reference computed. Weights, and inputs that are not stored, follow from their names (`rules`).
A live run (`reference`) writes such files too; there the sizes are our configs', the weights may be a
model directory's, and `PREFIX.exact.safetensors` holds the same numbers computed in fp64.

| entry below a stage's name | what |
|---|---|
| `in/NAME` | inputs |
| `cond/*`, `uncond/*` | projected audio and concatenated reference, kept and dropped |
| `block/PATH`, `layer/PATH` | what a block, or a layer, of the network returns within `out/network` |
| `out/network`, `out/denoised_K` | F_theta; D_theta at the levels of `in/denoiser_sigmas` |
| `step/K/denoised`, `step/K/x` | each Euler step, separated guidance: its clean latents, where it arrives |
| `out/sample_audio_ref`, `out/sample_cfg` | the whole loop, separated guidance and plain CFG |
| `out/train_loss`, `grad/NAME` | the latent loss without drops, its gradients |
| `train/loss*`, `train/grad/NAME` | the loss of a batch with drops and the RGB loss, its gradients |

Below `vae`: `block/PATH`, `layer/PATH`, `out/moments`, `out/decoded_t1`, `out/decoded_t4`. Below `clip`, of
the whole pipeline: `out/masks`, `out/keyframes`, `out/windows` (latents) and `out/frames` in [0, 1].
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keysync_jax.config import StageConfig, StageKind, UNetConfig, VAEConfig, from_dict
from keysync_jax.convert.table import Table
from keysync_jax.errors import UserError
from keysync_jax.parity import rules
from keysync_jax.tensorfile import TensorFile
from keysync_jax.typing import Array, Params

SCALE_FACTOR = VAEConfig().scale_factor


class Golden:
    """A golden file with its manifest.

    Attributes:
      config: the manifest's sizes.
      tensors: network -> torch key -> shape; empty where the weights are a model's.
      model: the model directory whose weights these are; None where they follow from the rule.
      stored: entries `network/in/name` and outputs, in torch's layout.
      exact: outputs in fp64, where they were computed.
      order: entries in the order in which they were computed, where that is known.
      precision: network -> what the reference computed it in; empty: fp32.
    """

    def __init__(self, prefix: str | Path):
        manifest = Path(f"{prefix}.manifest.json")
        try:
            content = json.loads(manifest.read_text())
            self.config, self.tensors = content["config"], content["tensors"]
            self.model = Path(content["model"]) if content.get("model") else None
            self.order: list[str] = content.get("order", [])
            self.precision: dict[str, str] = content.get("precision", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{manifest}: not a manifest of golden numbers ({error})") from None
        self.stored = TensorFile(Path(f"{prefix}.safetensors"))
        exact = Path(f"{prefix}.exact.safetensors")
        self.exact: Mapping[str, np.ndarray] = TensorFile(exact) if exact.is_file() else {}

    def outputs(self, network: str) -> list[str]:
        """Entries of a network that are to be computed, in order."""
        entries = self.order or list(self.stored)
        return [k for k in entries if k.startswith(f"{network}/") and "/in/" not in k]

    def input(self, network: str, name: str, shape: Sequence[int]) -> np.ndarray:
        """An input in torch's layout: the stored one, else standard normal by the rule of its name."""
        if (key := f"{network}/in/{name}") in self.stored:
            return np.asarray(self.stored[key])
        return rules.array(f"{self.config.get('input_tag', 'dev')}/{network}/{name}", shape)

    def shape(self, network: str, *outputs: str) -> tuple[int, ...] | None:
        """Shape of the first of these outputs that is stored."""
        found = (self.stored.shapes.get(f"{network}/out/{name}") for name in outputs)
        return next((shape for shape in found if shape), None)

    def level(self, network: str, name: str, default: Sequence[float] | np.ndarray) -> np.ndarray:
        """Noise levels: the stored ones, else the default."""
        return np.asarray(self.stored.get(f"{network}/in/{name}", default), np.float32)

    def params(
        self,
        network: str,
        table: Table,
        wanted: Mapping[str, tuple[int, ...]],
        place: Callable[[np.ndarray], Array],
    ) -> Params:
        """A network's parameters, the model's or by the rule; converted and placed one by one."""
        if self.model is not None:
            component = "vae" if network == "first_stage" else network
            file = TensorFile(self.model / f"{component}.safetensors")
            return {path: place(np.asarray(file[path]).astype(np.float32)) for path in wanted}
        weights = RuleWeights(self.tensors[network])
        return table.to_jax(weights, wanted, f"the manifest's {network}", place)

    def stage_config(self, kind: StageKind) -> StageConfig:
        if kind in self.config:
            return from_dict(StageConfig, self.config[kind], kind)
        c = self.config["unet"]
        levels = range(len(c["channel_mult"]))
        unet = UNetConfig(
            in_channels=2 * c["out_channels"] + (kind == "interpolation"),
            out_channels=c["out_channels"],
            block_out_channels=tuple(c["model_channels"] * m for m in c["channel_mult"]),
            layers_per_block=c["num_res_blocks"],
            attention_levels=tuple(i for i in levels if 2**i in c["attention_downsampling"]),
            head_dim=c["head_size"],
            cross_attention_dim=c["context_width"],
            addition_embed_dim=c["context_width"],
            norm_groups=c["norm_groups"],
        )
        return StageConfig(
            kind,
            "hubert",
            unet,
            audio_dim=self.config["audio_width"],
            frames=self.config.get("frames", 14),
            latent_size=self.config["latent"],
        )

    def vae_config(self) -> VAEConfig:
        if "channels" not in self.config["vae"]:
            return from_dict(VAEConfig, self.config["vae"], "vae")
        c = self.config["vae"]
        return VAEConfig(
            block_out_channels=tuple(c["channels"] * m for m in c["channel_mult"]),
            layers_per_block=c["num_res_blocks"],
            latent_channels=c["latent_channels"],
        )


class RuleWeights(Mapping[str, np.ndarray]):
    """A checkpoint that makes each tensor by the rule when it is read."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self.shapes = shapes

    def __getitem__(self, key: str) -> np.ndarray:
        return rules.weight(key, self.shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes


class StageInputs:
    """Inputs of a stage's entries in our layout.

    Attributes:
      x, noise, gt: `[B, T, h, w, 4]`.
      mask: `[B, T, h, w, 1]`.
      audio: `[B, T, 2, audio_dim]`.
      reference: raw latents `[B, 1 or 2, h, w, 4]`.
      c_noise, train_sigmas: `[B]`.
      denoiser_sigmas: one for each `denoised_*` entry, applied to every clip.
    """

    def __init__(self, golden: Golden, config: StageConfig):
        kind, t, s = config.kind, config.frames, config.latent_size
        self._stored = lambda name: np.asarray(golden.stored[f"{kind}/in/{name}"])
        outputs = ("network", "denoised_0", "denoised_1", "denoised_2", "sample_audio_ref", "sample_cfg")
        stored = golden.shape(kind, *outputs)
        b = stored[0] // t if stored else golden.config.get("batch", 1)
        c = config.unet.out_channels
        self.shape = (b, t)
        self.x = self.unstacked(golden.input(kind, "x", (b * t, c, s, s)))
        self.noise = self.unstacked(golden.input(kind, "noise", (b * t, c, s, s)))
        self.gt = np.moveaxis(golden.input(kind, "gt", (b, c, t, s, s)), 1, -1)
        masks = golden.input(kind, "masks", (b, 1, t, s, s))
        self.mask = (np.moveaxis(masks, 1, -1) > 0).astype(np.float32)
        self.audio = _renamed(golden, kind, "audio_emb", "audio", (b, t, 2, config.audio_dim))
        # Stored for every frame, but the same within a clip.
        self.c_noise = golden.level(kind, "c_noise", np.repeat(np.resize((-1.5, 1.6), b), t))[::t]
        self.train_sigmas = golden.level(kind, "train_sigmas", np.resize((1.3, 0.4), b))
        self.denoiser_sigmas = golden.level(kind, "denoiser_sigmas", (0.034, 1.789, 54.5))
        ends = (1,) if kind == "keyframe" else (2,)
        torch_shape = (b, c, s, s) if kind == "keyframe" else (b, c, 2, s, s)
        scaled = _renamed(golden, kind, "cond_frames", "cond", torch_shape, SCALE_FACTOR)
        raw = scaled.reshape(b, c, *ends, s, s) / np.float32(SCALE_FACTOR)
        self.reference = np.moveaxis(raw, 1, -1)

    def draws(self) -> "Draws":
        """The random choices of a training step, which a live run stores."""
        frames = np.moveaxis(self._stored("original_frames"), 1, -1)
        frame = int(self._stored("frame_index")[0])
        keep_reference = self._stored("keep_reference") > 0
        by_frame = len(keep_reference) != self.shape[0]
        return Draws(
            frames[:, frame],
            np.full(self.shape[0], frame),
            self._stored("keep_audio") > 0,
            keep_reference.reshape(self.shape) if by_frame else keep_reference,
        )

    def unstacked(self, x: np.ndarray) -> np.ndarray:
        """`[B * T, C, h, w]` -> `[B, T, h, w, C]`."""
        return np.moveaxis(x.reshape(*self.shape, *x.shape[1:]), 2, -1)


class Draws(NamedTuple):
    """What a training step draws beside noise.

    Attributes:
      frame: `[B, H, W, 3]` in [-1, 1], the frame of each clip that the RGB loss looks at.
      frame_index: its number `[B]`, the same in every clip.
      keep_audio, keep_reference: bool `[B]`; the latter `[B, T]` where each frame's is dropped alone.
    """

    frame: np.ndarray
    frame_index: np.ndarray
    keep_audio: np.ndarray
    keep_reference: np.ndarray


def _renamed(
    golden: Golden, network: str, stored: str, rule: str, shape: Sequence[int], scale: float = 1.0
) -> np.ndarray:
    """An input that is stored under another name than the one its rule takes."""
    if f"{network}/in/{stored}" in golden.stored:
        return np.asarray(golden.stored[f"{network}/in/{stored}"])
    return golden.input(network, rule, shape) * np.float32(scale)


def stacked(x: Array) -> np.ndarray:
    """`[B, T, h, w, C]` -> `[B * T, C, h, w]`, torch's layout; fp32."""
    y = np.moveaxis(np.asarray(x, np.float32), -1, 2)
    return y.reshape(-1, *y.shape[2:])
