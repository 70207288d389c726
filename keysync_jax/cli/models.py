"""Subcommands that turn models into others: convert, export."""

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from keysync_jax.cli.common import Commands, add_allow_download, fetch_models
from keysync_jax.config import StageKind
from keysync_jax.errors import UserError
from keysync_jax.hub import is_address

if typing.TYPE_CHECKING:
    from keysync_jax.convert.checkpoint import Checkpoints
    from keysync_jax.convert.scorers import ScorerKind


_SCORERS: Mapping["ScorerKind", str] = {
    "syncnet": "SyncNet's syncnet_v2.model (LSE-C, LSE-D)",
    "light-asd": "Light-ASD's finetuning_TalkSet.model (active speaker)",
    "lip-reader": "Auto-AVSR's vsr_trlrs2lrs3vox2avsp_base.pth (LipScore)",
}


def add_convert(commands: Commands) -> None:
    """`keysync convert`."""
    parser = commands.add_parser(
        "convert",
        help="PyTorch checkpoints to a model directory, or one of a network that judges to a file of ours",
        epilog="A FILE may be on the hub: hub:OWNER/NAME[@REVISION]/FILE.",
    )
    parser.add_argument(
        "--released",
        action="store_true",
        help="the release's files on the hub, but for those named otherwise",
    )
    parser.add_argument("--keyframe", type=Path, metavar="FILE", help="keyframe stage (.pt, ...)")
    parser.add_argument("--interpolation", type=Path, metavar="FILE", help="interpolation stage")
    parser.add_argument("--vae", type=Path, metavar="PATH", help="SVD file, or diffusers' vae folder")
    for stage in ("keyframe", "interpolation"):
        parser.add_argument(
            f"--audio-{stage}",
            metavar="KIND=PATH",
            help=f"encoder that the {stage} stage was trained on (hubert, wav2vec2, wavlm), its checkpoint",
        )
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch what is on the hub and not in its cache"
    )
    parser.add_argument("--head-size", type=int, default=64, help="width of an attention head (default 64)")
    parser.add_argument(
        "--mask", default="box", choices=("box", "full", "heart", "mouth"), help="training mask"
    )
    parser.add_argument(
        "--decoder",
        default="stage",
        choices=("stage", "vae"),
        help="the interpolation stage's own, where its file has one, or the VAE's (default stage)",
    )
    judges = parser.add_argument_group("networks that judge clips", "one at a time; see docs/metrics.md")
    for kind, what in _SCORERS.items():
        judges.add_argument(f"--{kind}", metavar="FILE", help=what)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="MODEL_DIR",
        help="a new folder; of a network that judges, a .safetensors file",
    )
    parser.set_defaults(run=_convert, resumable=False, less_memory="run it on the CPU")


def _convert(arguments: argparse.Namespace) -> int:
    judges = [kind for kind in _SCORERS if getattr(arguments, kind.replace("-", "_")) is not None]
    if judges:
        return _convert_scorer(arguments, judges)
    from tqdm import tqdm

    from keysync_jax.convert.checkpoint import convert

    checkpoints = _checkpoints(arguments)
    # What was fetched stays, and what had arrived of a file.
    arguments.resumable = any(is_address(path) for path in checkpoints.inputs().values())
    with tqdm(desc="writing", unit="B", unit_scale=True, delay=1) as bar:
        config = convert(
            checkpoints,
            arguments.output,
            arguments.head_size,
            arguments.mask,
            bar.update,
            decoder=arguments.decoder,
            allow_download=arguments.allow_download,
            say=lambda line: print(line, flush=True),
        )
    for stage in (config.keyframe, config.interpolation):
        print(f"{stage.kind}: audio from {stage.audio_encoder}, U-Net widths {stage.unet.block_out_channels}")
    print(f"wrote {arguments.output}")
    return 0


