"""Subcommands that make clips and datasets: prepare, synth."""

import argparse
from functools import partial
from pathlib import Path

from keysync_jax.cli.common import Commands, add_devices, add_ray, keep_compiled_programs
from keysync_jax.errors import UserError


def add_prepare(commands: Commands) -> None:
    """`keysync prepare`."""
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
    parser.add_argument(
        "--content",
        action="store_true",
        help="with --check: print a SHA-256 of settings, clips and records, however these are divided",
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="of all clips those of part I of N (0/4 ... 3/4), as a dataset of its own",
    )
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        metavar="PART",
        help="the datasets of all parts to one, -o DATASET, over their shards; nothing is copied",
    )
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
        "--allow-download",
        action="store_true",
        help="fetch the detector's model file, and a model of the hub (hub:OWNER/NAME)",
    )
    parser.add_argument(
        "--latents", choices=("posterior", "sample"), default="posterior", help="what to store"
    )
    parser.add_argument("--seed", type=int, default=0, help="of stored samples (default 0)")
    parser.add_argument(
        "--dtype", choices=("fp32", "tf32", "bf16"), default="fp32", help="of the VAE (default fp32)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode (default 0)"
    )
    add_devices(parser)
    add_ray(parser)
    parser.add_argument(
        "--retry-skipped", action="store_true", help="try the clips again that an earlier call skipped"
    )
    _add_curation(parser)
    parser.set_defaults(run=_prepare, resumable=True, less_memory="try --dtype bf16")


_THRESHOLDS = {
    "most_cuts": "scene cuts (default 0)",
    "least_face": "larger side of the face's box, pixels (default 100)",
    "least_quality": "HyperIQA (default 0.4)",
    "least_speaking": "Light-ASD's mean probability (default 0.75)",
    "most_offset": "frames between picture and voice (default 6)",
    "least_confidence": "LSE-C (default 3)",
}


def _add_curation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("curation", "leave out clips that are not worth training on")
    group.add_argument(
        "--curate",
        type=Path,
        metavar="DIR",
        help="score the clips, in DIR, and go on with those that do; without -o stop there",
    )
    group.add_argument(
        "--curate-by",
        default="cuts,face,quality,speaking,sync",
        metavar="NAME,NAME",
        help="which scores count (default all: cuts,face,quality,speaking,sync)",
    )
    group.add_argument("--weights", type=Path, metavar="DIR", help="of the metrics, see docs/metrics.md")
    for name, what in _THRESHOLDS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=what)


def _prepare(arguments: argparse.Namespace) -> int:
    from keysync_jax.data.division import parse_part
    from keysync_jax.data.prepare import check, content_sha256, prepare
    from keysync_jax.data.settings import PrepareSettings

    if arguments.check is not None:
        dataset = check(arguments.check, show_progress=True)
        if arguments.content:
            print(f"content SHA-256 {content_sha256(dataset, show_progress=True)}")
        print(f"{arguments.check}: {len(dataset.manifest.clips)} clips, every shard and record is whole")
        return 0
    if arguments.join is not None:
        return _join(arguments)
    if not arguments.source or (arguments.output is None and arguments.curate is None):
        raise UserError("prepare needs SOURCE and -o DATASET, or --check DATASET, or SOURCE and --curate DIR")
    keep_compiled_programs()
    source = arguments.source[0] if len(arguments.source) == 1 else arguments.source
    if arguments.curate is not None and arguments.part is not None:
        raise UserError("prepare --part takes the list that --curate wrote (kept.txt), not --curate itself")
    if arguments.curate is not None:
        source = _curate(arguments, source)
        if arguments.output is None:
            return 0
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
        devices=arguments.devices,
        crop=arguments.crop,
        retry_skipped=arguments.retry_skipped,
        part=None if arguments.part is None else parse_part(arguments.part),
    )
    elsewhere = None
    if arguments.ray is not None:
        from keysync_jax.launch.ray_prepare import OnRay

        elsewhere = partial(OnRay, address=arguments.ray)
    done = prepare(source, arguments.output, arguments.model, settings, True, elsewhere)
    print(done.table())
    return 0


def _join(arguments: argparse.Namespace) -> int:
    from keysync_jax.data.join import join

    if arguments.source or arguments.output is None:
        raise UserError("prepare --join takes PART... and -o DATASET, and nothing else")
    print(join(arguments.join, arguments.output).table())
    return 0


def _curate(arguments: argparse.Namespace, source: Path | list[Path]) -> Path | list[Path]:
    """The videos to go on with."""
    from keysync_jax.evaluation.curation import CurationSettings, curate

    given = {name: getattr(arguments, name) for name in _THRESHOLDS}
    settings = CurationSettings(
        by=tuple(filter(None, arguments.curate_by.split(","))),
        weights=arguments.weights,
        landmarks=arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        **{name: value for name, value in given.items() if value is not None},
    )
    found = curate(source, arguments.curate, settings, show_progress=True)
    print(found.table())
    return list(found.kept)


def _semitones(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(",") if number)
    except ValueError:
        raise UserError(f"--pitch takes semitones, as --pitch=-2,2, not {text!r}") from None


def add_synth(commands: Commands) -> None:
    """`keysync synth`."""
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
    from keysync_jax.synthetic.write import SynthSettings, synth

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
