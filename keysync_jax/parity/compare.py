"""Numerical parity with the PyTorch reference: `keysync parity --golden PREFIX`.

The weights of a golden file (`golden`) go through the converter, so the table is proven with the
network. One network is in memory at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.config import Dtype, StageKind
from keysync_jax.convert.unet import stage_table
from keysync_jax.convert.vae import engine_vae_table
from keysync_jax.diffusion import loss as losses
from keysync_jax.diffusion import precond
from keysync_jax.diffusion.guidance import ClassifierFree, Guidance, Separated
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.model import DTYPES
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.parity.golden import Golden, StageInputs, stacked
from keysync_jax.pipeline.sampling import Windows, sample_windows
from keysync_jax.typing import Array, Params

BOUNDS: dict[str, dict[str, float]] = {
    "fp32": {"cond": 1e-4, "network": 1e-4, "denoised": 1e-4, "sample": 1e-3}
    | {"train_loss": 1e-5, "grad": 1e-3, "vae": 1e-4},
    "bf16": {"cond": 2e-2, "network": 5e-2, "denoised": 5e-2, "sample": 1e-1}
    | {"train_loss": 2e-2, "grad": 1e-1, "vae": 5e-2},
}
"""Largest allowed error relative to the array's maximum, by dtype and kind of entry.

A gradient that is a single number has no bound in bf16: it is a sum in which nearly everything cancels,
so its error has no relation to its size.
"""


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
      error: largest absolute difference from the reference.
      scale: largest absolute value of the reference.
      bound: allowed error / scale.
    """

    entry: str
    error: float
    scale: float
    bound: float

    @property
    def relative(self) -> float:
        return self.error / self.scale if self.scale else self.error

    @property
    def ok(self) -> bool:
        return self.relative <= self.bound  # False for a NaN


def compare(prefix: str | Path, dtype: Dtype = "fp32") -> Iterator[Comparison]:
    """Runs every entry of a golden file, network after network.

    Args:
      prefix: path without `.manifest.json` and `.safetensors`.
      dtype: "fp32" or "bf16", of the computation, as `dub` and `train` compute in it.

    Raises:
      UserError: a file is missing or an entry is none that this program knows.
    """
    golden = Golden(prefix)
    known = {name: golden.outputs(name) for name in ("keyframe", "interpolation", "vae")}
    for entry in golden.stored:
        if "/in/" not in entry and not _kind(entry):
            raise UserError(f"{golden.stored.path}: entry {entry!r} is none that this program can run")
    runners: dict[str, Callable[[], Callable[[str], Array]]] = {
        "keyframe": lambda: _StageEntries(golden, "keyframe", dtype),
        "interpolation": lambda: _StageEntries(golden, "interpolation", dtype),
        "vae": lambda: _VAEEntries(golden, dtype),
    }
    for name in (n for n, entries in known.items() if entries):
        run = runners[name]()
        for entry in known[name]:
            with computing(dtype):
                ours = np.asarray(run(entry.partition("/")[2]), np.float32)
            bound = BOUNDS[dtype][_kind(entry)]
            if dtype == "bf16" and _kind(entry) == "grad" and ours.size == 1:
                bound = math.inf
            yield _comparison(entry, ours, golden.stored[entry], bound)


def report(comparisons: Iterator[Comparison], write: Callable[[str], object] = print) -> bool:
    """Writes the table row by row; True if every entry is within its bound."""
    write(f"{'entry':<83} {'max abs err':>12} {'rel to max':>11} {'bound':>8}  verdict")
    results = []
    for c in comparisons:
        verdict = ("ok" if math.isfinite(c.bound) else "no bound") if c.ok else "EXCEEDED"
        write(f"{c.entry:<83} {c.error:12.3e} {c.relative:11.3e} {c.bound:8.0e}  {verdict}")
        results.append(c.ok)
    write(f"{sum(results)} of {len(results)} entries within their bounds")
    return bool(results) and all(results)


def _comparison(entry: str, ours: np.ndarray, reference: np.ndarray, bound: float) -> Comparison:
    if ours.shape != reference.shape:
        raise UserError(f"{entry}: the reference has shape {reference.shape}, the manifest's {ours.shape}")
    error = float(np.abs(ours - reference).max())
    return Comparison(entry, error, float(np.abs(reference).max()), bound)


def _kind(entry: str) -> str:
    """The kind of an entry `network/group/name`, empty if it is none that we know."""
    network, group, name = [*entry.split("/", 2), "", ""][:3]
    if network not in ("keyframe", "interpolation", "vae"):
        return ""
    if network == "vae":
        return "vae" if name == "moments" or name.startswith("decoded_t") else ""
    if group == "grad":
        return "grad"
    if group in ("cond", "uncond"):
        return "cond" if name in ("concat", "crossattn") else ""
    if group == "out" and name.startswith("denoised_"):
        return "denoised"
    kinds = {"sample_audio_ref": "sample", "sample_cfg": "sample"}
    kinds |= {"network": "network", "train_loss": "train_loss"}
    return kinds.get(name, "") if group == "out" else ""


