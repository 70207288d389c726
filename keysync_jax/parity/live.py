"""Golden numbers made now, by the release itself: `keysync parity --reference CHECKOUT --python PYTHON`.

The release gets the same weights and inputs as we do, written as files, and runs in its own environment
(`release`, `capture`). It has ended, and its memory is free, before our networks run.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from keysync_jax.config import StageConfig, VAEConfig, to_dict
from keysync_jax.errors import UserError
from keysync_jax.files import write_json
from keysync_jax.parity import engine
from keysync_jax.parity.bounds import ROUNDING, distance, largest_floors, scales
from keysync_jax.parity.compare import compare
from keysync_jax.parity.golden import RuleWeights
from keysync_jax.parity.inputs import inputs
from keysync_jax.parity.release import Outputs, Release
from keysync_jax.parity.report import held, report, write_report
from keysync_jax.parity.sizes import SIZES, STAGES, Networks, of_model
from keysync_jax.tensorfile import TensorFile, write_tensors

NETWORKS = (*STAGES, "vae")

PRECISIONS = {
    **{name: dict.fromkeys(NETWORKS, name) for name in ("fp32", "tf32", "bf16", "fp16")},
    "infer_raw": {"keyframe": "fp16", "interpolation": "fp16", "vae": "tf32"},
    "inference": {"keyframe": "tf32", "interpolation": "fp16", "vae": "tf32"},
    "train": dict.fromkeys(NETWORKS, "medium"),
}
"""What the release computes each network in: one precision for all, or that of one of its scripts.

fp32: TF32 off; tf32: PyTorch's default, in convolutions alone; medium: in matrices too, as main.py sets;
bf16, fp16: autocast. The scripts decode outside autocast. `infer_raw` and `inference` are scripts/NAME.sh,
`train` is train_keyframe.sh and train_interpolation.sh."""

EXACT = dict.fromkeys(NETWORKS, "fp64")

GPU_ONLY = {"tf32", "train"}
"""Precisions of which nothing is left on a CPU."""

Say = Callable[[str], object]


def our_precision(precision: str, device: str) -> dict[str, str]:
    """What we compute each network in, beside the release in a precision of `PRECISIONS`.

    On a CPU we have no TF32 and compute in fp32; the release's is emulated (`capture`).
    """
    tf32 = "fp32" if device == "cpu" else "tf32"
    return {network: name.replace("tf32", tf32) for network, name in _stated(precision).items()}


def _stated(precision: str) -> dict[str, str]:
    """The release's precision of each network and of the whole pipeline, by a name of `bounds.ROUNDING`."""
    networks = {network: name.replace("medium", "tf32") for network, name in PRECISIONS[precision].items()}
    return networks | {"clip": max(networks.values(), key=lambda name: ROUNDING[name])}


@dataclass(frozen=True)
class Request:
    """What the release is to compute.

    Attributes:
      precision: a name of `PRECISIONS`.
      training: the loss of a batch and its gradients too.
      layers: every single layer beside the blocks.
      samplers: both sampling loops, with every step.
      clip: what `clip.clip_inputs` made of a clip, for the whole pipeline; empty for none.
    """

    networks: Networks
    precision: str = "fp32"
    training: bool = False
    layers: bool = False
    samplers: bool = True
    clip: Mapping[str, np.ndarray] = field(default_factory=dict)


def networks(model: Path | None, size: str) -> Networks:
    """Those of a model directory, or of a size with weights by the rule."""
    return SIZES[size]() if model is None else of_model(model)


def compare_live(release: Release, request: Request, folder: Path, exact: bool, say: Say) -> bool:
    """Runs the release, then ours, and writes what `make_golden` and `write_report` write.

    Returns:
      Whether every entry is within its bound.

    Raises:
      UserError: as `make_golden`.
    """
    check_device(release)
    prefix = make_golden(release, request, folder, exact, say)
    about = json.loads(Path(f"{prefix}.manifest.json").read_bytes())["release"]
    notes = [*about.pop("notes"), *_described(about)]
    for sentence in _described(about):
        say(sentence)
    done = report(compare(prefix, our_precision(request.precision, release.device)), say)
    title = f"{request.networks.size}, {request.precision}, {about['device']}"
    write_report(folder, done, {"title": title, "notes": notes, **about})
    return held(done)


