"""What the release computes, written down in its own environment: `PYTHON -s capture.py FOLDER`.

It imports torch, safetensors and the release, and nothing of keysync_jax. `request.json` in FOLDER, which
`live.py` writes, names the files of inputs and weights. The answer is `NETWORK.safetensors` for each network,
and at last `answer.json`; where it cannot go on, `failure.json` has one sentence. Arrays are in torch's
layout; names are those of golden files (`golden.py`).
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NEEDED = ("torch", "safetensors", "numpy", "einops", "omegaconf", "pytorch_lightning", "packaging", "scipy")
"""What the networks compute with."""

UNUSED = (
    *("torchvision", "torchaudio", "diffusers", "transformers", "kornia", "open_clip", "facenet_pytorch"),
    *("insightface", "lpips", "moviepy.editor", "cv2", "fsspec", "PIL", "requests", "tqdm", "fire"),
    "xformers.ops",
)
"""What the release imports beside them and does not call here; empty modules stand in for what is missing.
(xformers it does call: its stand-in computes the same attention with torch.)"""

TRAINING = {
    "keyframe": "configs/example_training/keyframes/keyframes_dub.yaml",
    "interpolation": "configs/example_training/interpolation/interpolation_dub.yaml",
}


class Refused(Exception):  # noqa: N818 -- it is an answer
    """The capture cannot be made; the message is one sentence."""


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that are missing: whatever is asked of them is an empty class."""

    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        def empty(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": lambda self, *_, **__: None})

        module.__getattr__ = empty  # type: ignore[method-assign]


def check_packages() -> None:
    """Refuses an environment without what the networks compute with."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = [name.replace("_", "-") for name in missing]
        raise Refused(f"{sys.executable} has no {', '.join(names)}; pip install {' '.join(names)}")


def unusable_packages(attention: str) -> list[str]:
    """Packages that need a stand-in, missing or broken; xformers too where torch's attention is wanted."""
    unusable = ["xformers"] if attention == "torch" else []
    for name in UNUSED:
        package = name.partition(".")[0]
        try:
            if package not in unusable:
                importlib.import_module(name)
        except Exception:  # whatever a package that is built for another machine raises
            unusable.append(package)
    return unusable


def import_release(checkout: Path, stand_ins: list[str]) -> None:
    """Makes `sgm` of the checkout importable, and imports it."""
    import torch

    sys.meta_path.insert(0, StandIns(stand_ins))
    for name in [m for m in sys.modules if m.partition(".")[0] in stand_ins]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    os.chdir(checkout)
    if "xformers" in stand_ins:
        operators = importlib.import_module("xformers.ops")
        sys.modules["xformers"].__version__ = "0.0.28"  # type: ignore[attr-defined]
        operators.memory_efficient_attention = (  # type: ignore[attr-defined]
            lambda q, k, v, attn_bias=None, op=None: torch.nn.functional.scaled_dot_product_attention(q, k, v)
        )
    try:
        importlib.import_module("sgm.models.diffusion")
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise Refused(f"the release cannot be imported: {error}") from error
    if not Path(sys.modules["sgm"].__file__ or "").resolve().is_relative_to(checkout.resolve()):
        raise Refused(f"sgm was imported from {sys.modules['sgm'].__file__}, not from {checkout}")


def choose_device(wanted: str) -> str:
    """Refuses a GPU that torch does not see."""
    import torch

    if wanted != "cpu" and not torch.cuda.is_available():
        raise Refused(f"{sys.executable}: its torch {torch.__version__} sees no CUDA device")
    return wanted


def make_exact() -> None:
    """Everything that the release computes from now on is fp64, also where it asks for fp32."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double


@contextlib.contextmanager
def computing(precision: str, device: str) -> Iterator[None]:
    """fp64, fp32, tf32 (PyTorch's default: convolutions), medium (matrices too), bf16 or fp16 (autocast)."""
    import torch

    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "medium")
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with contextlib.ExitStack() as stack:
        if half is not None:
            stack.enter_context(torch.amp.autocast(device, dtype=half))
        if precision == "tf32" and device == "cpu":
            stack.enter_context(_tf32_convolutions())
        yield


def _tf32_convolutions() -> Any:
    """What a GPU does to the operands of its convolutions in TF32: ten bits of mantissa stay."""
    import torch
    from torch.overrides import TorchFunctionMode

    def rounded(x: Any) -> Any:
        bits = x.detach().contiguous().view(torch.int32)
        near = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
        return x + (near - x).detach()  # exactly `near`, with the gradient of x

    class Rounding(TorchFunctionMode):
        def __torch_function__(self, f: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f in (torch.conv1d, torch.conv2d, torch.conv3d):
                args = (rounded(args[0]), rounded(args[1]), *args[2:])
            return f(*args, **(kwargs or {}))

    return Rounding()


class Book:
    """What was captured of one network, in the order in which it was computed."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def put(self, name: str, x: Any) -> None:
        import torch

        self.tensors[name] = x.detach().to("cpu", torch.get_default_dtype(), copy=True).contiguous()

    @contextlib.contextmanager
    def hooked(self, root: Any, modules: dict[str, str]) -> Iterator[None]:
        """Notes the first output of modules (entry -> its name below `root`) while the block runs."""
        handles = []
        for entry, name in modules.items():

            def note(module: Any, inputs: Any, out: Any, entry: str = entry) -> None:
                if entry not in self.tensors:
                    self.put(entry, out[0] if isinstance(out, tuple) else out)

            handles.append(root.get_submodule(name).register_forward_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def build(checkout: Path, part: dict[str, Any], device: str) -> Any:
    """One network of the release with all its weights; nothing may be missing or of another shape."""
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    params = OmegaConf.load(checkout / part["config"]).model.params
    for path, value in part["settings"].items():
        OmegaConf.update(params, path, value, force_add=True)
    if part["network"] == "vae":
        import torch

        network = torch.nn.Module()
        network.first_stage_model = instantiate_from_config(params.first_stage_config)
    else:
        from sgm.models.diffusion import DiffusionEngine

        network = DiffusionEngine(**{k: v for k, v in params.items() if k != "ckpt_path"})
    load(network, [Path(name) for name in part["weights"]])
    return network.to(device)


def load(network: Any, files: list[Path]) -> None:
    """Strict loading, but for a VAE's encoder beside a stage, which uses none."""
    tensors = {name: x for file in files for name, x in load_tensors(file).items()}
    wanted = network.state_dict()
    for name, x in wanted.items():
        if name not in tensors:
            raise Refused(f"the release's network has a tensor {name!r} that the weights lack")
        if tensors[name].shape != x.shape:
            shapes = f"{list(x.shape)}, the weights have {list(tensors[name].shape)}"
            raise Refused(f"the release's tensor {name!r} has shape {shapes}")
    surplus = [n for n in tensors if n not in wanted and not n.startswith("first_stage_model.")]
    if surplus:
        raise Refused(f"the weights have a tensor {surplus[0]!r} that the release's network lacks")
    network.load_state_dict({name: tensors[name] for name in wanted})


def load_tensors(file: Path) -> dict[str, Any]:
    """A file's tensors. Through numpy: safetensors asks torch what fp32 is, which `make_exact` changes."""
    import torch
    from safetensors.numpy import load_file

    return {name: torch.from_numpy(x) for name, x in load_file(file).items()}


class Inputs:
    """The inputs of one network, by name, on its device."""

    def __init__(self, file: Path, network: str, device: str):
        prefix = f"{network}/in/"
        self.tensors = {k[len(prefix) :]: x for k, x in load_tensors(file).items() if k.startswith(prefix)}
        self.device = device

    def __getitem__(self, name: str) -> Any:
        import torch

        return self.tensors[name].to(self.device, torch.get_default_dtype(), copy=True)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


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


CLIP_OPTIONS = {
    **{"cond_aug": 0.0, "decoding_t": 1, "resize_size": 512, "compute_until": 45, "audio_emb_type": "hubert"},
    **{"add_zero_flag": True, "n_batch": 3, "n_batch_keyframes": 3, "extra_audio": None, "recompute": True},
    "force_uc_zero_embeddings": ["cond_frames", "audio_emb"],
}
"""What scripts/inference.sh gives its pipeline."""


def clip_entries(part: dict[str, Any], engines: dict[str, Any], x: Inputs, book: Book) -> None:
    """The release's pipeline on a clip whose latents, features, landmarks and noise are given.

    Its files are written as its preparation would; the picture, of which it takes the size alone, is black.
    """
    import torch

    pipeline: Any = importlib.import_module("scripts.sampling.dubbing_pipeline")
    folder, latents = Path(part["folder"]), x["latents"]
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


def capture(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs every network of the request; returns what `answer.json` is to say."""
    check_packages()
    from safetensors.numpy import save_file

    began, checkout = time.time(), Path(request["checkout"])
    device = choose_device(request["device"])
    stand_ins = unusable_packages("torch" if device == "cpu" else request["attention"])
    if request["exact"]:
        make_exact()
    import_release(checkout, stand_ins)
    orders = {}
    for part in request["networks"]:
        name, precision = part["network"], part["precision"]
        x, book = Inputs(Path(request["inputs"]), name, device), Book()
        network = build(checkout, part, device)
        with computing(precision, device):
            if name == "vae":
                vae_entries(network, part, x, book)
            else:
                stage_entries(network, part, x, book)
                if part["gradients"]:
                    train_entries(network, part, x, book, checkout)
        del network
        save_file({k: tensor.numpy() for k, tensor in book.tensors.items()}, folder / f"{name}.safetensors")
        orders[name] = list(book.tensors)
    if request.get("clip"):
        parts = {part["network"]: part for part in request["networks"] if part["network"] != "vae"}
        engines = {name: build(checkout, part, device) for name, part in parts.items()}
        x, book = Inputs(Path(request["inputs"]), "clip", device), Book()
        clip_entries(request["clip"], engines, x, book)
        save_file({k: tensor.numpy() for k, tensor in book.tensors.items()}, folder / "clip.safetensors")
        orders["clip"] = list(book.tensors)
    return {"orders": orders, "stand_ins": stand_ins, "seconds": round(time.time() - began, 1)} | machine(
        device
    )


def machine(device: str) -> dict[str, Any]:
    """Versions, the device's name, and the most memory that was taken there."""
    import torch

    packages = ("torch", "xformers", "diffusers", "pytorch_lightning")
    answer: dict[str, Any] = {"versions": {name: _version(name) for name in packages}}
    if device == "cuda":
        return answer | {
            "device": torch.cuda.get_device_name(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return answer | {"device": "cpu", "peak_bytes": peak}


def _version(package: str) -> str:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def sentence_of(error: BaseException) -> str:
    """The sentence for an error that has one, else empty."""
    if isinstance(error, Refused):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "the release ran out of the GPU's memory; is another program on it?"
    if isinstance(error, MemoryError):
        return "the release ran out of memory"
    if isinstance(error, NotImplementedError) and "memory_efficient_attention" in str(error):
        return (
            f"xformers {_version('xformers')} cannot run attention here (it is built for another torch than "
            f"{_version('torch')}, or for another GPU); install one that fits, or give --attention torch"
        )
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        return (
            f"the release imports {name}, which {sys.executable} lacks; pip install {name.replace('_', '-')}"
        )
    return ""


def main(folder: Path) -> int:
    """Captures what the folder's request asks for; the exit code is 3 where a sentence says why not."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    request = json.loads((folder / "request.json").read_text())
    write: Callable[[str, Any], Any] = lambda name, x: (folder / name).write_text(json.dumps(x))  # noqa: E731
    try:
        answer = capture(folder, request)
    except Exception as error:
        sentence = sentence_of(error)
        if not sentence:
            raise
        write("failure.json", {"sentence": sentence})
        return 3
    write("answer.json", answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
