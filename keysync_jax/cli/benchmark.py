"""The subcommand bench."""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keysync_jax.cli.common import Commands
from keysync_jax.config import Dtype
from keysync_jax.errors import UserError

NETWORKS = ("unet", "vae", "audio", "sampler")
PARTS = (*NETWORKS, "dub", "train", "metrics")


def add_bench(commands: Commands) -> None:
    """`keysync bench`."""
    parser = commands.add_parser("bench", help="time the networks, a dub, the training step, the metrics")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: {', '.join(NETWORKS)})"
    )
    parser.add_argument("--size", metavar="tiny|mid|full", help="of the networks (default tiny)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default fp32")
    parser.add_argument("--batch", type=int, metavar="N", help="windows, frames or clips a call (default 1)")
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
    parser.add_argument(
        "--memory", choices=("small", "balanced", "fast"), help="of sampler and dub, as dub takes it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    _add_dub(parser)
    _add_train(parser)
    _add_metrics(parser)
    _add_report(parser)
    parser.set_defaults(run=_bench, resumable=False, less_memory="try a smaller --batch or --size")


def _add_dub(parser: argparse.ArgumentParser) -> None:
    dub = parser.add_argument_group("dub")
    dub.add_argument("--video", type=Path, metavar="VIDEO", help="to dub (default: a synthetic one)")
    dub.add_argument("--voice", type=Path, metavar="AUDIO", help="with --video: what it is to say")
    dub.add_argument(
        "--landmarks", metavar="FILE|NAME", help="with --video: as dub takes it (default mediapipe)"
    )
    dub.add_argument("--frame", metavar="WxH", help="picture of the synthetic clip (default 512x512)")
    dub.add_argument(
        "--seconds", type=float, metavar="S", help="of synthetic clips, for metrics too (default 2)"
    )
    dub.add_argument(
        "--model",
        type=Path,
        metavar="MODEL_DIR",
        help="default: the embedded one, of other sizes random ones",
    )
    dub.add_argument(
        "--student",
        type=int,
        choices=(1, 2, 4),
        metavar="STEPS",
        help="the random model is a student of 4, 2 or 1 steps with a small decoder, which is used",
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    train = parser.add_argument_group("train")
    train.add_argument("--config", type=Path, metavar="FILE", help="settings of a stage (default: of --size)")
    train.add_argument(
        "--vary",
        nargs="*",
        metavar="KEY=VALUE",
        help="measured beside the settings as they are, each alone (A=1;B=2: together)",
    )
    train.add_argument("--set", nargs="*", metavar="KEY=VALUE", help="settings of all that is measured")
    train.add_argument("--mesh", metavar="data=N,fsdp=N", help="of devices (default: the config's)")


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument("--metrics", metavar="NAMES", help="with commas between (default: all)")
    metrics.add_argument(
        "--pairs",
        type=Path,
        metavar="LIST|DIR",
        help="clips, as evaluate takes them (default: synthetic ones; each has landmarks beside it)",
    )
    metrics.add_argument(
        "--clips", type=int, metavar="N", help="how many of them (default: all; synthetic: 4)"
    )
    metrics.add_argument("--weights", type=Path, metavar="DIR", help="of the metrics' networks")


def _add_report(parser: argparse.ArgumentParser) -> None:
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report",
        type=Path,
        metavar="OUT_DIR",
        help="measure everything in turn; called again, what is left; report.md has the tables",
    )
    report.add_argument("--minutes", type=float, metavar="N", help="time for a call (default 10)")
    report.add_argument(
        "--golden", metavar="PREFIX", help="golden numbers to compare with (default tests/golden/tiny)"
    )


_ONLY = {
    "report": ("minutes", "golden"),
    "dub": ("video", "voice", "landmarks", "frame", "model", "student"),
    "train": ("config", "vary", "set", "mesh"),
    "metrics": ("metrics", "pairs", "clips", "weights"),
}
"""What alone takes an option."""


def _bench(arguments: argparse.Namespace) -> int:
    parts = arguments.parts or NETWORKS
    _refuse(arguments, parts)
    if arguments.report is not None:
        return _report(arguments)
    if arguments.aot is not None:
        return _ahead(arguments, parts)
    if arguments.against == "torch":
        # Both share the GPU; JAX would take three quarters of it at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return _measure(arguments, parts)


def _refuse(arguments: argparse.Namespace, parts: Sequence[str]) -> None:
    """Options that would not be used, and numbers that cannot be."""
    if wrong := [part for part in parts if part not in PARTS]:
        raise UserError(f"there is nothing named {wrong[0]} to measure; choose one of {', '.join(PARTS)}")
    for owner, names in _ONLY.items():
        here = arguments.report is not None if owner == "report" else owner in parts
        for name in names:
            if getattr(arguments, name) is not None and not here:
                to = "--report" if owner == "report" else f"bench {owner}"
                raise UserError(f"--{name} goes with {to}")
    if arguments.torch_compile and arguments.against != "torch":
        raise UserError("--torch-compile goes with --against torch")
    if arguments.against == "torch" and (other := set(parts) - set(NETWORKS)):
        raise UserError(f"--against torch is for the networks, not for {', '.join(sorted(other))}")
    _refuse_clip(arguments, parts)
    if arguments.memory is not None and not {"sampler", "dub"} & set(parts):
        raise UserError("--memory goes with bench sampler and bench dub")
    for name in ("repeats", "batch", "clips"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} takes 1 or more, not {value}")
    if arguments.config is not None and arguments.size is not None:
        raise UserError("--size and --config both say how large the networks are; give one")


def _refuse_clip(arguments: argparse.Namespace, parts: Sequence[str]) -> None:
    """Clips that are half given, given and described, or that nothing takes."""
    if arguments.seconds is not None and not {"dub", "metrics"} & set(parts):
        raise UserError("--seconds goes with bench dub and bench metrics")
    if arguments.seconds is not None and arguments.pairs is not None:
        raise UserError("--seconds is of synthetic clips; those of --pairs have their own")
    if (arguments.video is None) != (arguments.voice is None):
        raise UserError("--video and --voice go together")
    if arguments.landmarks is not None and arguments.video is None:
        raise UserError("--landmarks goes with --video; the synthetic clip has its own")
    for name in ("frame", "seconds"):
        if getattr(arguments, name) is not None and arguments.video is not None:
            raise UserError(f"--{name} is of the synthetic clip; --video has its own")


def _measure(arguments: argparse.Namespace, parts: Sequence[str]) -> int:
    from keysync_jax.bench import report
    from keysync_jax.bench.sizes import size_of

    size, dtype, repeats = (
        size_of(arguments.size or "tiny"),
        arguments.dtype or "fp32",
        arguments.repeats or 5,
    )
    earlier = None
    if arguments.against is not None and arguments.against != "torch":
        earlier = report.read(Path(arguments.against))
    # First, and in processes of its own: this one does not hold the devices yet.
    rows: list[Any] = list(_training(arguments, repeats)) if "train" in parts else []
    conditions = report.Conditions.here(arguments.size or "tiny", dtype, arguments.batch or 1)
    if earlier is not None:
        report.check(earlier, conditions)
    if rows:
        from keysync_jax.bench.training import train_table

        print(train_table(rows, report.comparable(earlier, rows)), end="\n\n", flush=True)
    networks = [part for part in parts if part in NETWORKS]
    if networks:
        found = _networks(networks, size, dtype, arguments, repeats)
        before = report.comparable(earlier, found)
        print(report.table(conditions, found, before), end="\n\n" if "dub" in parts else "\n", flush=True)
        rows += found
    if "dub" in parts:
        from keysync_jax.bench.dubbing import dub_table

        with _dubs(arguments, size, dtype, repeats) as found:
            print(dub_table(found, report.comparable(earlier, found)))
            rows += found
    if "metrics" in parts:
        from keysync_jax.bench.metrics import foot_lines, head_line, row_line

        judged: list[Any] = []
        print(head_line(report.comparable(earlier, judged)))
        for row in _judged(arguments):
            judged.append(row)
            print(row_line(row, report.comparable(earlier, [row])), flush=True)
            if arguments.json is not None:  # What is measured stays, whatever happens to the rest.
                report.save(arguments.json, conditions, [*rows, *judged])
        print(foot_lines(judged))
        rows += judged
    if arguments.json is not None:
        report.save(arguments.json, conditions, rows)
    return 0


def _judged(arguments: argparse.Namespace) -> Iterator[Any]:
    from keysync_jax.bench.metrics import measure_metrics, synthetic_clips
    from keysync_jax.evaluation.cliplist import read_clips
    from keysync_jax.files import temporary_folder
    from keysync_jax.metrics.catalogue import METRICS

    names = list(METRICS) if arguments.metrics is None else arguments.metrics.split(",")
    if arguments.pairs is not None:
        clips = read_clips(arguments.pairs)[: arguments.clips]
        yield from measure_metrics(names, clips, arguments.weights)
        return
    with temporary_folder("keysync-bench-clips") as folder:
        clips = synthetic_clips(arguments.clips or 4, arguments.seconds or 2.0, folder)
        yield from measure_metrics(names, clips, arguments.weights)


def _networks(
    parts: Sequence[str], size: Any, dtype: Any, arguments: argparse.Namespace, repeats: int
) -> list[Any]:
    from keysync_jax.bench.measure import measure
    from keysync_jax.bench.torch_side import torch_call

    rows = []
    for workload in [w for part in parts for w in _made(part, size, dtype, arguments)]:
        beside = None
        if arguments.against == "torch":
            beside = torch_call(workload, size, dtype, arguments.torch_compile)
        rows.append(measure(workload, repeats, beside))
    return rows


def _made(part: str, size: Any, dtype: Dtype, arguments: argparse.Namespace) -> list[Any]:
    """The programs of a part."""
    from keysync_jax.bench.workloads import workloads

    return workloads(part, size, dtype, arguments.batch or 1, arguments.memory or "balanced")


@contextmanager
def _dubs(arguments: argparse.Namespace, size: Any, dtype: Any, repeats: int) -> Iterator[list[Any]]:
    """Rows of dubs; the clip and the model are there as long as the block."""
    from keysync_jax.bench.dubbing import Dubbing, measure_dub, random_model, synthetic
    from keysync_jax.files import temporary_folder
    from keysync_jax.model import DEFAULT, model_folder
    from keysync_jax.pipeline.dub import DubSettings

    settings = DubSettings(dtype=dtype)
    if arguments.batch is not None:
        settings = dataclasses.replace(settings, windows_per_call=arguments.batch)
    if arguments.memory is not None:
        settings = dataclasses.replace(settings, memory=arguments.memory)
    with temporary_folder("keysync-bench-dub") as folder:
        if arguments.student is not None:
            if arguments.model is not None:
                raise UserError("--student is of a random model; a --model is what it is")
            model = random_model(folder / "model", size, dtype, arguments.student)
            settings = dataclasses.replace(settings, decoder="small")
        elif arguments.model is not None:
            model = model_folder(arguments.model)
        elif arguments.size in (None, "tiny"):
            model = DEFAULT
        else:
            model = random_model(folder / "model", size, dtype)
        if arguments.video is None:
            with synthetic(*_frame(arguments.frame), arguments.seconds or 2.0) as work:
                yield measure_dub(work, model, settings, repeats, folder)
            return
        note = f"{arguments.video.name} with {arguments.voice.name}"
        work = Dubbing(arguments.video, arguments.voice, arguments.landmarks or "mediapipe", note)
        yield measure_dub(work, model, settings, repeats, folder)


def _frame(text: str | None) -> tuple[int, int]:
    width, _, height = (text or "512x512").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UserError(f"--frame {text}: write width and height as 1920x1080")
    return int(width), int(height)


def _settings(arguments: argparse.Namespace, devices: int) -> list[Any]:
    """What `train` measures: the config, and what it differs in by `--vary`.

    Args:
      devices: one clip each where nothing says how many.
    """
    from keysync_jax.bench.sizes import size_of
    from keysync_jax.bench.training import VARIED, base_config, mesh_settings, settings_of
    from keysync_jax.train.config_file import load_stage_config

    if arguments.config is None:
        base = base_config(size_of(arguments.size or "tiny"), arguments.dtype or "fp32", devices)
    else:
        base = load_stage_config(arguments.config)
    given = {"batch_size": arguments.batch, "dtype": arguments.dtype}
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    changes += mesh_settings(arguments.mesh) if arguments.mesh is not None else []
    changes += arguments.set or []
    varied = VARIED if arguments.vary is None else arguments.vary
    return settings_of(base, varied, changes, "; ".join(arguments.set or []) or "as it is")


def _training(arguments: argparse.Namespace, repeats: int) -> list[Any]:
    from keysync_jax.bench.training import devices_here, measured_apart

    return measured_apart(_settings(arguments, devices_here()), repeats)


def _ahead(arguments: argparse.Namespace, parts: Sequence[str]) -> int:
    if arguments.against is not None or arguments.repeats is not None:
        raise UserError("--aot runs nothing: it takes no --against and no --repeats")
    if "dub" in parts:
        raise UserError("--aot runs nothing, so it cannot dub; the networks of a dub are unet, vae and audio")
    from keysync_jax.extras import needed_for

    with needed_for("keysync bench --aot"):
        from keysync_jax.ahead.chips import topology
        from keysync_jax.ahead.program import save, table

        chips = topology(arguments.aot)
    found = []
    for made in _compiled(arguments, parts, chips):
        found.append(made)
        print(table(made), end="\n\n", flush=True)
        if arguments.json is not None:
            save(arguments.json, arguments.aot, found)
    return 0


def _compiled(arguments: argparse.Namespace, parts: Sequence[str], chips: Any) -> Iterator[Any]:
    """Every program: a network for one chip, the training step for all of them."""
    from keysync_jax.bench.aot import compile_ahead
    from keysync_jax.bench.sizes import size_of
    from keysync_jax.train.ahead import step_ahead

    size = size_of(arguments.size or "tiny")
    dtype: Dtype = arguments.dtype or "fp32"
    for part in parts:
        if part == "train":
            # A compile takes minutes: only what is asked for.
            arguments.vary = arguments.vary or ()
            for setting in _settings(arguments, len(chips.devices)):
                yield step_ahead(setting.config, chips.devices, f"train {setting.name}")
        else:
            for workload in _made(part, size, dtype, arguments):
                yield compile_ahead(workload, chips)


def _report(arguments: argparse.Namespace) -> int:
    from keysync_jax.bench.everything import Plan, run

    if arguments.parts or arguments.aot is not None or arguments.against is not None:
        raise UserError(
            "--report measures everything that is here: it takes no parts, no --aot, no --against"
        )
    golden = arguments.golden or (
        "tests/golden/tiny" if Path("tests/golden/tiny.manifest.json").is_file() else None
    )
    plan = Plan(arguments.size, arguments.batch, arguments.repeats, golden)
    return run(arguments.report, plan, 60 * (10.0 if arguments.minutes is None else arguments.minutes))