def _described(about: Mapping[str, Any]) -> list[str]:
    """Sentences about the release's environment."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    sentences = [f"The release ran on {about['device']} with {versions}, in {about['seconds']:.0f} s."]
    if about["device"] == "cpu" and "tf32" in PRECISIONS[about["precision"]].values():
        sentences.append(
            "TF32 is emulated: the operands of its convolutions are rounded. Ours is in fp32 there."
        )
    missing = [name for name in about["stand_ins"] if name != "xformers"]
    if "xformers" in about["stand_ins"]:
        sentences.append("Attention is torch's scaled_dot_product_attention, in xformers' place.")
    if missing:
        sentences.append(f"Missing there, not called, empty modules in their place: {', '.join(missing)}.")
    return sentences


def make_golden(release: Release, request: Request, folder: Path, exact: bool, say: Say) -> Path:
    """Runs the release and writes golden files of what it computed.

    Args:
      folder: is there; gets `live.*`.
      exact: runs the release in fp64 as well.

    Returns:
      The prefix of the golden files.

    Raises:
      UserError: the release cannot be run, or left something else than was asked for.
    """
    precision = PRECISIONS[request.precision]
    if release.device == "cpu" and request.precision in GPU_ONLY:
        raise UserError(f"{request.precision}: TF32 is a way in which GPUs multiply; a CPU has none")
    if release.device == "cpu" and "tf32" in precision.values() and not exact:
        raise UserError(
            f"{request.precision}: we have no TF32 on a CPU to compare but with the exact numbers"
        )
    runs = {"live": precision} | ({"live.exact": EXACT} if exact else {})
    with _runs(release, request, folder, say) as run:
        for name, precisions in runs.items():
            with run(precisions) as (answer, outputs, given):
                write_tensors(folder / f"{name}.safetensors", outputs | (given if name == "live" else {}))
                if name == "live":
                    write_json(folder / "live.manifest.json", _manifest(request, answer))
    return folder / "live"


def measure_floors(release: Release, request: Request, folder: Path, say: Say) -> dict[str, dict[str, float]]:
    """The largest distance between the release in a precision and in fp64, by precision and kind of entry.

    On a CPU, TF32 is emulated: the operands of convolutions are rounded.

    Raises:
      UserError: as `make_golden`.
    """
    floors: dict[str, dict[str, float]] = {}
    with _runs(release, request, folder, say) as run, run(EXACT) as (_, exact, _):
        scale = scales(exact, exact)
        for precision in ROUNDING:
            with run(PRECISIONS[precision]) as (_, outputs, _):
                found = {e: distance(x, exact[e], scale[e]) for e, x in outputs.items()}
            rounded = {kind: float(f"{floor:.2e}") for kind, floor in largest_floors(found).items()}
            floors[precision] = rounded
    return floors


@contextmanager
def _runs(release: Release, request: Request, folder: Path, say: Say) -> Iterator[Any]:
    """Weights and inputs on disk, and a function that runs the release on them in given precisions."""
    for network in NETWORKS:
        engine.check(request.networks[network])
    for sentence in release.check():
        say(f"note: {sentence}")
    work = folder / "work"
    work.mkdir()
    say(f"writing weights and inputs ({request.networks.size})")
    given = inputs(request.networks) | _quant_conv(request.networks) | dict(request.clip)
    write_tensors(work / "inputs.safetensors", given)
    for network in NETWORKS:
        write_tensors(work / f"{network}.safetensors", weights(request.networks, network))

    @contextmanager
    def run(precisions: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], Outputs, Outputs]]:
        names = "-".join(sorted(set(precisions.values())))
        say(f"the release computes in {names.replace('-', ', ')}")
        answer, outputs = release.run(_asked(release, request, precisions, work), work / names)
        yield answer | {"notes": release.check()}, outputs, given
        shutil.rmtree(work / names)

    yield run
    shutil.rmtree(work)


def check_device(release: Release) -> None:
    """Refuses to compare numbers of two kinds of device."""
    ours = jax.default_backend()
    if (ours == "gpu") != (release.device == "cuda"):
        raise UserError(
            f"the release is to run on {release.device}, but JAX computes on {ours}; give --device"
        )


def weights(networks: Networks, network: str) -> Mapping[str, np.ndarray]:
    """A network's tensors under the engine's names, made or converted when they are read."""
    config = networks[network]
    if networks.model is None:
        return RuleWeights(engine.torch_shapes(config))
    return _ModelWeights(TensorFile(networks.model / f"{network}.safetensors"), config)


class _ModelWeights(Mapping[str, np.ndarray]):
    """A component of a model directory under the engine's names, in fp32."""

    def __init__(self, file: TensorFile, config: StageConfig | VAEConfig):
        table, _ = engine.table_of(config)
        self.file, self.rows = file, {row.torch: row for row in table.rows}

    def __getitem__(self, key: str) -> np.ndarray:
        row = self.rows[key]
        return np.ascontiguousarray(row.op.to_torch(np.asarray(self.file[row.path]).astype(np.float32)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _quant_conv(networks: Networks) -> Outputs:
    """The VAE's quant convolution as an input: the engine's layout has no place for it."""
    if not networks.vae.quant_conv:
        return {}
    tensors, key = weights(networks, "vae"), "first_stage_model.quant_conv."
    return {f"vae/in/quant_conv.{part}": np.asarray(tensors[key + part]) for part in ("weight", "bias")}


def _asked(release: Release, request: Request, precisions: Mapping[str, str], work: Path) -> dict[str, Any]:
    """The request of one run, as `capture` reads it."""
    return {
        "inputs": str((work / "inputs.safetensors").resolve()),
        "exact": "fp64" in precisions.values(),
        "networks": [_part(release, request, name, precisions[name], work) for name in NETWORKS],
        "clip": _clip_part(precisions) if request.clip else None,
    }


def _clip_part(precisions: Mapping[str, str]) -> dict[str, Any]:
    return {"network": "clip", "modules": {}, "precision": dict(precisions)}


def _part(release: Release, request: Request, network: str, precision: str, work: Path) -> dict[str, Any]:
    config, networks = request.networks[network], request.networks
    modules = engine.blocks(config) | (engine.layers(config) if request.layers else engine.outside(config))
    settings = engine.vae_settings(networks.vae)
    files = ["vae.safetensors"]
    part: dict[str, Any] = {"network": network, "precision": precision, "modules": modules}
    if isinstance(config, StageConfig):
        # What the backward pass would have to keep at full size is more than any device has.
        settings |= engine.stage_settings(config, release.device, checkpointed=engine.is_large(config))
        files = [f"{network}.safetensors", *files]
        part |= {"samplers": request.samplers, "cfg_scale": 2.0}
        part["gradients"] = gradients(config) if request.training else []
        part["training_settings"] = engine.training_settings(config)
    config_name = network if isinstance(config, StageConfig) else "keyframe"
    return part | {
        "config": f"scripts/sampling/configs/{config_name}.yaml",
        "settings": settings,
        "weights": [str((work / name).resolve()) for name in files],
    }


def gradients(config: StageConfig) -> list[str]:
    """Names of the tensors whose gradients are compared: all; of a large network the first of each part."""
    names = list(engine.torch_shapes(config))
    if not engine.is_large(config):
        return names
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(".".join(name.split(".")[:5]), name)
    return list(first.values())


def _manifest(request: Request, answer: Mapping[str, Any]) -> dict[str, Any]:
    networks = request.networks
    tensors = {
        "keyframe": networks.keyframe,
        "interpolation": networks.interpolation,
        "first_stage": networks.vae,
    }
    return {
        "config": {name: to_dict(networks[name]) for name in NETWORKS} | {"batch": networks.clips},
        "tensors": {k: engine.torch_shapes(c) for k, c in tensors.items()} if networks.model is None else {},
        "model": str(networks.model or ""),
        "order": [f"{network}/{entry}" for network, entries in answer["orders"].items() for entry in entries],
        "precision": _stated(request.precision),
        "release": {k: v for k, v in answer.items() if k != "orders"}
        | {"size": networks.size, "precision": request.precision},
    }
