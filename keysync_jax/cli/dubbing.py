"""The subcommand dub."""

import argparse
from pathlib import Path

from keysync_jax.cli.common import (
    Commands,
    add_allow_download,
    add_decoder,
    add_devices,
    add_guidance_interval,
    fetch_models,
    intervals,
    keep_compiled_programs,
)
from keysync_jax.errors import UserError


def add_dub(commands: Commands) -> None:
    """`keysync dub`."""
    parser = commands.add_parser("dub", help="dub a video with a voice")
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("audio", type=Path, metavar="AUDIO", help="the new voice, any file with sound")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4")
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
    parser.add_argument(
        "--steps", type=int, metavar="N", help="align-your-steps, 10 or more (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16, on CPU fp32")
    parser.add_argument(
        "--quality", type=int, default=16, metavar="CRF", help="0 (lossless) to 51 (default 16)"
    )
    _add_speed(parser)
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
    keep_compiled_programs()
    from keysync_jax.pipeline.dub import DubSettings, dub

    audio, identity = intervals(arguments)
    settings = DubSettings(
        landmarks=arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        occluder=arguments.occluder,
        identity=arguments.identity,
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
    report = dub(
        arguments.video, arguments.audio, arguments.output, arguments.model, settings, show_progress=True
    )
    print(report.phases.table())
    if report.frames_without_face:
        print(f"{report.frames_without_face} frames without a face passed through undubbed")
    print(f"wrote {report.output}: {report.frames} frames, {report.frames / 25:.2f} s")
    return 0