class _StageEntries:
    """What we compute for each entry of a stage, in torch's layout."""

    def __init__(self, golden: Golden, kind: StageKind, dtype: str):
        self.golden, self.config = golden, golden.stage_config(kind)
        # The backward pass keeps as little as it can, so that full size fits in memory.
        graphdef, abstract = shapes(
            lambda rngs: stage(self.config, dtype=DTYPES[dtype], remat="layer", rngs=rngs)
        )
        wanted = {k: v.shape for k, v in abstract.items()}
        table = stage_table(self.config, wanted)
        self.graphdef, self.rows = graphdef, {row.torch: row for row in table.rows}
        self.params = golden.params(kind, table, wanted, jnp.asarray)
        self.x = StageInputs(golden, self.config)

    def __call__(self, entry: str) -> Array:
        group, name = entry.split("/", 1)
        if group == "grad":
            row = self.rows[name]
            return row.op.to_torch(np.asarray(self._loss_and_gradients[1][row.path]))
        if group in ("cond", "uncond"):
            return self._condition(name, dropped=group == "uncond")
        if name.startswith("denoised_"):
            return self._denoised_at(self.x.denoiser_sigmas[int(name.removeprefix("denoised_"))])
        scales = self.golden.config.get("guidance", {"audio": 5.0, "identity": 2.0})
        return {
            "network": self._network,
            "train_loss": lambda: self._loss_and_gradients[0][None],
            "sample_audio_ref": lambda: self._sampled(Separated(scales["audio"], scales["identity"])),
            "sample_cfg": lambda: self._sampled(ClassifierFree(self.golden.config.get("cfg_scale", 2.0))),
        }[name]()

    def _condition(self, name: str, dropped: bool) -> Array:
        if name == "crossattn":
            project = jax.jit(lambda p: bind(self.graphdef, p).project_audio(self.x.audio))
            audio = project(self.params)
            return jnp.zeros_like(audio) if dropped else audio
        reference = np.zeros_like(self.x.reference) if dropped else self.x.reference
        # The reference keeps the two ends of a window side by side in the channel axis.
        return np.moveaxis(reference, -1, 2).reshape(len(reference), -1, *reference.shape[2:4])

    def _network(self) -> Array:
        @jax.jit
        def run(params: Params) -> Array:
            model = bind(self.graphdef, params)
            return model(self.x.x, self.x.c_noise, model.project_audio(self.x.audio), self.x.reference)

        return stacked(run(self.params))

    def _denoised(self, params: Params, noisy: Array, sigma: Array) -> Array:
        model = bind(self.graphdef, params)
        audio = model.project_audio(self.x.audio)

        def network(x: Array, c_noise: Array) -> Array:
            return model(x, c_noise, audio, self.x.reference)

        return precond.denoise(network, noisy, sigma, self.x.gt, self.x.mask)

    @cached_property
    def _jitted_denoised(self) -> Any:
        return jax.jit(self._denoised)

    def _denoised_at(self, level: np.float32) -> Array:
        sigma = jnp.full(len(self.x.x), level)
        return stacked(self._jitted_denoised(self.params, self.x.x * level, sigma))

    def _sampled(self, guidance: Guidance) -> Array:
        windows = Windows(self.x.noise, self.x.audio, self.x.reference, self.x.gt, self.x.mask)
        sigmas = jnp.asarray(align_your_steps(), jnp.float32)
        return stacked(sample_windows(self.graphdef, self.params, windows, guidance, sigmas))

    @cached_property
    def _loss_and_gradients(self) -> tuple[Array, dict[str, Array]]:
        """One backward pass, to the tensors alone whose gradients are stored."""

        def loss(some: Params, rest: Params) -> Array:
            sigma = jnp.asarray(self.x.train_sigmas)
            noisy = losses.noised(self.x.gt, self.x.noise, sigma)
            out = self._denoised({**rest, **some}, noisy, sigma)
            return losses.latent_loss(out, self.x.gt, sigma).mean()

        outputs = self.golden.outputs(self.config.kind)
        paths = {self.rows[e.split("/", 2)[2]].path for e in outputs if e.split("/")[1] == "grad"}
        some = {k: v for k, v in self.params.items() if k in paths}
        rest = {k: v for k, v in self.params.items() if k not in paths}
        # Not under jit: the parts run as programs of their own (nn/remat.py).
        return jax.value_and_grad(loss)(some, rest)


class _VAEEntries:
    """What we compute for each entry of the VAE, in torch's layout."""

    def __init__(self, golden: Golden, dtype: str):
        self.config = golden.vae_config()
        graphdef, abstract = shapes(lambda rngs: VAE(self.config, dtype=DTYPES[dtype], rngs=rngs))
        wanted = {k: v.shape for k, v in abstract.items()}
        self.graphdef = graphdef
        self.params = golden.params("first_stage", engine_vae_table(self.config, wanted), wanted, jnp.asarray)
        self.golden = golden

    def __call__(self, entry: str) -> Array:
        name = entry.partition("/")[2]
        n, _, height, width = self.golden.shape("vae", name) or ()
        factor = self.config.factor
        if name == "moments":
            frames = self.golden.input("vae", "frames", (n, 3, height * factor, width * factor))
            frames = frames if "vae/in/frames" in self.golden.stored else np.tanh(frames)
            encode = jax.jit(lambda p, x: jnp.concatenate(bind(self.graphdef, p).encode(x), axis=-1))
            return np.moveaxis(np.asarray(encode(self.params, np.moveaxis(frames, 1, -1))), -1, 1)
        together = int(name.removeprefix("decoded_t"))
        z = self.golden.input("vae", "z", (n, self.config.latent_channels, height // factor, width // factor))
        clips = np.moveaxis(z, 1, -1).reshape(n // together, together, *z.shape[2:], z.shape[1])
        clips = clips * self.config.scale_factor
        decode = jax.jit(lambda p, z: bind(self.graphdef, p).decode(z))
        return stacked(np.concatenate([np.asarray(decode(self.params, clip[None])) for clip in clips]))
