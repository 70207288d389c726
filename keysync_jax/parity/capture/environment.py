"""The release's environment: what it lacks, the import of the release, and sentences about its errors."""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import sys
import types
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
