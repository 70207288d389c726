"""Readers of checkpoint files and folders: whatever the container, a mapping of torch key -> numpy array.

The file's suffix says how its bytes are read (safetensors or a PyTorch pickle), its content says which
container it is. Nothing is renamed but the prefix that DeepSpeed's wrapper puts before every name.

Pickles are read with `torch.load(weights_only=True)` alone, which builds tensors and plain Python
values and refuses everything else; torch is imported only then.
"""

import argparse
import enum
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for
from keysync_jax.tensorfile import TensorFile

WRAPPER_PREFIX = "_forward_module."
"""What Lightning's DeepSpeed wrapper puts before every tensor's name."""


class Container(enum.Enum):
    """How the tensors of a checkpoint are packed."""

    SAFETENSORS = "safetensors"
    """A `.safetensors` file: tensors alone, under their names."""
    BARE = "bare"
    """A pickled dictionary name -> tensor; `.bin`, sometimes `.pt`."""
    LIGHTNING = "lightning"
    """A pickled training state with the tensors under `state_dict`; `.ckpt`."""
    DEEPSPEED = "deepspeed"
    """A pickled engine state with the tensors under `module`, `_forward_module.` before each name; `.pt`."""
    MICROSOFT = "microsoft"
    """WavLM as Microsoft released it: a pickle of `cfg` (the sizes) and `model` (the tensors); `.pt`."""
    TRANSFORMERS = "transformers"
    """A folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in shards."""
    DIFFUSERS = "diffusers"
    """The folder of one model of a pipeline (`unet/`, `vae/`): `config.json` and
    `diffusion_pytorch_model.safetensors` or `.bin`, whole or in shards, perhaps as variant `fp16`."""


