"""The command `keysync`: one subcommand a job, each also a Python function.

Nothing heavy is imported before a subcommand runs, so `keysync --help` is quick.
"""

import argparse
import errno
import sys
from collections.abc import Sequence

from keysync_jax import __version__
from keysync_jax.cli import data, dubbing, evaluation, models, parity, training
from keysync_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code.

    0: done. 1: a check did not hold (`parity`, `synth-eval`). 2: something the user gave cannot be used, said
    in one sentence on stderr. 130: interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # --config.x.y=v are settings, whose names argparse does not know.
    overrides = [a for a in given if a.startswith("--config.")]
    parser = _parser()
    arguments = parser.parse_args([a for a in given if a not in overrides])
    if overrides and arguments.run is not training.run_train:
        parser.error(f"{overrides[0]} is a setting of keysync train")
    arguments.overrides = overrides
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where this one was" if arguments.resumable else ""
        print(f"keysync: interrupted{goes_on}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"the disk is full ({error.filename or 'while writing'})")
        if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return _fail(f"{error.filename}: {error.strerror}")
        raise
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(f"the device has too little memory; {arguments.less_memory}")
        raise


def _fail(sentence: str) -> int:
    print(f"keysync: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    """Every subcommand sets `run(arguments) -> exit code`, `resumable` and `less_memory` (advice)."""
    parser = argparse.ArgumentParser(prog="keysync", description="Audio-driven lip synchronisation in JAX.")
    parser.add_argument("--version", action="version", version=f"keysync_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        models.add_convert,
        dubbing.add_dub,
        data.add_prepare,
        training.add_train,
        models.add_export,
        training.add_init,
        data.add_synth,
        evaluation.add_synth_eval,
        evaluation.add_demo,
        parity.add_parity,
    ):
        add(commands)
    return parser
