"""A run's settings from a Python file of `configs` with overrides from the command line."""

import ast
import importlib.resources
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from keysync_jax.config import nearest, to_dict
from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for
from keysync_jax.train.config import AnyTrainConfig, TrainConfig, train_config_from

OVERRIDE = "--config."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyTrainConfig:
    """The run's settings: a config file with overrides.

    Args:
      path: a Python file with `get_config() -> ml_collections.ConfigDict`. `configs/NAME.py` that is not
        there is the one that came with the package.
      overrides: `--config.section.key=value`. The value is read as the type that the key has now; a list is
        written `a,b` or as a Python literal.

    Raises:
      UserError: no such file, no `get_config` in it, an unknown key (the nearest is named), a value of
        another type, settings that do not fit each other.
    """
    module = _module(Path(path))
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path}: has no get_config(); a config file defines get_config() -> ConfigDict")
    values = module.get_config().to_dict()
    for override in overrides:
        _override(values, override)
    return train_config_from(values, str(path))


def with_settings(config: AnyTrainConfig, settings: Sequence[str]) -> AnyTrainConfig:
    """A config with other values of some keys, `section.key=value` each, as `load_config` reads overrides.

    Raises:
      UserError: as that.
    """
    values = to_dict(config)
    for setting in settings:
        _override(values, setting)
    return train_config_from(values, "config")


def load_stage_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """`load_config`, of a stage.

    Raises:
      UserError: as that; or the settings are those of a VAE's run.
    """
    config = load_config(path, overrides)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path}: holds the settings of a VAE's run, not of a stage's")
    return config


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        packaged = importlib.resources.files("keysync_jax.configs") / path.name
        if path.parent not in (Path("configs"), Path()) or not packaged.is_file():
            raise UserError(f"{path}: there is no such config file")
        path = Path(str(packaged))
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a config is a Python file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with needed_for(f"{path}"):
            spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return module


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one key of the nested values."""
    name, equals, text = override.removeprefix(OVERRIDE).partition("=")
    if not equals:
        raise UserError(f"{override}: write --config.key=value, with the = and no space")
    *sections, key = name.split(".")
    for section in sections:
        values = _known(values, section, override)
        if not isinstance(values, dict):
            raise UserError(f"{override}: {section!r} is a value, it has no keys")
    values[key] = _parsed(text, _known(values, key, override), override)


def _known(values: dict[str, Any], key: str, override: str) -> Any:
    if key not in values:
        raise UserError(f"{override}: unknown key {key!r}{nearest(key, values)}")
    return values[key]


def _parsed(text: str, now: Any, override: str) -> Any:
    """The text as a value of the type that the key has now."""
    if isinstance(now, dict):
        raise UserError(f"{override}: this is a section; set one of its keys: {', '.join(now)}")
    if isinstance(now, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{override}: {text!r} is neither true nor false")
        return text.lower() == "true"
    if isinstance(now, list | tuple):
        return _parsed_list(text)
    if isinstance(now, int | float):
        try:
            return type(now)(text.replace("_", ""))
        except ValueError:
            wanted = "a whole number" if isinstance(now, int) else "a number"
            raise UserError(f"{override}: {text!r} is not {wanted}") from None
    return text


def _parsed_list(text: str) -> list[Any]:
    """`a,b` -> ["a", "b"]; `1,2` -> [1, 2]; `("a",)` as Python reads it; nothing -> []."""
    whole = _literal(text)
    if isinstance(whole, list | tuple):
        return list(whole)
    return [_literal(part) for part in text.split(",") if part]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