# Where a pickled container keeps its tensors; the first whose keys are all there.
_PACKED = (
    (Container.DEEPSPEED, "module", ()),
    (Container.LIGHTNING, "state_dict", ()),
    (Container.MICROSOFT, "model", ("cfg",)),
)
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".model", ".pt", ".pth")
_WEIGHTS = {
    Container.TRANSFORMERS: ("model.safetensors", "pytorch_model.bin"),
    Container.DIFFUSERS: ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint, torch key -> read-only numpy array with the file's own dtype.

    Arrays are views of the memory-mapped file, so a checkpoint larger than the memory can be walked
    through (pickles from before torch 1.6 excepted: those are read as a whole).

    Attributes:
      path: the file or folder.
      container: how it is packed.
      config: what the container itself says of the network: a folder's `config.json`, the `cfg` of
        Microsoft's WavLM; empty for the others.
      shapes: torch key -> shape.
    """

    def __init__(
        self,
        path: Path,
        container: Container,
        files: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
    ):
        """`files`: of every file, the numpy arrays or torch tensors under the file's own names."""
        self.path = path
        self.container = container
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Mapping[str, Any], str]] = {}
        for file in files:
            shapes = file.shapes if isinstance(file, TensorFile) else {n: x.shape for n, x in file.items()}
            for name, shape in shapes.items():
                key = name.removeprefix(WRAPPER_PREFIX)
                if key in self._places:
                    raise UserError(f"{path}: tensor {key!r} is there twice")
                self._places[key] = file, name
                self.shapes[key] = tuple(shape)
        if not self._places:
            raise UserError(f"{path}: there are no tensors in it")

    def __getitem__(self, key: str) -> np.ndarray:
        file, name = self._places[key]
        return file[name] if isinstance(file, TensorFile) else _from_torch(file[name], key, self.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Opens a checkpoint: a `.safetensors`, `.bin`, `.ckpt`, `.model`, `.pt` or `.pth` file, or a folder.

    A file named as transformers names weights, with a `config.json` beside it, is that folder with this file.

    Raises:
      UserError: it cannot be read, is truncated, is none of these containers, holds no tensors or one
        twice, or is a pickle of more than tensors and plain values (or torch is missing to read it).
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    container, tensors, config = _read_file(path)
    if is_transformers_file(path) and path.with_name("config.json").is_file():
        container, config = Container.TRANSFORMERS, _read_json(path.with_name("config.json"))
    return Tensors(path, container, [tensors], config)


def is_transformers_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named as transformers names a model's weights, whose sizes are in another file."""
    return os.path.basename(path) in _WEIGHTS[Container.TRANSFORMERS]


def check_can_read(path: str | os.PathLike[str]) -> None:
    """Refuses a pickle where torch, which reads them, is not installed; the file need not be there yet.

    Raises:
      UserError: so it is.
    """
    if os.path.splitext(path)[1] in _PICKLE_SUFFIXES:
        _import_torch(path)


def _import_torch(path: str | os.PathLike[str]) -> Any:
    with needed_for(f"{path}: reading it"):
        import torch
    return torch


def _read_file(path: Path) -> tuple[Container, Mapping[str, Any], Mapping[str, Any]]:
    """One file's container, its tensors by name, and what it says of the network."""
    if path.suffix == ".safetensors":
        return Container.SAFETENSORS, TensorFile(path), {}
    if path.suffix in _PICKLE_SUFFIXES:
        return _unpack(_load_pickle(path), path)
    suffixes = ", ".join((".safetensors", *_PICKLE_SUFFIXES))
    raise UserError(f"{path}: a checkpoint is a model's folder or a file that ends in one of {suffixes}")


def _open_folder(folder: Path) -> Tensors:
    if (folder / "model_index.json").exists():
        raise UserError(f"{folder}: a whole pipeline; name the folder of one of its models (unet or vae)")
    config = _read_json(folder / "config.json")
    container = Container.DIFFUSERS if "_class_name" in config else Container.TRANSFORMERS
    for name in _weight_files(container):
        if (folder / name).exists():
            files = _read_shards(folder / name) if name.endswith(".json") else [_read_file(folder / name)[1]]
            return Tensors(folder, container, files, config)
    whole = " or ".join(_WEIGHTS[container])
    raise UserError(f"{folder}: the folder has no {whole}, neither whole nor in shards")


def _weight_files(container: Container) -> Iterator[str]:
    """Names under which a folder can keep its weights, the most precise first."""
    for variant in ("", ".fp16"):
        for name in _WEIGHTS[container]:
            stem, dot, suffix = name.rpartition(".")
            yield f"{stem}{variant}{dot}{suffix}"
            yield f"{name}.index{variant}.json"


def _read_shards(index: Path) -> list[Mapping[str, Any]]:
    """Opens every shard that an index names; each tensor must be where the index says."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: the index names no tensors")
    for shard in weight_map.values():
        # A name with a folder in it could lead anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: {shard!r} is not the name of a file beside it")
    files = {shard: _read_file(index.parent / shard)[1] for shard in dict.fromkeys(weight_map.values())}
    for tensor, shard in weight_map.items():
        if tensor not in files[shard]:
            raise UserError(
                f"{index.parent / shard}: tensor {tensor!r} is missing, though {index.name} names it"
            )
    return list(files.values())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _load_pickle(path: Path) -> Any:
    """What a PyTorch file holds, its tensors memory-mapped where the file's version allows."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    torch = _import_torch(path)
    try:
        # DeepSpeed states carry the launcher's arguments as a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path}: refused, the pickle needs {refused[1]}, and only tensors and plain values are read "
                "from pickles (if you trust the file, save its tensors alone, as safetensors; "
                "those of the release's stages are its entry 'module')"
            ) from error
        raise UserError(f"{path}: not a PyTorch file, or truncated or damaged") from error


def _unpack(content: Any, path: Path) -> tuple[Container, dict[str, Any], Mapping[str, Any]]:
    """Finds the tensors in what a pickle held."""
    import torch

    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a checkpoint, the pickle holds no dictionary")
    config: Mapping[str, Any] = {}
    container, tensors = Container.BARE, content
    for packed, key, beside in _PACKED:
        if all(isinstance(content.get(k), Mapping) for k in (key, *beside)):
            container, tensors = packed, content[key]
            config = content[beside[0]] if beside else {}
            break
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: not a checkpoint of a known layout, its entry {name!r} is no tensor")
    return container, dict(tensors), config


def _from_torch(tensor: Any, name: str, path: Path) -> np.ndarray:
    """A read-only numpy view of a torch tensor, bit for bit."""
    import torch

    # numpy has no such dtypes of its own: torch hands over the bits, ml_dtypes names them.
    relabelled = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
    }
    try:
        # A tensor that repeats its memory may be of any size, whatever the file's is.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {name!r} is larger than what the file holds of it")
        if tensor.dtype in relabelled:
            bits, dtype = relabelled[tensor.dtype]
            array = tensor.detach().view(bits).numpy().view(dtype)
        else:
            array = tensor.detach().numpy()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: tensor {name!r} is not a dense array ({tensor.dtype})") from error
    array.flags.writeable = False
    return array


def write_deepspeed(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.pt` that the release loads; `path` is in a folder that appears when it is complete."""
    import torch

    def converted(x: np.ndarray) -> Any:
        # torch takes no bfloat16 from numpy.
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    torch.save({"module": {WRAPPER_PREFIX + name: converted(x) for name, x in tensors.items()}}, path)