def _convert_scorer(arguments: argparse.Namespace, kinds: Sequence["ScorerKind"]) -> int:
    """One network that judges clips; nothing else is converted with it."""
    from keysync_jax.convert.scorers import convert_scorer

    stages = ("released", "keyframe", "interpolation", "vae", "audio_keyframe", "audio_interpolation")
    if len(kinds) > 1 or any(getattr(arguments, name) for name in stages):
        raise UserError(f"convert takes --{kinds[0]} alone: it writes one file, not a model directory")
    (kind,) = kinds
    checkpoint = getattr(arguments, kind.replace("-", "_"))
    arguments.resumable = is_address(checkpoint)
    convert_scorer(
        kind,
        checkpoint,
        arguments.output,
        allow_download=arguments.allow_download,
        say=lambda line: print(line, flush=True),
    )
    print(f"wrote {arguments.output}")
    return 0


def _checkpoints(arguments: argparse.Namespace) -> "Checkpoints":
    """What to convert: all of it named, or the release's with what is named in its place."""
    from keysync_jax.convert.checkpoint import AudioSource, Checkpoints

    paths = {name: getattr(arguments, name) for name in ("keyframe", "interpolation", "vae")}
    audio = {kind: getattr(arguments, f"audio_{kind}") for kind in typing.get_args(StageKind)}
    absent = [f"--{name}" for name, path in paths.items() if path is None]
    absent += [f"--audio-{kind}" for kind, path in audio.items() if path is None]
    if absent and not arguments.released:
        raise UserError(f"convert needs {', '.join(absent)}, or --released for the release's own")
    named = {kind: AudioSource.parse(text) for kind, text in audio.items() if text is not None}
    if not arguments.released:
        return Checkpoints(**paths, audio=named)
    released = Checkpoints.released()
    given = {name: path for name, path in paths.items() if path is not None}
    return dataclasses.replace(released, **given, audio={**released.audio, **named})


def add_export(commands: Commands) -> None:
    """`keysync export`."""
    parser = commands.add_parser(
        "export", help="training runs to a model directory, or that to PyTorch or to a folder for the hub"
    )
    parser.add_argument(
        "source", type=Path, nargs="+", metavar="RUN|MODEL_DIR", help="one or two runs; with --to, a model"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--base", type=Path, metavar="MODEL_DIR", help="what the runs did not train")
    parser.add_argument("--average", action="store_true", help="take the moving averages of the weights")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: half the size (default fp32)"
    )
    parser.add_argument(
        "--to",
        choices=("reference", "diffusers", "hub-folder"),
        help="a layout of PyTorch, or the model directory with a model card",
    )
    parser.add_argument("--pickled", action="store_true", help="with --to reference: DeepSpeed's .pt")
    parser.add_argument(
        "--metrics", type=Path, metavar="SCORES.json", help="with --to hub-folder: of keysync synth-eval"
    )
    parser.add_argument(
        "--licence",
        metavar="ID",
        help="with --to hub-folder: of the weights, as the hub names it (mit, other)",
    )
    add_allow_download(parser)
    parser.set_defaults(run=_export, resumable=False, less_memory="run it on the CPU")


def _export(arguments: argparse.Namespace) -> int:
    if arguments.to != "hub-folder" and (arguments.metrics is not None or arguments.licence is not None):
        raise UserError("export --metrics and --licence go with --to hub-folder")
    if arguments.pickled and arguments.to != "reference":
        raise UserError("export --pickled goes with --to reference")
    if arguments.to is not None:
        only_of_runs = (arguments.base is not None, arguments.average, arguments.dtype != "fp32")
        if len(arguments.source) != 1 or any(only_of_runs):
            raise UserError("export --to takes one model directory, and no --base, --average or --dtype")
        fetch_models(arguments, *arguments.source)
        _export_model(arguments)
    elif arguments.base is None:
        raise UserError("export needs --base: the model directory with what the runs did not train")
    else:
        from keysync_jax.train.export import export

        fetch_models(arguments, arguments.base)
        export(arguments.source, arguments.output, arguments.base, arguments.average, arguments.dtype)
    print(f"wrote {arguments.output}")
    if arguments.to == "hub-folder":
        print(f"to upload it: hf upload OWNER/NAME {arguments.output}")
    return 0


def _export_model(arguments: argparse.Namespace) -> None:
    """A model directory in the layout of `--to`."""
    (source,) = arguments.source
    if arguments.to == "hub-folder":
        from keysync_jax.publish import publish

        publish(source, arguments.output, arguments.licence, arguments.metrics)
    else:
        from keysync_jax.convert.export import export_torch

        export_torch(source, arguments.output, arguments.to, arguments.pickled)
