"""What the subcommands share."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a subcommand adds its parser to."""


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, so that the next run compiles nothing."""
    from keysync_jax.backend import keep_compiled
    from keysync_jax.media.assets import cache_folder

    keep_compiled(cache_folder() / "compiled")
