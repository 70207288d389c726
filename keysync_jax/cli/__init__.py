"""The command `keysync`: one subcommand a job, each also a Python function.

Nothing heavy is imported before a subcommand runs, so `keysync --help` is quick.
"""

import argparse
import errno
import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from keysync_jax import __version__
from keysync_jax.cli import (
    benchmark,
    data,
    doctor,
    dubbing,
    evaluation,
    launching,
    models,
    parity,
    training,
)
from keysync_jax.cli.stopping import Stopped, stopping_in_order
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.extras import needed_for
from keysync_jax.files import FULL_DISK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code.

    0: done. 1: a check did not hold (`parity`, `synth-eval`, `doctor`), or of many dubs (`dub --pairs`) some
    could not be made. 2: something the user gave cannot be used, or the machine failed, said in one sentence
    on stderr. 42: a training run that should be started again. 130: interrupted. 128 + n: stopped by signal
    n. 141: nobody reads what is printed any more.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # What follows -- is the command that is launched, settings included.
    cut = given.index("--") if given[:1] == ["launch"] and "--" in given else len(given)
    given, rest = given[:cut], given[cut + 1 :]
    # --config.x.y=v are settings, whose names argparse does not know.
    overrides = [a for a in given if a.startswith("--config.")]
    parser = _parser()
    arguments = parser.parse_args([a for a in given if a not in overrides])
    trains = arguments.run in (training.run_train, training.run_distill)
    if overrides and not trains:
        parser.error(f"{overrides[0]} is a setting of keysync train")
    arguments.overrides, arguments.rest = overrides, rest
    # A training run has a way of its own: it finishes the step under way and saves it.
    with stopping_in_order(not trains):
        try:
            code = _run(arguments)
        except Exception:
            if not (trains and training.is_one_of_several()):
                raise
            traceback.print_exc()
            code = 1
    if trains and code in (1, 2):
        training.leave_the_others(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    goes_on = "; the same command goes on where this one was" if arguments.resumable else ""
    try:
        with needed_for(f"keysync {arguments.command}"):
            code = int(arguments.run(arguments))
            sys.stdout.flush()
            return code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt as error:
        how = str(error) if isinstance(error, Stopped) else "interrupted"
        return _fail(how + goes_on, error.code if isinstance(error, Stopped) else 130)
    except (OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        fault = machine_fault(error)
        if fault is not None and fault.errno in FULL_DISK:
            return _fail(f"the disk is full ({fault.filename or 'while writing'}){goes_on}")
        if fault is not None and fault.errno in (errno.EMFILE, errno.ENFILE):
            return _fail(f"{fault.filename}: {fault.strerror}; raise the limit (ulimit -n){goes_on}")
        if fault is not None:
            return _fail(f"{fault.filename or 'the machine'}: {fault.strerror}{goes_on}")
        if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
            return _fail(f"{error.filename}: {error.strerror}{goes_on}")
        raise
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(f"the device has too little memory; {arguments.less_memory}")
        raise


def _nobody_reads() -> bool:
    """Whether it is what is printed that nobody takes any more, and no other pipe; it then goes nowhere."""
    with suppress(OSError):  # A stream that is no file.
        place, look = sys.stdout.fileno(), select.poll()
        look.register(place, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), place)
            return True
    return False


def _fail(sentence: str, code: int = 2) -> int:
    with suppress(OSError):  # The terminal may be gone, and with it what is left to tell.
        print(f"keysync: {sentence}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    """Every subcommand sets `run(arguments) -> exit code`, `resumable` and `less_memory` (advice)."""
    parser = argparse.ArgumentParser(prog="keysync", description="Audio-driven lip synchronisation in JAX.")
    parser.add_argument("--version", action="version", version=f"keysync_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        models.add_convert,
        dubbing.add_dub,
        dubbing.add_warm,
        data.add_prepare,
        training.add_train,
        launching.add_launch,
        training.add_distill,
        models.add_export,
        training.add_init,
        data.add_synth,
        evaluation.add_synth_eval,
        evaluation.add_demo,
        evaluation.add_evaluate,
        evaluation.add_arena,
        parity.add_parity,
        benchmark.add_bench,
        doctor.add_doctor,
    ):
        add(commands)
    return parser
