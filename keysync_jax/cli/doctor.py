"""The subcommand doctor."""

import argparse
from pathlib import Path
from typing import Any

from keysync_jax.cli.common import Commands, add_devices, add_longer_voice, fetch_models
from keysync_jax.errors import UserError


def add_doctor(commands: Commands) -> None:
    """`keysync doctor`."""
    parser = commands.add_parser("doctor", help="what is here and what is missing, before a dub is paid for")
    parser.add_argument("video", type=Path, nargs="?", metavar="VIDEO", help="to dub; without: this machine")
    parser.add_argument("audio", type=Path, nargs="?", metavar="AUDIO", help="the new voice")
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="with VIDEO: what a dub takes here")
    parser.add_argument(
        "--landmarks",
        default="mediapipe",
        metavar="none|mediapipe|face_alignment",
        help="detector that looks for faces (default mediapipe)",
    )
    parser.add_argument("--landmark-model", type=Path, metavar="FILE", help="the detector's model file")
    add_longer_voice(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="as of dub")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="as of dub")
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch a model of the hub, and the detector's file"
    )
    add_devices(parser)
    parser.set_defaults(run=_doctor, resumable=False, less_memory="try --memory small with dub")


def _doctor(arguments: argparse.Namespace) -> int:
    from keysync_jax.doctor.finding import table

    for name in ("steps", "dtype", "devices"):
        if getattr(arguments, name) is not None and arguments.model is None:
            raise UserError(f"--{name} goes with --model, whose dubs it changes")
    if arguments.video is None:
        if arguments.model is not None:
            raise UserError("--model goes with a VIDEO; without one this machine is looked at")
        if arguments.landmark_model is not None or arguments.allow_download:
            raise UserError("--landmark-model and --allow-download go with a VIDEO")
        from keysync_jax.doctor.installation import installation

        findings = installation()
    else:
        findings = _clip(arguments)
    print(table(findings))
    missing = [finding.about for finding in findings if finding.state == "missing"]
    if missing:
        print(f"missing: {', '.join(missing)}")
    return 1 if missing else 0


def _clip(arguments: argparse.Namespace) -> list[Any]:
    from keysync_jax.doctor.clip import clip_findings, cost_findings, frames_of_dub
    from keysync_jax.model import open_model
    from keysync_jax.pipeline.dub import DubSettings

    settings = DubSettings(
        landmarks="mediapipe" if arguments.landmarks == "none" else arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        longer_voice=arguments.longer_voice,
        steps=arguments.steps,
        dtype=arguments.dtype,
        devices=arguments.devices,
    )
    findings = clip_findings(arguments.video, arguments.audio, settings, arguments.landmarks != "none")
    if arguments.model is not None:
        fetch_models(arguments, arguments.model)
        frames = frames_of_dub(arguments.video, arguments.audio, settings)
        findings += cost_findings(open_model(arguments.model, only=()), frames, settings)
    return findings
