"""Subcommands that hand work to a scheduler: launch."""

import argparse

from keysync_jax.cli.common import Commands


def add_launch(commands: Commands) -> None:
    """`keysync launch`."""
    from keysync_jax.launch.submit import add_arguments

    parser = commands.add_parser(
        "launch",
        help="start training on many machines",
        usage="keysync launch {slurm,jobset,ray} --nodes N [--submit] ... -- train ...",
    )
    add_arguments(parser)
    parser.set_defaults(run=_launch, resumable=False, less_memory="")


def _launch(arguments: argparse.Namespace) -> int:
    from keysync_jax.launch.submit import run

    return run(arguments, arguments.rest)
