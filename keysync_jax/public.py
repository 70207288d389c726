"""The names that `import keysync_jax as ks` gives, and where each is; docs/python.md describes them."""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

HOMES = {
    "open_model": "keysync_jax.model",
    "Model": "keysync_jax.model",
    "dub": "keysync_jax.pipeline.dub",
    "DubSettings": "keysync_jax.pipeline.dub",
    "convert": "keysync_jax.convert.checkpoint",
    "Checkpoints": "keysync_jax.convert.checkpoint",
    "AudioSource": "keysync_jax.convert.checkpoint",
    "prepare": "keysync_jax.data.prepare",
    "PrepareSettings": "keysync_jax.data.settings",
    "load_config": "keysync_jax.train.config_file",
    "train": "keysync_jax.train.loop",
    "export": "keysync_jax.train.export",
    "parity": "keysync_jax.parity.compare",
    "UserError": "keysync_jax.errors",
}
"""Public name -> module that defines it."""

FUNCTIONS = {"parity": "compare"}
"""Public name -> name in that module, where it is another."""


def load(name: str) -> Any:
    """Imports what a public name stands for."""
    return getattr(importlib.import_module(HOMES[name]), FUNCTIONS.get(name, name))


class CallablePackage(ModuleType):
    """A package that is called like the public function of its name.

    `keysync_jax.convert` is a package, and importing anything of it makes Python set that attribute. So the
    package itself answers calls, whatever was imported before.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function()(*arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's, for `help` and editors."""
        return inspect.signature(self._function())

    def _function(self) -> Any:
        return load(self.__name__.rpartition(".")[2])


def make_callable(package: str) -> None:
    """Lets a package of `keysync_jax` be called; `package` is its `__name__`."""
    sys.modules[package].__class__ = CallablePackage
