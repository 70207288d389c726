"""The subcommand dub."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from keysync_jax.cli.common import (
    Commands,
    add_allow_download,
    add_decoder,
    add_devices,
    add_guidance_interval,
    add_longer_voice,
    add_ray,
    fetch_models,
    intervals,
    keep_compiled_programs,
)
from keysync_jax.errors import UserError

if TYPE_CHECKING:
    from keysync_jax.pipeline.dub import DubSettings


def add_dub(commands: Commands) -> None:
    """`keysync dub`."""
    parser = commands.add_parser("dub", help="dub a video with a voice, or many")
    parser.add_argument("video", type=Path, nargs="?", metavar="VIDEO")
    parser.add_argument(
        "audio", type=Path, nargs="?", metavar="AUDIO", help="the new voice, any file with sound"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT.mp4",
        help="with --pairs a folder",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE.csv",
        help="many dubs instead of one: columns video, voice, and if wanted out and options; exit code 1 if"
        " some could not be dubbed",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="what was done and made from what, as JSON"
    )
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL_DIR", help="see keysync convert")
    parser.add_argument(
        "--landmarks",
        default="mediapipe",
        metavar="FILE|mediapipe|face_alignment",
        help="a .npy file [frames, 68, 2], or a detector (default mediapipe)",
    )
    parser.add_argument("--landmark-model", type=Path, metavar="FILE", help="the detector's model file")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="fetch the detector's model file, and a model of the hub (hub:OWNER/NAME)",
    )
    parser.add_argument(
        "--occluder",
        type=Path,
        metavar="FILE",
        help=".npy or .npz masks [frames, H, W] of what lies before the face",
    )
    parser.add_argument(
        "--identity",
        default="first",
        metavar="first|current|random|dissimilar|N|FILE",
        help="what shows who it is: a frame of the video (first: of those with a face; N: by number), every"
        " frame itself (current), or a picture (default first)",
    )
    add_longer_voice(parser)
    parser.add_argument(
        "--no-provenance",
        dest="provenance",
        action="store_false",
        help="do not write into the file that its picture is synthetic, and what made it",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="align-your-steps, 10 or more (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16, on CPU fp32")
    parser.add_argument(
        "--quality", type=int, default=16, metavar="CRF", help="0 (lossless) to 51 (default 16)"
    )
    _add_speed(parser)
    add_ray(parser)
    less = "try --memory small, --dtype bf16, or fewer --windows-per-call"
    parser.set_defaults(run=_dub, resumable=True, less_memory=less)


def add_warm(commands: Commands) -> None:
    """`keysync warm`."""
    parser = commands.add_parser("warm", help="compile what dub runs, so that the first dub starts at once")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        metavar="S",
        help="of the voices to come (default 60); on several devices short ones have programs of their own",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="as of dub")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16, on CPU fp32")
    _add_speed(parser)
    add_allow_download(parser)
    parser.set_defaults(run=_warm, resumable=True, less_memory="try --memory small")


def _add_speed(parser: argparse.ArgumentParser) -> None:
    """Options that programs depend on, and results by rounding alone."""
    parser.add_argument(
        "--memory",
        choices=("small", "balanced", "fast"),
        default="balanced",
        help="how much of a device's memory is used (default balanced)",
    )
    parser.add_argument(
        "--windows-per-call",
        type=int,
        metavar="N",
        help="batch of windows a device, at most (default: 1; as many as fit with --memory fast)",
    )
    add_guidance_interval(parser)
    add_decoder(parser)
    add_devices(parser)


def _warm(arguments: argparse.Namespace) -> int:
    keep_compiled_programs()
    from keysync_jax.model import open_model
    from keysync_jax.pipeline.dub import DubSettings
    from keysync_jax.pipeline.warm import warm

    if arguments.seconds <= 0:
        raise UserError(f"a voice lasts more than {arguments.seconds:g} seconds")
    audio, identity = intervals(arguments)
    settings = DubSettings(
        steps=arguments.steps,
        audio_interval=audio,
        identity_interval=identity,
        decoder=arguments.decoder,
        dtype=arguments.dtype,
        memory=arguments.memory,
        windows_per_call=arguments.windows_per_call,
        devices=arguments.devices,
    )
    fetch_models(arguments, arguments.model)
    model = open_model(arguments.model, only=())
    (done,) = warm(model, settings, max(round(25 * arguments.seconds), 1), show_progress=True).done
    print(f"compiled {done.compiled} programs in {done.seconds:.1f} s; the others were there")
    return 0


def _dub(arguments: argparse.Namespace) -> int:
    if arguments.pairs is None and (arguments.video is None or arguments.audio is None):
        raise UserError("dub takes VIDEO and AUDIO, or --pairs FILE.csv")
    if arguments.pairs is not None and (arguments.video is not None or arguments.report is not None):
        raise UserError("dub --pairs takes no VIDEO, AUDIO or --report; every pair has its report beside it")
    if arguments.ray is not None and arguments.pairs is None:
        raise UserError("dub --ray is for many dubs; give --pairs FILE.csv")
    keep_compiled_programs()
    from keysync_jax.pipeline.dub import DubSettings

    audio, identity = intervals(arguments)
    settings = DubSettings(
        landmarks=arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        occluder=arguments.occluder,
        identity=arguments.identity,
        longer_voice=arguments.longer_voice,
        provenance=arguments.provenance,
        steps=arguments.steps,
        audio_interval=audio,
        identity_interval=identity,
        decoder=arguments.decoder,
        seed=arguments.seed,
        dtype=arguments.dtype,
        quality=arguments.quality,
        memory=arguments.memory,
        windows_per_call=arguments.windows_per_call,
        devices=arguments.devices,
    )
    return _dub_one(arguments, settings) if arguments.pairs is None else _dub_many(arguments, settings)


def _dub_one(arguments: argparse.Namespace, settings: "DubSettings") -> int:
    from keysync_jax.pipeline.dub import dub

    if arguments.report is not None:
        _check_report(arguments)
    report = dub(
        arguments.video, arguments.audio, arguments.output, arguments.model, settings, show_progress=True
    )
    if arguments.report is not None:
        report.save(arguments.report)
    print(report.phases.table())
    if report.frames_without_face:
        print(f"{report.frames_without_face} frames without a face passed through undubbed")
    print(f"wrote {report.output}: {report.frames} frames, {report.frames / 25:.2f} s")
    return 0


def _check_report(arguments: argparse.Namespace) -> None:
    """Refuses now a report that could not be written after the dub."""
    path = arguments.report
    others = (arguments.video, arguments.audio, arguments.output)
    if path.resolve() in {other.resolve() for other in others}:
        raise UserError(f"cannot write {path}: it is an input or the dub; give the report a name of its own")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}: give the name of a file in a folder that exists")


def _dub_many(arguments: argparse.Namespace, settings: "DubSettings") -> int:
    from keysync_jax.model import model_folder, open_model
    from keysync_jax.pipeline.pairs import dub_pairs, read_pairs

    pairs = read_pairs(arguments.pairs, arguments.output, settings)
    model = open_model(model_folder(arguments.model, arguments.allow_download))
    made = None
    if arguments.ray is not None:
        if arguments.devices is not None:
            raise UserError("--ray takes all devices of the cluster; leave --devices out")
        from keysync_jax.launch.ray_dub import on_ray

        made = on_ray(model.folder, arguments.ray)
    report = dub_pairs(pairs, arguments.output, model, show_progress=True, made=made)
    print(report.table())
    return 1 if report.failed else 0
