"""What the subcommands share."""

import argparse
from pathlib import Path
from typing import TypeAlias

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


def add_devices(parser: argparse.ArgumentParser) -> None:
    """`--devices`, of a subcommand that dubs."""
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices of this host that share the work (default: all)"
    )
