"""KeySync in JAX: two-stage latent video diffusion for lip synchronisation.

`import keysync_jax as ks` gives the names of `__all__`, which docs/python.md describes. Each is imported when
it is first used, so the import itself brings neither JAX nor anything else that is heavy. Every other module
is internal: it may change from one version to the next.
"""

import importlib
from typing import TYPE_CHECKING, Any

from keysync_jax.public import HOMES, load

if TYPE_CHECKING:
    from keysync_jax.convert.checkpoint import AudioSource, Checkpoints, convert
    from keysync_jax.data.prepare import prepare
    from keysync_jax.data.settings import PrepareSettings
    from keysync_jax.errors import UserError
    from keysync_jax.model import Model, open_model
    from keysync_jax.parity.compare import compare as parity
    from keysync_jax.pipeline.dub import DubSettings, dub
    from keysync_jax.train.config_file import load_config
    from keysync_jax.train.export import export
    from keysync_jax.train.loop import train

__version__ = "0.1.0.dev0"

__all__ = [
    "AudioSource",
    "Checkpoints",
    "DubSettings",
    "Model",
    "PrepareSettings",
    "UserError",
    "convert",
    "dub",
    "export",
    "load_config",
    "open_model",
    "parity",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name, on its first use."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if HOMES[name].startswith(f"{__name__}.{name}."):  # A package of this name: it is what can be called.
        return importlib.import_module(f"{__name__}.{name}")
    return globals().setdefault(name, load(name))


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
