"""Subcommands that measure or show: synth-eval and demo on synthetic clips, evaluate and arena any system."""

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


def add_synth_eval(commands: Commands) -> None:
    """`keysync synth-eval`."""
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
        "--intervals",
        action="store_true",
        help="measure guidance in intervals of noise levels too",
    )
    add_guidance_interval(parser)
    add_decoder(parser)
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=MODEL_DIR",
        help="another model, measured like a variant; may be repeated",
    )
    add_devices(parser)
    add_allow_download(parser)
    parser.set_defaults(run=_synth_eval, resumable=True, less_memory="try fewer --seconds")


def _synth_eval(arguments: argparse.Namespace) -> int:
    keep_compiled_programs()
    from keysync_jax.evaluation.synth_eval import EvalSettings, evaluate, guided, report
    from keysync_jax.model import DEFAULT, open_model
    from keysync_jax.pipeline.dub import DubSettings

    settings = EvalSettings(
        clips=arguments.clips,
        seconds=arguments.seconds,
        seed=arguments.seed,
        ablations=arguments.ablations,
        ablation_clips=arguments.ablation_clips,
        intervals=arguments.intervals,
        decoder=arguments.decoder,
        devices=arguments.devices,
    )
    others = dict(_named_folder(text) for text in arguments.compare)
    if len(others) < len(arguments.compare):
        raise UserError("--compare was given one name twice; every model has a name of its own")
    fetch_models(arguments, arguments.model, *others.values())
    models = {name: open_model(folder) for name, folder in others.items()}
    model = open_model(arguments.model or DEFAULT)
    audio, identity = intervals(arguments)
    asked = DubSettings(audio_interval=audio, identity_interval=identity)
    model = guided(model, asked.guidance(model.config.guidance))
    scores = evaluate(model, arguments.output, settings, models, show_progress=True)
    print(report(scores))
    return 1 if scores["model"].missed else 0


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UserError(f"--compare takes NAME=MODEL_DIR, not {text!r}")
    return name, Path(folder)


def add_demo(commands: Commands) -> None:
    """`keysync demo`."""
    parser = commands.add_parser("demo", help="dub a synthetic clip with the embedded model")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="default: demo"
    )
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", help="default: the embedded model")
    parser.add_argument("--number", type=int, default=0, metavar="N", help="of the person (default 0)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the clip (default 5)")
    add_allow_download(parser)
    parser.set_defaults(run=_demo, resumable=True, less_memory="try fewer --seconds")


def _demo(arguments: argparse.Namespace) -> int:
    keep_compiled_programs()
    from keysync_jax.evaluation.demo import demo
    from keysync_jax.model import DEFAULT, open_model

    if arguments.number < 0 or not 1 <= arguments.seconds <= 60:
        raise UserError("a demo takes --number 0 or more and --seconds from 1 to 60")
    fetch_models(arguments, arguments.model)
    model = open_model(arguments.model or DEFAULT)
    found = demo(model, arguments.output, arguments.number, arguments.seconds, show_progress=True)
    print(found.phases.table())
    print(f"\n{found.scores.table(verdicts=False)}")
    print("\nThe bars are for the mean of 20 clips (keysync synth-eval); a single clip may lie beyond one.")
    print(f"wrote {found.dub} and {found.side_by_side}")
    return 0


def add_evaluate(commands: Commands) -> None:
    """`keysync evaluate`."""
    parser = commands.add_parser("evaluate", help="judge any systems on a list of clips")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="dubs and report")
    parser.add_argument("--pairs", type=Path, required=True, metavar="LIST", help="a CSV file, or a folder")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=CMD|DIR|SHEET.json",
        help="a command with {video} {audio} {out} and, if it can, {reference}; or a folder of its videos;"
        " may be repeated",
    )
    parser.add_argument(
        "--protocol",
        default="cross",
        metavar="reconstruction|cross|leakage",
        help="which runs (default cross)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and the intervals (default 0)")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="the metrics' weights")
    parser.add_argument(
        "--metrics", default="", metavar="NAME,NAME", help="default: all that can be computed"
    )
    parser.add_argument(
        "--landmarks",
        default="mediapipe",
        metavar="mediapipe|face_alignment|none",
        help="detector for real videos (default mediapipe)",
    )
    parser.add_argument("--landmark-model", type=Path, metavar="FILE", help="the detector's model file")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="that a command may take for a clip")
    parser.add_argument(
        "--slack", type=int, default=5, metavar="N", help="frames that a dub may lack or add (default 5)"
    )
    parser.add_argument("--retry", action="store_true", help="run again what failed in an earlier call")
    parser.add_argument(
        "--clips",
        type=int,
        default=0,
        metavar="N",
        help="clips that can be played in the report, all systems side by side (default 0)",
    )
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch the detector's model file, if it is missing"
    )
    parser.set_defaults(run=_evaluate, resumable=True, less_memory="try shorter clips")


def _evaluate(arguments: argparse.Namespace) -> int:
    keep_compiled_programs()
    from keysync_jax.evaluation.evaluate import EvaluateSettings, evaluate
    from keysync_jax.evaluation.report.write import write_report
    from keysync_jax.evaluation.runs import RunSettings
    from keysync_jax.evaluation.systems import parse_systems

    if arguments.slack < 0 or (arguments.timeout is not None and not arguments.timeout > 0):
        raise UserError("--slack is 0 or more, and --timeout is above 0")
    if arguments.clips < 0:
        raise UserError(f"--clips is 0 or more, not {arguments.clips}")
    settings = EvaluateSettings(
        protocol=arguments.protocol,
        seed=arguments.seed,
        weights=arguments.weights,
        metrics=tuple(filter(None, arguments.metrics.split(","))),
        landmarks=arguments.landmarks,
        landmark_model=arguments.landmark_model,
        allow_download=arguments.allow_download,
        runs=RunSettings(arguments.slack, arguments.timeout, arguments.retry),
    )
    systems = parse_systems(arguments.system)
    found = evaluate(arguments.pairs, systems, arguments.output, settings, show_progress=True)
    written = write_report(found, arguments.output, arguments.clips)
    print(written.text)
    print(f"wrote {written.page}")
    return 0


def add_arena(commands: Commands) -> None:
    """`keysync arena`."""
    parser = commands.add_parser("arena", help="a page on this machine where people compare dubs, blind")
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="a folder of systems' folders, or of keysync evaluate"
    )
    parser.add_argument("--results", action="store_true", help="print what the votes say, and stop")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any that is free (default 8000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the voters' orders (default 0)")
    parser.set_defaults(run=_arena, resumable=True, less_memory="try shorter clips")


def _arena(arguments: argparse.Namespace) -> int:
    from keysync_jax.evaluation.arena.contestants import find_contestants, shown_alike
    from keysync_jax.evaluation.arena.results import results
    from keysync_jax.evaluation.arena.server import Arena, make_server
    from keysync_jax.evaluation.arena.votes import load_votes

    if arguments.results:
        print(results(load_votes(arguments.folder)))
        return 0
    if arguments.seed < 0:
        raise UserError(f"the seed is 0 or more, not {arguments.seed}")
    found = find_contestants(arguments.folder)
    arena = Arena(arguments.folder, shown_alike(found, arguments.folder, True), arguments.seed)
    with make_server(arena, arguments.port) as server:
        print(f"open http://127.0.0.1:{server.server_address[1]} in a browser; Ctrl-C ends", flush=True)
        server.serve_forever()
    return 0
