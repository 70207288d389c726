"""`keysync parity`: against the release itself, or against golden numbers of it."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from keysync_jax.cli.common import Commands, keep_compiled_programs
from keysync_jax.errors import UserError

DTYPES = ("fp32", "tf32", "bf16", "fp16")
SCRIPTS = ("infer_raw", "inference", "train")


def add_parity(commands: Commands) -> None:
    """`keysync parity`."""
    parser = commands.add_parser("parity", help="compare with the PyTorch reference, or with its numbers")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--golden", metavar="PREFIX", help="of PREFIX.manifest.json and PREFIX.safetensors")
    source.add_argument("--reference", type=Path, metavar="CHECKOUT", help="run the release in this checkout")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (default fp32)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="a new folder: table, picture, numbers"
    )
    live = parser.add_argument_group("with --reference")
    live.add_argument("--python", type=Path, metavar="PYTHON", help="of the release's environment")
    weights = live.add_mutually_exclusive_group()
    weights.add_argument("--model", type=Path, metavar="MODEL_DIR", help="compare with these weights")
    weights.add_argument(
        "--size", choices=("tiny", "mid", "full"), help="weights by the rule of their names (default tiny)"
    )
    clip = parser.add_argument_group("with --reference and --model: the whole pipeline on a clip")
    clip.add_argument("--clip", type=Path, metavar="VIDEO", help="with a face in every frame")
    clip.add_argument("--voice", type=Path, metavar="AUDIO", help="what it is to say")
    clip.add_argument("--landmarks", default="mediapipe", metavar="FILE|NAME", help="as dub takes it")
    clip.add_argument("--landmark-model", type=Path, metavar="FILE", help="as dub takes it")
    clip.add_argument("--frames", type=int, default=27, metavar="N", help="most that are taken (default 27)")
    live.add_argument(
        "--as-released",
        choices=SCRIPTS,
        help="precisions of the release's scripts/NAME.sh, or of its training",
    )
    live.add_argument("--training", action="store_true", help="the loss of a batch and its gradients too")
    live.add_argument("--layers", action="store_true", help="every single layer, not the blocks alone")
    live.add_argument("--no-sampling", action="store_true", help="leave the sampling loops out")
    live.add_argument(
        "--no-exact", action="store_true", help="do not run the release in fp64; bounds as of golden files"
    )
    live.add_argument(
        "--floors", type=Path, metavar="FILE", help="measure the release's precisions against fp64, no more"
    )
    live.add_argument(
        "--device", choices=("cpu", "cuda"), help="of both (default: what JAX is installed for)"
    )
    live.add_argument("--attention", choices=("xformers", "torch"), default="xformers", help="of the release")
    live.add_argument("--timeout", type=float, default=240, metavar="MINUTES", help="of a run (default 240)")
    parser.set_defaults(run=_parity, resumable=False, less_memory="try a smaller size, or --no-sampling")


def _parity(arguments: argparse.Namespace) -> int:
    if arguments.golden is not None:
        _refuse_live_options(arguments)
        return _golden(arguments)
    if arguments.python is None:
        raise UserError("parity --reference needs --python: the interpreter of the release's environment")
    if arguments.as_released and arguments.dtype:
        raise UserError("parity --as-released says what each network computes in; give no --dtype")
    return _live(arguments)


def _refuse_live_options(arguments: argparse.Namespace) -> None:
    given = ("python", "model", "size", "as_released", "training", "layers", "no_sampling", "no_exact")
    if names := [name for name in (*given, "floors", "device", "clip", "voice") if getattr(arguments, name)]:
        raise UserError(f"parity --{names[0].replace('_', '-')} goes with --reference")


def _golden(arguments: argparse.Namespace) -> int:
    keep_compiled_programs()
    from keysync_jax.files import new_folder
    from keysync_jax.parity.compare import compare
    from keysync_jax.parity.report import held, report, write_report

    dtype = arguments.dtype or "fp32"
    if arguments.output is None:
        return 0 if held(report(compare(arguments.golden, dtype), _say)) else 1
    with new_folder(arguments.output) as folder:
        done = report(compare(arguments.golden, dtype), _say)
        write_report(folder, done, {"title": f"Golden numbers {Path(arguments.golden).name}, {dtype}"})
    return 0 if held(done) else 1


def _live(arguments: argparse.Namespace) -> int:
    # Both sides are on one device: JAX must not take most of its memory before the release has run.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_compiled_programs()
    from keysync_jax.files import new_folder, temporary_folder
    from keysync_jax.parity.live import Request, compare_live, networks
    from keysync_jax.parity.release import Release, own_device

    release = Release(
        arguments.reference,
        arguments.python,
        arguments.device or own_device(),
        arguments.attention,
        60 * arguments.timeout,
    )
    request = Request(
        networks(arguments.model, arguments.size or "tiny"),
        arguments.as_released or arguments.dtype or "fp32",
        arguments.training,
        arguments.layers,
        not arguments.no_sampling,
        _clip(arguments),
    )
    if arguments.floors:
        return _floors(release, request, arguments.floors)
    place: Any = new_folder(arguments.output) if arguments.output else temporary_folder("keysync-parity")
    with place as folder:
        return 0 if compare_live(release, request, folder, not arguments.no_exact, _say) else 1


def _clip(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both pipelines are given; empty where no clip is."""
    given = (arguments.clip, arguments.voice)
    if given == (None, None):
        return {}
    if None in (*given, arguments.model):
        raise UserError(
            "parity on a clip needs --clip, --voice and --model, whose encoders and VAE it goes through"
        )
    from keysync_jax.model import open_model
    from keysync_jax.parity.clip import ClipSource, clip_inputs

    source = ClipSource(*given, arguments.landmarks, arguments.landmark_model, arguments.frames)
    return clip_inputs(open_model(arguments.model), source)


def _floors(release: Any, request: Any, path: Path) -> int:
    from keysync_jax.files import temporary_folder
    from keysync_jax.parity.bounds import write_floors
    from keysync_jax.parity.live import measure_floors

    with temporary_folder("keysync-parity") as folder:
        everything = dataclasses.replace(request, training=True, layers=True)
        floors = measure_floors(release, everything, folder, _say)
    write_floors(path, request.networks.size, release.device, floors)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
