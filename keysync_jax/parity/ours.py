"""What our networks compute for each entry of a golden file, in torch's layout."""

import math
from collections.abc import Collection, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.config import Dtype, Remat, StageKind
from keysync_jax.diffusion import loss as losses
from keysync_jax.diffusion import precond
from keysync_jax.diffusion.guidance import ClassifierFree, Guidance, Separated
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.model import DTYPES as MODEL_DTYPES
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.layers import Record
from keysync_jax.parity import engine
from keysync_jax.parity.golden import Golden, StageInputs, stacked
from keysync_jax.pipeline.sampling import Windows, sample_steps, sample_windows
from keysync_jax.typing import Array, Params

DTYPES: dict[str, Any] = MODEL_DTYPES | {"fp16": jnp.float16}
"""Dtype of the arrays of a network; fp16 is here to be compared alone: a dub computes in fp32 or bf16."""

PRODUCTS: dict[str, Dtype] = {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16", "fp16": "bf16"}
"""Name -> the dtype whose precision of products (`backend.computing`) counts."""


def watch(model: Any, record: Record, entries: Collection[str]) -> None:
    """Lets layers of a bound model note what they return in `record`, each that has an entry `layer/PATH`."""
    for path, part in list(nnx.iter_modules(model)):
        entry = "layer/" + ".".join(map(str, path))
        if entry in entries:
            part.__class__ = _watched(type(part), entry, record)


def _watched(kind: type, entry: str, record: Record) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.__call__(self, *args, **kwargs)
        record.setdefault(entry, out)
        return out

    return type(kind.__name__, (kind,), {"__call__": call})


def torch_layout(entry: str, x: Array, shape: tuple[int, ...]) -> np.ndarray:
    """An intermediate with its channels last, in the shape that the release's module returns.

    What depends on the window alone, or on the frame's number alone, we compute once; the release computes it
    for every frame or pixel of a window, or for every window.
    """
    y = np.asarray(x, np.float32)
    times = max(1, math.prod(shape) // y.size)
    y = np.tile(y, (times, 1)) if ".time_pos_embed." in entry else np.repeat(y, times, axis=0)
    if len(shape) < 4:
        return y.reshape(shape)
    return np.moveaxis(y.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


class StageNetwork:
    """A stage: `network(entry)` with the entries of `golden.py` below the stage's name."""

    def __init__(self, golden: Golden, kind: StageKind, dtype: str, inputs: bool = True):
        self.golden, self.config = golden, golden.stage_config(kind)
        self.name, self.dtype = dtype, DTYPES[dtype]
        # A large network's backward pass keeps as little as it can.
        self.large = engine.is_large(self.config)
        remat: Remat = "layer" if self.large else "none"
        self.graphdef, _ = shapes(engine.make(self.config, self.dtype, remat))
        self.table, wanted = engine.table_of(self.config)
        self.params = golden.params(kind, self.table, wanted, jnp.asarray)
        if inputs:
            self.x = StageInputs(golden, self.config)

    def __call__(self, entry: str) -> Array:
        group, _, name = entry.partition("/")
        if group in ("cond", "uncond"):
            return self._condition(name, dropped=group == "uncond")
        if group in ("block", "layer"):
            return torch_layout(
                entry, self._recorded[entry], self.golden.stored.shapes[f"{self.config.kind}/{entry}"]
            )
        if group == "step":
            step, _, what = name.partition("/")
            return stacked(self._steps[what][int(step)])
        if group == "grad":
            return self._in_torch(name, self._loss_and_gradients[1])
        if group == "train":
            return self._training(name)
        return self._output(name)

    def _output(self, name: str) -> Array:
        if name.startswith("denoised_"):
            return self._denoised_at(self.x.denoiser_sigmas[int(name.removeprefix("denoised_"))])
        outputs = {
            "network": self._network,
            "train_loss": lambda: self._loss_and_gradients[0][None],
            "sample_audio_ref": lambda: self._sampled(self._separated),
            "sample_cfg": lambda: self._sampled(ClassifierFree(self.golden.config.get("cfg_scale", 2.0))),
        }
        return outputs[name]()

    def _condition(self, name: str, dropped: bool) -> Array:
        if name == "crossattn":
            project = jax.jit(lambda p: bind(self.graphdef, p).project_audio(self.x.audio))
            audio = project(self.params)
            return jnp.zeros_like(audio) if dropped else audio
        reference = np.zeros_like(self.x.reference) if dropped else self.x.reference
        # The reference keeps the two ends of a window side by side in the channel axis.
        return np.moveaxis(reference, -1, 2).reshape(len(reference), -1, *reference.shape[2:4])

    def _network(self) -> Array:
        return stacked(self._jitted_network(self.params, self.x.x, self.x.c_noise))

    @cached_property
    def _jitted_network(self) -> Any:
        @jax.jit
        def run(params: Params, x: Array, c_noise: Array) -> Array:
            model = bind(self.graphdef, params)
            return model(x, c_noise, model.project_audio(self.x.audio), self.x.reference)

        return run

    @cached_property
    def _recorded(self) -> dict[str, Array]:
        """Every intermediate that is stored, as the network returns it."""
        prefix = f"{self.config.kind}/"
        wanted = [e.removeprefix(prefix) for e in self.golden.outputs(self.config.kind)]
        # What the backward pass would compute again cannot be noted.
        graphdef, _ = shapes(engine.make(self.config, self.dtype))

        @jax.jit
        def run(params: Params) -> dict[str, Array]:
            model, blocks, record = bind(graphdef, params), {}, {}  # type: tuple[Any, Record, Record]
            watch(model, record, wanted)
            audio = model.project_audio(self.x.audio)
            model(self.x.x, self.x.c_noise, audio, self.x.reference, record=blocks)
            record |= {f"block/{name}": x for name, x in blocks.items()}
            return {entry: record[entry] for entry in wanted if entry in record}

        return run(self.params)

    def _denoised(self, params: Params, noisy: Array, sigma: Array) -> Array:
        model = bind(self.graphdef, params)
        audio = model.project_audio(self.x.audio)

        def network(x: Array, c_noise: Array) -> Array:
            return model(x, c_noise, audio, self.x.reference)

        return precond.denoise(network, noisy, sigma, self.x.gt, self.x.mask)

    def _denoised_at(self, level: np.float32) -> Array:
        sigma = jnp.full(len(self.x.x), level)
        network = partial(self._jitted_network, self.params)
        return stacked(precond.denoise(network, self.x.x * level, sigma, self.x.gt, self.x.mask))

    @property
    def _separated(self) -> Separated:
        scales = self.golden.config.get("guidance", {"audio": 5.0, "identity": 2.0})
        return Separated(scales["audio"], scales["identity"])

    @property
    def _windows(self) -> Windows:
        return Windows(self.x.noise, self.x.audio, self.x.reference, self.x.gt, self.x.mask)

    def _sampled(self, guidance: Guidance) -> Array:
        sigmas = jnp.asarray(align_your_steps(), jnp.float32)
        return stacked(sample_windows(self.graphdef, self.params, self._windows, guidance, sigmas))

    @cached_property
    def _steps(self) -> dict[str, Array]:
        sigmas = jnp.asarray(align_your_steps(), jnp.float32)
        x, clean = sample_steps(self.graphdef, self.params, self._windows, self._separated, sigmas)
        return {"x": x, "denoised": clean}

    @cached_property
    def _loss_and_gradients(self) -> tuple[Array, dict[str, Array]]:
        """The latent loss without drops."""

        def loss(params: Params) -> Array:
            sigma = jnp.asarray(self.x.train_sigmas)
            noisy = losses.noised(self.x.gt, self.x.noise, sigma)
            out = self._denoised(params, noisy, sigma)
            return losses.latent_loss(out, self.x.gt, sigma).mean()

        return self._differentiated(loss, "grad/")

    def _differentiated(self, loss: Any, group: str, has_aux: bool = False) -> Any:
        """One backward pass, to the tensors alone whose gradients are stored in a group."""
        prefix = f"{self.config.kind}/{group}"
        stored = {
            e.removeprefix(prefix) for e in self.golden.outputs(self.config.kind) if e.startswith(prefix)
        }
        paths = {row.path for row in self.table.rows if row.torch in stored}
        some = {k: v for k, v in self.params.items() if k in paths}
        rest = {k: v for k, v in self.params.items() if k not in paths}
        differentiated = jax.value_and_grad(lambda p: loss({**rest, **p}), has_aux=has_aux)
        # Parts of a large network run as programs of their own (nn/remat.py).
        return (differentiated if self.large else jax.jit(differentiated))(some)

    def _in_torch(self, name: str, gradients: Mapping[str, Array]) -> np.ndarray:
        row = next(row for row in self.table.rows if row.torch == name)
        return row.op.to_torch(np.asarray(gradients[row.path]))

    def _training(self, name: str) -> Array:
        (_, metrics), gradients = self._step
        if name.startswith("grad/"):
            return self._in_torch(name.removeprefix("grad/"), gradients)
        return metrics[name][None]

    @cached_property
    def _step(self) -> Any:
        """A batch through the training step's own objective, its draws given."""
        from keysync_jax.train.config import LossConfig
        from keysync_jax.train.step import Clips, Noise, objective

        vae = VAENetwork(self.golden, self.name)
        x, draws = self.x, self.x.draws()
        clips = Clips(x.gt, x.reference, x.audio, x.mask, draws.frame, draws.frame_index)
        noise = Noise(jnp.asarray(x.train_sigmas), x.noise, draws.keep_audio, draws.keep_reference)

        def loss(params: Params) -> tuple[Array, dict[str, Array]]:
            model, decoder = bind(self.graphdef, params), bind(vae.graphdef, vae.params)
            return objective(LossConfig(), model, decoder, clips, noise)

        return self._differentiated(loss, "train/grad/", has_aux=True)


class VAENetwork:
    """The VAE, likewise."""

    def __init__(self, golden: Golden, dtype: str):
        self.golden, self.config = golden, golden.vae_config()
        self.graphdef, _ = shapes(engine.make(self.config, DTYPES[dtype]))
        table, wanted = engine.table_of(self.config)
        self.params = golden.params("first_stage", table, wanted, jnp.asarray)

    def __call__(self, entry: str) -> Array:
        group, _, name = entry.partition("/")
        if group in ("block", "layer"):
            return torch_layout(entry, self._recorded[entry], self.golden.stored.shapes[f"vae/{entry}"])
        if name == "moments":
            return np.moveaxis(np.asarray(self._encoded[0]), -1, 1)
        return stacked(self._decoded(int(name.removeprefix("decoded_t")))[0])

    @cached_property
    def _recorded(self) -> dict[str, Array]:
        return self._encoded[1] | self._decoded(4)[1]

    @cached_property
    def _encoded(self) -> tuple[Array, dict[str, Array]]:
        n, _, height, width = self.golden.shape("vae", "moments") or ()
        factor = self.config.factor
        frames = self.golden.input("vae", "frames", (n, 3, height * factor, width * factor))
        frames = frames if "vae/in/frames" in self.golden.stored else np.tanh(frames)

        def encode(model: Any, frames: Array, record: Record) -> Array:
            return jnp.concatenate(model.encode(frames, record), axis=-1)

        return self._jitted(encode)(self.params, np.moveaxis(frames, 1, -1))

    def _decoded(self, together: int) -> tuple[np.ndarray, dict[str, Array]]:
        """Frames decoded so many together, and the intermediates of the first so many."""
        n, _, height, width = self.golden.shape("vae", f"decoded_t{together}") or ()
        factor = self.config.factor
        z = self.golden.input("vae", "z", (n, self.config.latent_channels, height // factor, width // factor))
        clips = np.moveaxis(z, 1, -1).reshape(n // together, together, *z.shape[2:], z.shape[1])
        decode = self._jitted(lambda model, z, record: model.decode(z, record))
        parts = [decode(self.params, clip[None] * np.float32(self.config.scale_factor)) for clip in clips]
        return np.concatenate([np.asarray(frames) for frames, _ in parts]), parts[0][1]

    def _jitted(self, call: Any) -> Any:
        """A call of the bound model: (params, x) -> its result, and what it records of the stored entries."""
        wanted = [e.removeprefix("vae/") for e in self.golden.outputs("vae")]

        @jax.jit
        def run(params: Params, x: Array) -> tuple[Array, dict[str, Array]]:
            model, blocks, record = bind(self.graphdef, params), {}, {}  # type: tuple[Any, Record, Record]
            watch(model, record, wanted)
            out = call(model, x, blocks)
            record |= {f"block/{name}": x for name, x in blocks.items()}
            return out, {entry: record[entry] for entry in wanted if entry in record}

        return run
