"""Subcommands that turn models into others: convert, export."""

import argparse
from pathlib import Path

from keysync_jax.cli.common import Commands
from keysync_jax.errors import UserError


def add_convert(commands: Commands) -> None:
    """`keysync convert`."""
    parser = commands.add_parser("convert", help="PyTorch checkpoints to a model directory")
    parser.add_argument(
        "--keyframe", type=Path, required=True, metavar="FILE", help="keyframe stage (.pt, ...)"
    )
    parser.add_argument(
        "--interpolation", type=Path, required=True, metavar="FILE", help="interpolation stage"
    )
    parser.add_argument(
        "--vae", type=Path, required=True, metavar="PATH", help="SVD file, or diffusers' vae folder"
    )
    for stage in ("keyframe", "interpolation"):
        parser.add_argument(
            f"--audio-{stage}",
            required=True,
            metavar="KIND=PATH",
            help=f"encoder that the {stage} stage was trained on (hubert, wav2vec2, wavlm), its checkpoint",
        )
    parser.add_argument("--head-size", type=int, default=64, help="width of an attention head (default 64)")
    parser.add_argument(
        "--mask", default="box", choices=("box", "full", "heart", "mouth"), help="training mask"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL_DIR", help="a new folder")
    parser.set_defaults(run=_convert, resumable=False, less_memory="run it on the CPU")


def _convert(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from keysync_jax.convert.checkpoint import AudioSource, Checkpoints, convert

    checkpoints = Checkpoints(
        arguments.keyframe,
        arguments.interpolation,
        arguments.vae,
        {
            "keyframe": AudioSource.parse(arguments.audio_keyframe),
            "interpolation": AudioSource.parse(arguments.audio_interpolation),
        },
    )
    with tqdm(desc="writing", unit="B", unit_scale=True) as bar:
        config = convert(checkpoints, arguments.output, arguments.head_size, arguments.mask, bar.update)
    for stage in (config.keyframe, config.interpolation):
        print(f"{stage.kind}: audio from {stage.audio_encoder}, U-Net widths {stage.unet.block_out_channels}")
    print(f"wrote {arguments.output}")
    return 0


def add_export(commands: Commands) -> None:
    """`keysync export`."""
    parser = commands.add_parser("export", help="training runs to a model directory, or that to PyTorch")
    parser.add_argument(
        "source", type=Path, nargs="+", metavar="RUN|MODEL_DIR", help="one or two runs; with --to, a model"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--base", type=Path, metavar="MODEL_DIR", help="what the runs did not train")
    parser.add_argument("--average", action="store_true", help="take the moving averages of the weights")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: half the size (default fp32)"
    )
    parser.add_argument("--to", choices=("reference", "diffusers"), help="a layout of PyTorch")
    parser.add_argument("--pickled", action="store_true", help="with --to reference: DeepSpeed's .pt")
    parser.set_defaults(run=_export, resumable=False, less_memory="run it on the CPU")


def _export(arguments: argparse.Namespace) -> int:
    if arguments.to is not None:
        from keysync_jax.convert.export import export_torch

        only_of_runs = (arguments.base is not None, arguments.average, arguments.dtype != "fp32")
        if len(arguments.source) != 1 or any(only_of_runs):
            raise UserError("export --to takes one model directory, and no --base, --average or --dtype")
        export_torch(arguments.source[0], arguments.output, arguments.to, arguments.pickled)
    elif arguments.pickled:
        raise UserError("export --pickled goes with --to reference")
    elif arguments.base is None:
        raise UserError("export needs --base: the model directory with what the runs did not train")
    else:
        from keysync_jax.train.export import export

        export(arguments.source, arguments.output, arguments.base, arguments.average, arguments.dtype)
    print(f"wrote {arguments.output}")
    return 0
