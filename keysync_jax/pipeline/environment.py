"""What a result depends on besides its inputs: the code, the libraries that compute it, the device."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import av
import cv2
import jax
import jaxlib
import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.files import fingerprint, sha256_of

DUB_CODE = (
    "backend",
    "config",
    "diffusion",
    "errors",
    "extras",
    "files",
    "hub",
    "media",
    "model",
    "nn",
    "pipeline",
    "public",
    "tensorfile",
    "typing",
)
"""Modules and packages of keysync_jax that a dub runs through."""


def environment(*further: str) -> dict[str, object]:
    """What a dub of the same inputs can differ by, in JSON's types; a part of kept results' fingerprints.

    Args:
      further: modules and packages of keysync_jax that the result runs through besides `DUB_CODE`.
    """
    return {
        "code": code_digest(*DUB_CODE, *further),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "libraries": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "pyav": av.__version__,
        },
    }


@cache
def code_digest(*names: str) -> str:
    """SHA-256 (hex) over source files of keysync_jax, the same wherever and however it is installed.

    Args:
      names: of modules (`model`) and packages (`nn`, with all that is in it).

    Raises:
      UserError: a source file is not there or cannot be read.
    """
    files = {name: file for part in names for name, file in _sources(f"keysync_jax.{part}").items()}
    return fingerprint({name: sha256_of(file) for name, file in files.items()})


def _sources(module: str) -> dict[str, Path]:
    """Source files of a module or a package, by names that do not depend on the place."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"{module}: its source is not installed")
    if spec.submodule_search_locations is None:
        return {module: Path(spec.origin)}
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    return {f"{module}/{file.relative_to(f).as_posix()}": file for f in folders for file in f.rglob("*.py")}
