"""`keysync train`: joins the other hosts, trains."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for
from keysync_jax.files import is_remote
from keysync_jax.train.config import AnyTrainConfig
from keysync_jax.train.config_file import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `keysync train`; overrides (`--config.x=y`) are taken off before parsing."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="configs/*.py; --config.x.y=v overrides")
    parser.add_argument("--workdir", metavar="DIR", help="of the run; an interrupted one goes on")
    parser.add_argument("--dry-run", action="store_true", help="print what the run takes, and stop")
    parser.add_argument("--devices", type=int, metavar="N", help="of the dry run (default 1)")
    parser.add_argument(
        "--topology",
        metavar="TPU",
        help="of the dry run (v5e:4x8, v5p:2x2x4, ...): compile the step for these chips",
    )
    parser.add_argument(
        "--slices", type=int, metavar="N", help="with --topology: so many of it, joined by their data centre"
    )
    parser.add_argument(
        "--multihost", action="store_true", help="join the other hosts, as the cluster's environment says"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, where the environment says nothing"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="with --coordinator: how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="with --coordinator: number of this one")
    parser.add_argument(
        "--report", type=Path, metavar="WORKDIR", help="print what became of a run's time, and stop"
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs the parsed command; returns the exit code.

    0, or 128 + the signal that stopped the run, or 42 (`RESTART`): other hosts are lost, or do not answer;
    the same command goes on once it is started again. Where hosts are lost the process ends here.
    """
    began = time.time()
    if arguments.report is not None:
        from keysync_jax.train.report import report

        print(report(arguments.report).table())
        return 0
    if arguments.config is None:
        raise UserError("--config is missing: the settings of the run, configs/*.py")
    config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        return _dry_run(config, arguments.devices, arguments.topology, arguments.slices)
    if arguments.devices is not None:
        raise UserError("--devices goes with --dry-run; a run takes all devices that are here")
    if arguments.topology is not None:
        raise UserError("--topology goes with --dry-run; a run takes the devices that are here")
    if arguments.slices is not None:
        raise UserError("--slices goes with --dry-run --topology")
    if arguments.workdir is None:
        raise UserError("--workdir is missing: the folder of the run")
    from keysync_jax.train.hosts import HostsLostError
    from keysync_jax.train.watchdog import RESTART, leave

    try:
        return _train(config, arguments, began)
    except HostsLostError as error:
        print(f"keysync: {error}; exit code {RESTART} asks for another start", file=sys.stderr)
        leave(RESTART)


def _train(config: AnyTrainConfig, arguments: argparse.Namespace, began: float) -> int:
    from keysync_jax.launch.join import join_hosts
    from keysync_jax.train.places import run_folder

    workdir = run_folder(arguments.workdir)
    cluster = join_hosts(
        arguments.multihost,
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        config.watch.heartbeat,
    )
    from keysync_jax.launch.preflight import preflight
    from keysync_jax.train.hosts import lost_hosts_told
    from keysync_jax.train.loop import Start, train

    with lost_hosts_told():
        _keep_compiled(workdir)
        hosts = preflight(config, workdir) if cluster is not None else []
        outcome = train(config, workdir, start=Start(began, time.time(), tuple(hosts)))
    if outcome.signal is None:
        print(f"{workdir}: step {outcome.step} of {config.steps}; keysync export makes it a model")
        return 0
    print(
        f"keysync: stopped at step {outcome.step} of {config.steps}, which is saved; "
        "the same command goes on from there",
        file=sys.stderr,
    )
    return 128 + outcome.signal


def _dry_run(config: AnyTrainConfig, devices: int | None, topology: str | None, slices: int | None) -> int:
    """Prints what a run takes; for a topology also what its compiled step does on each chip."""
    from keysync_jax.train.dry_run import dry_run

    if topology is None:
        if slices is not None:
            raise UserError("--slices goes with --topology: how many such machines there are")
        print(dry_run(config, 1 if devices is None else devices).table())
        return 0
    if devices is not None:
        raise UserError("--devices and --topology both say how many devices there are; give one")
    with needed_for("keysync train --dry-run --topology"):
        from keysync_jax.ahead import chips, program
        from keysync_jax.train.ahead import step_ahead

        here = chips.topology(topology, 1 if slices is None else slices).devices
    print(dry_run(config, len(here)).table(), end="\n\n", flush=True)
    print(program.table(step_ahead(config, here)))
    return 0


def _keep_compiled(workdir: Path) -> None:
    """A resumed run compiles nothing. Several hosts share what process 0 compiled, in the run's folder."""
    import jax

    from keysync_jax.backend import keep_compiled
    from keysync_jax.media.assets import cache_folder

    shared = jax.process_count() > 1 and not is_remote(workdir)
    keep_compiled((workdir if shared else cache_folder()) / "compiled")
