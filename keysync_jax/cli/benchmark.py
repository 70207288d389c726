"""The subcommand bench."""

import argparse
import os
from pathlib import Path

from keysync_jax.cli.common import Commands
from keysync_jax.errors import UserError

PARTS = ("unet", "vae", "audio", "sampler")


def add_bench(commands: Commands) -> None:
    """`keysync bench`."""
    parser = commands.add_parser("bench", help="time the networks, alone or beside PyTorch")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--size", default="tiny", metavar="tiny|mid|full", help="of the networks (default tiny)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows, frames or clips a call")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed calls (default 5)")
    parser.add_argument(
        "--against",
        metavar="torch|FILE",
        help="PyTorch's networks in turns with ours, or the --json of an earlier run",
    )
    parser.add_argument("--torch-compile", action="store_true", help="with --against torch: torch.compile")
    parser.add_argument(
        "--aot",
        metavar="TOPOLOGY",
        help="for a TPU that is not here (v5e:2x2, v6e:2x2, v5p:2x2x1, ...): compile and count",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.set_defaults(run=_bench, resumable=False, less_memory="try a smaller --batch or --size")


def _bench(arguments: argparse.Namespace) -> int:
    beside_torch = arguments.against == "torch"
    if arguments.torch_compile and not beside_torch:
        raise UserError("--torch-compile goes with --against torch")
    repeats = 5 if arguments.repeats is None else arguments.repeats
    if repeats < 1:
        raise UserError(f"--repeats takes 1 or more, not {repeats}")
    if beside_torch:
        # Both share the GPU; JAX would take three quarters of it at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.aot is not None:
        return _ahead(arguments)
    from keysync_jax.bench import report
    from keysync_jax.bench.measure import measure
    from keysync_jax.bench.sizes import size_of
    from keysync_jax.bench.torch_side import torch_call
    from keysync_jax.bench.workloads import workloads

    size, dtype = size_of(arguments.size), arguments.dtype
    conditions = report.Conditions.here(arguments.size, dtype, arguments.batch)
    before = (
        report.medians(Path(arguments.against), conditions)
        if arguments.against and not beside_torch
        else None
    )
    chosen = [w for part in arguments.parts or PARTS for w in workloads(part, size, dtype, arguments.batch)]
    rows = []
    for workload in chosen:
        beside = torch_call(workload, size, dtype, arguments.torch_compile) if beside_torch else None
        rows.append(measure(workload, repeats, beside))
    print(report.table(conditions, rows, before))
    if arguments.json is not None:
        report.save(arguments.json, conditions, rows)
    return 0


def _ahead(arguments: argparse.Namespace) -> int:
    if arguments.against is not None or arguments.repeats is not None:
        raise UserError("--aot runs nothing: it takes no --against and no --repeats")
    from keysync_jax.extras import needed_for

    with needed_for("keysync bench --aot"):
        from keysync_jax.ahead.chips import topology
        from keysync_jax.ahead.program import save, table
        from keysync_jax.bench.aot import compile_ahead
        from keysync_jax.bench.sizes import size_of
        from keysync_jax.bench.workloads import workloads

        chips, size = topology(arguments.aot), size_of(arguments.size)
    found = []
    for part in arguments.parts or PARTS:
        for workload in workloads(part, size, arguments.dtype, arguments.batch):
            found.append(compile_ahead(workload, chips))
            print(table(found[-1]), end="\n\n", flush=True)
    if arguments.json is not None:
        save(arguments.json, arguments.aot, found)
    return 0
