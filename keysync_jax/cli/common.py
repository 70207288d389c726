"""What the subcommands share."""

import argparse
from pathlib import Path
from typing import TypeAlias

from keysync_jax.config import Interval
from keysync_jax.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a subcommand adds its parser to."""


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, so that the next run compiles nothing."""
    from keysync_jax.backend import keep_compiled
    from keysync_jax.media.assets import cache_folder

    keep_compiled(cache_folder() / "compiled")


def add_allow_download(parser: argparse.ArgumentParser) -> None:
    """`--allow-download`, of a subcommand that takes models; see `fetch_models`."""
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch models that are on the hub (hub:OWNER/NAME)"
    )


def fetch_models(arguments: argparse.Namespace, *models: str | Path | None) -> None:
    """With `--allow-download`, brings models of the hub into its cache, from where they are opened."""
    from keysync_jax.model import model_folder

    for model in models if arguments.allow_download else ():
        if model is not None:
            model_folder(model, allow_download=True)


def add_ray(parser: argparse.ArgumentParser) -> None:
    """`--ray`, of a subcommand that can work on many machines."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="work on a Ray cluster: that address, else RAY_ADDRESS, else this machine alone",
    )


def add_guidance_interval(parser: argparse.ArgumentParser) -> None:
    """`--guidance-interval`, of a subcommand that dubs; see `intervals`."""
    parser.add_argument(
        "--guidance-interval",
        action="append",
        default=[],
        metavar="[audio=|identity=]LOW:HIGH",
        help="guide at these noise levels alone, e.g. 1.5:8, half of the work (default: the model's)",
    )


def intervals(arguments: argparse.Namespace) -> tuple[Interval | None, Interval | None]:
    """What `--guidance-interval` says of the audio's scale, and of the identity's.

    Raises:
      UserError: it is no interval, or there are two of a scale.
    """
    found: dict[str, Interval] = {}
    for text in arguments.guidance_interval:
        scale, equals, levels = text.rpartition("=")
        try:
            low, high = (float(level) for level in levels.split(":"))
        except ValueError:
            raise UserError(f"--guidance-interval takes LOW:HIGH, e.g. 1.5:8, not {levels!r}") from None
        if equals and scale not in ("audio", "identity"):
            raise UserError(f"--guidance-interval {text}: the scales are audio and identity, not {scale!r}")
        for name in [scale] if equals else ["audio", "identity"]:
            if name in found:
                raise UserError(f"--guidance-interval was given twice for {name}")
            found[name] = low, high
    return found.get("audio"), found.get("identity")


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """`--decoder`, of a subcommand that dubs."""
    parser.add_argument(
        "--decoder",
        choices=("full", "small"),
        default="full",
        help="the VAE's, or the model's small one (default full)",
    )


def add_longer_voice(parser: argparse.ArgumentParser) -> None:
    """`--longer-voice`, of a subcommand that dubs or tells what a dub would be."""
    parser.add_argument(
        "--longer-voice",
        choices=("to-and-fro", "loop", "freeze", "stop"),
        default="to-and-fro",
        help="what the video does where the voice is longer than it; stop: the dub ends with the video",
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """`--devices`, of a subcommand that dubs."""
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices of this host that share the work (default: all)"
    )
