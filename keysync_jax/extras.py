"""The extras (`pip install 'keysync_jax[EXTRA]'`), and the sentence for one that is not installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from keysync_jax.errors import UserError

EXTRAS: Mapping[str, str] = {
    "absl": "train",
    "array_record": "data",
    "diffusers": "test",
    "etils": "train",
    "face_alignment": "face-alignment",
    "grain": "train",
    "huggingface_hub": "hub",
    "libtpu": "tpu",
    "mediapipe": "landmarks",
    "ml_collections": "train",
    "onnxruntime": "metrics",
    "optax": "train",
    "orbax": "train",
    "PIL": "metrics",
    "pyiqa": "metrics-noncommercial",
    "ray": "ray",
    "starlette": "ray",
    "tensorboardX": "train",
    "torch": "convert",
    "torch_fidelity": "metrics",
    "transformers": "test",
}
"""Top-level module -> the extra that brings it; the extras themselves are in setup.cfg."""


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Around imports, or around a whole command: what cannot be done where a module of an extra is missing.

    Args:
      what: begins the sentence, e.g. `"keysync train"`.

    Raises:
      UserError: a module in `EXTRAS` is not installed; names it, and the pip command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        raise UserError(
            f"{what} needs {module}, which is not installed: pip install 'keysync_jax[{EXTRAS[module]}]'"
        ) from error


def require(module: str) -> None:
    """For a module that is imported late in a run: misses it now, without importing it.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
