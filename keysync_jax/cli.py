"""The command `keysync`: one subcommand a job, each also a Python function.

Nothing heavy is imported before a subcommand runs, so `keysync --help` is quick.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from keysync_jax import __version__
from keysync_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code.

    0: done. 1: a check did not hold (`parity`, `synth-eval`). 2: something the user gave cannot be used, said
    in one sentence on stderr. 130: interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # --config.x.y=v are settings, whose names argparse does not know.
    overrides = [a for a in given if a.startswith("--config.")]
    parser = _parser()
    arguments = parser.parse_args([a for a in given if a not in overrides])
    if overrides and arguments.run is not _train:
        parser.error(f"{overrides[0]} is a setting of keysync train")
    arguments.overrides = overrides
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where this one was" if arguments.resumable else ""
        print(f"keysync: interrupted{goes_on}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"the disk is full ({error.filename or 'while writing'})")
        if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return _fail(f"{error.filename}: {error.strerror}")
        raise
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(f"the device has too little memory; {arguments.less_memory}")
        raise


def _fail(sentence: str) -> int:
    print(f"keysync: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keysync", description="Audio-driven lip synchronisation in JAX.")
    parser.add_argument("--version", action="version", version=f"keysync_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_convert(commands)
    _add_dub(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_export(commands)
    _add_init(commands)
    _add_synth(commands)
    _add_synth_eval(commands)
    _add_demo(commands)
    _add_parity(commands)
    return parser


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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


def _add_dub(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        "--allow-download", action="store_true", help="fetch the detector's model file if needed"
    )
    parser.add_argument(
        "--occluder",
        type=Path,
        metavar="FILE",
        help=".npy or .npz masks [frames, H, W] of what lies before the face",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="align-your-steps, 10 or more (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16, on CPU fp32")
    parser.add_argument(
        "--quality", type=int, default=16, metavar="CRF", help="0 (lossless) to 51 (default 16)"
    )
    parser.add_argument(
        "--windows-per-call", type=int, default=1, metavar="N", help="batch of windows (default 1)"
    )
    less = "try --dtype bf16, or fewer --windows-per-call"
    parser.set_defaults(run=_dub, resumable=True, less_memory=less)


def _dub(arguments: argparse.Namespace) -> int:
    _keep_compiled_programs()
    from keysync_jax.pipeline.dub import DubSettings, dub

    settings = DubSettings(
        landmarks=arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        occluder=arguments.occluder,
        steps=arguments.steps,
        seed=arguments.seed,
        dtype=arguments.dtype,
        quality=arguments.quality,
        windows_per_call=arguments.windows_per_call,
    )
    report = dub(
        arguments.video, arguments.audio, arguments.output, arguments.model, settings, show_progress=True
    )
    print(report.phases.table())
    if report.frames_without_face:
        print(f"{report.frames_without_face} frames without a face passed through undubbed")
    print(f"wrote {report.output}: {report.frames} frames, {report.frames / 25:.2f} s")
    return 0


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("prepare", help="raw clips to a dataset to train on")
    parser.add_argument(
        "source",
        type=Path,
        nargs="*",
        metavar="SOURCE",
        help="a folder, videos, a .txt list of videos, or a folder in the reference's layout",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DATASET")
    parser.add_argument("--check", type=Path, metavar="DATASET", help="check a dataset, and stop")
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="whose VAE and audio encoders to use")
    parser.add_argument(
        "--crop", type=int, metavar="SIZE", help="without --model: crops alone, to train a VAE on"
    )
    parser.add_argument("--encoders", default="", metavar="KIND,KIND", help="default: all of the model's")
    parser.add_argument(
        "--pitch",
        default="",
        metavar="N,N",
        help="features of shifted voices too: semitones, as --pitch=-2,2",
    )
    parser.add_argument("--landmarks", default="mediapipe", metavar="mediapipe|face_alignment")
    parser.add_argument("--landmark-model", type=Path, metavar="FILE", help="the detector's model file")
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch the detector's model file if needed"
    )
    parser.add_argument(
        "--latents", choices=("posterior", "sample"), default="posterior", help="what to store"
    )
    parser.add_argument("--seed", type=int, default=0, help="of stored samples (default 0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the VAE (default fp32)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode (default 0)"
    )
    parser.set_defaults(run=_prepare, resumable=True, less_memory="try --dtype bf16")


def _prepare(arguments: argparse.Namespace) -> int:
    from keysync_jax.launch.prepare import PrepareSettings, check, prepare

    if arguments.check is not None:
        dataset = check(arguments.check, show_progress=True)
        print(f"{arguments.check}: {len(dataset.manifest.clips)} clips, every shard and record is whole")
        return 0
    if arguments.output is None or not arguments.source:
        raise UserError("prepare needs SOURCE and -o DATASET, or --check DATASET")
    _keep_compiled_programs()
    settings = PrepareSettings(
        encoders=tuple(filter(None, arguments.encoders.split(","))),
        pitch=_semitones(arguments.pitch),
        landmarks=arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        latents=arguments.latents,
        seed=arguments.seed,
        dtype=arguments.dtype,
        workers=arguments.workers,
        crop=arguments.crop,
    )
    source = arguments.source[0] if len(arguments.source) == 1 else arguments.source
    print(prepare(source, arguments.output, arguments.model, settings, show_progress=True).table())
    return 0


def _semitones(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(",") if number)
    except ValueError:
        raise UserError(f"--pitch takes semitones, as --pitch=-2,2, not {text!r}") from None


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from keysync_jax.launch.train import add_arguments

    parser = commands.add_parser("train", help="train one stage")
    add_arguments(parser)
    less = "try a smaller batch_size with optimizer.accumulate, remat=layer, or a larger mesh.fsdp"
    parser.set_defaults(run=_train, resumable=True, less_memory=less)


def _train(arguments: argparse.Namespace) -> int:
    from keysync_jax.launch.train import run

    return run(arguments, arguments.overrides)


def _add_init(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("init", help="a model directory to start training from")
    parser.add_argument("--vae", type=Path, required=True, metavar="RUN", help="run that trained its VAE")
    for stage in ("keyframe", "interpolation"):
        parser.add_argument(
            f"--{stage}", type=Path, required=True, metavar="FILE", help="config of that stage's run"
        )
    parser.add_argument("--average", action="store_true", help="take the moving average of the VAE's weights")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL_DIR", help="a new folder")
    parser.set_defaults(run=_init, resumable=False, less_memory="run it on the CPU")


def _init(arguments: argparse.Namespace) -> int:
    from keysync_jax.launch.train import load_stage_config
    from keysync_jax.train.new_model import new_model

    stages = (load_stage_config(arguments.keyframe), load_stage_config(arguments.interpolation))
    new_model(arguments.vae, *stages, arguments.output, arguments.average)
    print(f"wrote {arguments.output}; its stages are untrained")
    return 0


def _add_synth(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("synth", help="clips of synthetic talking heads, with their truth")
    parser.add_argument("-n", "--clips", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the clips")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the world (default 0)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a clip (default 8)")
    parser.add_argument(
        "--occluded", type=float, default=0.0, metavar="SHARE", help="clips with a hand or a microphone"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default 0: this one)")
    parser.set_defaults(run=_synth, resumable=True, less_memory="make fewer clips at once")


def _synth(arguments: argparse.Namespace) -> int:
    from keysync_jax.launch.synth import SynthSettings, synth

    settings = SynthSettings(
        clips=arguments.clips,
        seconds=arguments.seconds,
        seed=arguments.seed,
        occluded=arguments.occluded,
        workers=arguments.workers,
    )
    made = synth(arguments.output, settings, show_progress=True)
    print(f"{arguments.output}: {settings.clips} clips, {made} of them new")
    return 0


def _add_synth_eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("synth-eval", help="measure a model where the truth is known")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="clips and dubs")
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="default: the embedded model")
    parser.add_argument("-n", "--clips", type=int, default=20, metavar="N", help="pairs (default 20)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a clip (default 4)")
    parser.add_argument("--seed", type=int, default=1_000_003, metavar="S", help="of the world")
    parser.add_argument(
        "--ablations", action="store_true", help="measure variants of guidance, and occlusion, too"
    )
    parser.add_argument(
        "--ablation-clips", type=int, default=8, metavar="N", help="pairs of a variant (default 8)"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=MODEL_DIR",
        help="another model, measured like a variant; may be repeated",
    )
    less = "try fewer --clips"
    parser.set_defaults(run=_synth_eval, resumable=True, less_memory=less)


def _synth_eval(arguments: argparse.Namespace) -> int:
    _keep_compiled_programs()
    from keysync_jax.launch.synth_eval import EvalSettings, evaluate, report
    from keysync_jax.model import DEFAULT, open_model

    settings = EvalSettings(
        clips=arguments.clips,
        seconds=arguments.seconds,
        seed=arguments.seed,
        ablations=arguments.ablations,
        ablation_clips=arguments.ablation_clips,
    )
    others = dict(_named_folder(text) for text in arguments.compare)
    models = {name: open_model(folder) for name, folder in others.items()}
    model = open_model(arguments.model or DEFAULT)
    scores = evaluate(model, arguments.output, settings, models, show_progress=True)
    print(report(scores))
    return 1 if scores["model"].missed else 0


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UserError(f"--compare takes NAME=MODEL_DIR, not {text!r}")
    return name, Path(folder)


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("demo", help="dub a synthetic clip with the embedded model")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="default: demo"
    )
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="default: the embedded model")
    parser.add_argument("--number", type=int, default=0, metavar="N", help="of the person (default 0)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the clip (default 5)")
    parser.set_defaults(run=_demo, resumable=True, less_memory="try fewer --seconds")


def _demo(arguments: argparse.Namespace) -> int:
    _keep_compiled_programs()
    from keysync_jax.launch.demo import demo
    from keysync_jax.model import DEFAULT, open_model

    if arguments.number < 0 or not 1 <= arguments.seconds <= 60:
        raise UserError("a demo takes --number 0 or more and --seconds from 1 to 60")
    model = open_model(arguments.model or DEFAULT)
    found = demo(model, arguments.output, arguments.number, arguments.seconds, show_progress=True)
    print(found.phases.table())
    print(f"\n{found.scores.table()}\n\nwrote {found.dub} and {found.side_by_side}")
    return 0


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    from keysync_jax.train.export import export, export_torch

    if arguments.to is not None:
        only_of_runs = (arguments.base is not None, arguments.average, arguments.dtype != "fp32")
        if len(arguments.source) != 1 or any(only_of_runs):
            raise UserError("export --to takes one model directory, and no --base, --average or --dtype")
        export_torch(arguments.source[0], arguments.output, arguments.to, arguments.pickled)
    elif arguments.pickled:
        raise UserError("export --pickled goes with --to reference")
    elif arguments.base is None:
        raise UserError("export needs --base: the model directory with what the runs did not train")
    else:
        export(arguments.source, arguments.output, arguments.base, arguments.average, arguments.dtype)
    print(f"wrote {arguments.output}")
    return 0


def _add_parity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("parity", help="compare with the PyTorch reference's numbers")
    parser.add_argument(
        "--golden", required=True, metavar="PREFIX", help="of PREFIX.manifest.json and PREFIX.safetensors"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the networks (default fp32)"
    )
    parser.set_defaults(run=_parity, resumable=False, less_memory="try a smaller golden file")


def _parity(arguments: argparse.Namespace) -> int:
    from keysync_jax.parity import compare, report

    held = report(compare(arguments.golden, arguments.dtype), write=lambda line: print(line, flush=True))
    return 0 if held else 1


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, so that the next run compiles nothing."""
    from keysync_jax.media.assets import cache_folder

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compiled"))


if __name__ == "__main__":
    sys.exit(main())
