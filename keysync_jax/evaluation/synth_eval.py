"""How well a model dubs the synthetic world, whose truth is known: the job behind `keysync synth-eval`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.config import GuidanceConfig, Interval, MaskKind, to_dict
from keysync_jax.diffusion.guidance import calls
from keysync_jax.errors import UserError
from keysync_jax.evaluation.pairs import Pair, clips_digest, dubs_digest, read_mouths
from keysync_jax.files import settle, write_json
from keysync_jax.metrics.leakage import lip_leak, lip_leak_lite, source_correlation
from keysync_jax.metrics.mouth import MouthReader, Mouths
from keysync_jax.metrics.quality import flicker_ratio, psnr, sharpness_ratio
from keysync_jax.metrics.sync import mean_correlation, mean_lag
from keysync_jax.model import Model
from keysync_jax.pipeline.devices import check_count, local_devices
from keysync_jax.pipeline.dub import Decoder
from keysync_jax.pipeline.phases import Phases
from keysync_jax.pipeline.sampling import guidance_of, sigmas_of
from keysync_jax.synthetic.world import FORMAT

SETTINGS, SCORES = "eval.json", "scores.json"


@dataclass(frozen=True)
class EvalSettings:
    """What is measured.

    Attributes:
      clips: cross-sync pairs, of people and phrases that no training world has if its seed is another one.
      seconds: length of each.
      seed: of the world.
      ablations: measure variants of guidance, another mask and occlusion too, on `ablation_clips` pairs each.
      decoder: that all dubs are made with.
      intervals: measure the model's guidance in intervals of noise levels too, on as many pairs.
      devices: of this host that share the work; all of them where None.
    """

    clips: int = 20
    seconds: float = 4.0
    seed: int = 1_000_003
    ablations: bool = False
    ablation_clips: int = 8
    decoder: Decoder = "full"
    intervals: bool = False
    devices: int | None = None

    def __post_init__(self) -> None:
        check_count(self.devices)
        if self.clips < 2:
            raise UserError(f"voices are shuffled among the clips, so 2 are the fewest, not {self.clips}")
        if not self.ablation_clips >= 2:
            raise UserError(f"ablations need 2 clips or more, not {self.ablation_clips}")
        if not self.seconds >= 1:
            raise UserError(f"a clip to measure on has 1 second or more, not {self.seconds:g}")


@dataclass(frozen=True)
class Bar:
    """What a measure must reach.

    Attributes:
      least, most: bounds; None: none on that side.
    """

    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


MEASURES: dict[str, tuple[str, Bar | None]] = {
    "sync": ("correlation of the dubbed opening with the truth of the voice", Bar(least=0.85)),
    "shuffled": ("the same, with the voices exchanged among the clips", Bar(most=0.2)),
    "lag": ("frames by which the mouth is late", Bar(most=0)),
    "lip_leak": ("LipLeak: std(MAR | silence) / std(MAR | speech)", Bar(most=0.2)),
    "lip_leak_lite": ("share of frames with MAR > 0.25 in silence", None),
    "source": ("correlation of the dubbed opening with the source's own", Bar(most=0.15)),
    "source_truth": ("the same of the truth itself: what chance gives these clips", None),
    "psnr_outside": ("PSNR outside the mouth against the source's crop, dB", Bar(least=30)),
    "psnr_truth": ("PSNR of the whole crop against the truth, dB", None),
    "psnr_mouth": ("PSNR of the mouth against the truth, dB", None),
    "psnr_occluder": ("PSNR of what covers the face against the source, dB", None),
    "psnr_vae": ("PSNR of the VAE alone over the face, dB", Bar(least=30)),
    "sharpness": ("variance of the Laplacian in the mouth, dub over truth", None),
    "flicker": ("frame difference in the mouth, dub over truth", Bar(most=1.3)),
    "calls": ("network calls of a window: branches of the guidance, over all steps", None),
}
"""Name -> what it says, and its bar; in the order of the report."""


@dataclass(frozen=True)
class Scores:
    """Measures of one model in one setting, by the names of `MEASURES`.

    Attributes:
      spread: standard deviation over the clips, of the measures that a single clip has.
    """

    clips: int
    values: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)

    def table(self, verdicts: bool = True) -> str:
        """One line a measure, with its bar and (`verdicts`) whether it is met."""
        lines = []
        for name, (what, bar) in MEASURES.items():
            if name in self.values:
                value, verdict = self.values[name], "" if bar is None else f"{bar!s:>8}"
                if bar is not None and verdicts:
                    verdict += "  ok" if bar.met(value) else "  MISSED"
                lines.append(f"{name:<14} {value:8.3f} {verdict:<18} {what}")
        return "\n".join(lines)

    @property
    def missed(self) -> list[str]:
        """Names of the measures that do not reach their bars."""
        bars = {name: bar for name, (_, bar) in MEASURES.items() if bar is not None}
        return [n for n, bar in bars.items() if n in self.values and not bar.met(self.values[n])]


Advance = Callable[[int], object]


@dataclass(frozen=True)
class _Series:
    """What is kept of a pair that was measured; every array is `[T]`.

    Attributes:
      dub, quiet: mouths of the dub with its voice, and of the one with none where that is measured.
      spoken, unsaid: true opening of the driving voice, and the source's own.
      seen: where the mouth can be read.
    """

    dub: Mouths
    quiet: Mouths | None
    spoken: np.ndarray
    unsaid: np.ndarray
    seen: np.ndarray


def measure(
    model: Model,
    pairs: Sequence[Pair],
    output: Path,
    reader: MouthReader,
    advance: Advance,
    *,
    occluder: bool = False,
    silence: bool = True,
    vae: bool = False,
    devices: int | None = None,
    decoder: Decoder = "full",
) -> Scores:
    """Dubs every pair, with its voice and (`silence`) with none, and measures the result.

    Pairs forget their frames once they are measured, so the memory does not grow with their number.

    Args:
      output: folder of the dubs; those that are there are taken.
      occluder: hand the pairs' occluder masks to the dub.
      vae: measure the VAE alone too.
      devices, decoder: as `DubSettings` takes them.
    """
    size = model.config.crop_size
    series, rows = [], []
    for pair in pairs:
        frames = pair.dubbed(
            model,
            output / f"{pair.number:05d}.mp4",
            occluder=occluder,
            devices=devices,
            decoder=decoder,
        )
        dub, quiet = read_mouths(reader, frames, pair), None
        rows.append(_pictures(pair, frames, size))
        advance(1)
        if silence:
            still = pair.dubbed(
                model,
                output / f"{pair.number:05d}-silent.mp4",
                True,
                occluder,
                devices=devices,
                decoder=decoder,
            )
            quiet = read_mouths(reader, still, pair)
            advance(1)
        if vae:
            rows[-1]["psnr_vae"] = psnr(
                pair.reconstructed(model, decoder), pair.crops(pair.original, size), pair.face(size)
            )
        series.append(_Series(dub, quiet, pair.spoken.opening, pair.unsaid.opening, pair.readable))
        pair.forget()
    values, spread = _of_mouths(series), _spread(series, rows)
    for name in MEASURES:
        found = [row[name] for row in rows if name in row]
        values |= {name: float(np.mean(found))} if found else {}
    sigmas = sigmas_of(model.config)
    values["calls"] = calls(guidance_of(model.config.guidance, sigmas), len(sigmas) - 1)
    return Scores(len(pairs), values, spread)


def _spread(series: Sequence["_Series"], rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Standard deviation of each measure over the clips; of exchanged voices a single clip has none."""
    if len(series) < 2:
        return {}
    each = [{**_of_mouths([one]), **row} for one, row in zip(series, rows, strict=True)]
    found = {name: [clip[name] for clip in each if name in clip] for name in MEASURES if name != "shuffled"}
    # The PSNR of equal pictures is infinite.
    known = {name: x for name, x in found.items() if len(x) > 1 and np.isfinite(x).all()}
    return {name: float(np.std(x, ddof=1)) for name, x in known.items()}


def _of_mouths(series: Sequence[_Series]) -> dict[str, float]:
    """Measures of what the mouths do."""
    truths = [pair.spoken for pair in series]
    # Of a single pair, whose voice has none to be exchanged with, another moment of its own truth is taken.
    others = truths[1:] + truths[:1] if len(truths) > 1 else [np.roll(t, len(t) // 2) for t in truths]

    def against(references: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        whole = zip(series, references, strict=True)
        return [(pair.dub.opening[pair.seen], reference[pair.seen]) for pair, reference in whole]

    values = {
        "sync": mean_correlation(against(truths)),
        "shuffled": abs(mean_correlation(against(others))),
        "lag": float(mean_lag(against(truths))),
        "source": source_correlation(against([pair.unsaid for pair in series])),
        "source_truth": source_correlation([(pair.spoken, pair.unsaid) for pair in series]),
    }
    silences = [(pair.quiet.mar, pair.dub.mar) for pair in series if pair.quiet is not None]
    if silences:
        values["lip_leak"] = float(np.mean([lip_leak(quiet, dub) for quiet, dub in silences]))
        values["lip_leak_lite"] = float(np.mean([lip_leak_lite(quiet) for quiet, _ in silences]))
    return values


def _pictures(pair: Pair, frames: np.ndarray, size: int) -> dict[str, float]:
    """Measures of one dub's pixels, in its crop."""
    dubbed, mouth = pair.crops(frames, size), pair.mouth(size)
    truth = pair.crops(pair.spoken.frames, size)
    original, covered = pair.crops(pair.original, size), pair.covered(size)
    kept = {"psnr_occluder": psnr(dubbed, original, covered)} if covered.any() else {}
    return kept | {
        "psnr_outside": psnr(dubbed, original, ~mouth),
        "psnr_truth": psnr(dubbed, truth),
        "psnr_mouth": psnr(dubbed, truth, mouth),
        "sharpness": sharpness_ratio(dubbed, truth, mouth),
        "flicker": flicker_ratio(dubbed, truth, mouth),
    }


def guided(model: Model, guidance: GuidanceConfig) -> Model:
    """The same model with another guidance."""
    return replace(model, config=replace(model.config, guidance=guidance))


def masked(model: Model, mask: MaskKind) -> Model:
    """The same weights with another mask than they were trained with."""
    return replace(model, config=replace(model.config, mask=mask))


SAME_CLIPS = "model, same clips"
"""Row of the model on the clips that the variants are measured on: what they are to be compared with."""

OCCLUDED = {"occluded": False, "occluded, masked out": True}
"""Rows of clips in which something covers the mouth -> whether its masks are handed to the dub."""

VARIANTS = {
    "audio guidance 1": GuidanceConfig("separated", audio=1.0, identity=1.5),
    "audio guidance 3": GuidanceConfig("separated", audio=3.0, identity=1.5),
    "audio guidance 5": GuidanceConfig("separated", audio=5.0, identity=1.5),
    "plain CFG 2": GuidanceConfig("cfg", scale=2.0),
    "no guidance": GuidanceConfig("none"),
}


GUIDED: dict[str, tuple[Interval | None, Interval | None]] = {
    "guidance at 1.5-8": ((1.5, 8), (1.5, 8)),
    "guidance at 0.9-8": ((0.9, 8), (0.9, 8)),
    "guidance at 1.5-16": ((1.5, 16), (1.5, 16)),
    "guidance at 1.5-700": ((1.5, 700), (1.5, 700)),
    "audio only at 1.5-8": ((1.5, 8), None),
    "identity only at 1.5-8": (None, (1.5, 8)),
    "audio at 1.5-16, identity off": ((1.5, 16), (0, 0)),
}
"""Rows of the sweep -> intervals of the audio's scale and of the identity's (None: all levels)."""


def evaluate(
    model: Model,
    output: str | Path,
    settings: EvalSettings | None = None,
    others: Mapping[str, Model] | None = None,
    show_progress: bool = False,
) -> dict[str, Scores]:
    """Measures a model on held-out clips of the synthetic world.

    Args:
      output: folder for clips and dubs, new or begun with the same model and settings; what is there is
        taken, so an interrupted call goes on. What other code or another device made is not: each has
        folders of its own (`pairs.dubs_digest`).
      others: further models by name, e.g. trained without the pixel loss; measured like an ablation.

    Returns:
      Scores by name; "model" is that of the model itself, "model, same clips" that of its first
      `ablation_clips` pairs, which every variant is measured on.

    Raises:
      UserError: the folder was begun with something else, or a model cannot dub these clips.
    """
    output, settings, others = Path(output), settings or EvalSettings(), others or {}
    _check_names(others)
    local_devices(settings.devices)
    _settle(output, model, settings)
    reader, phases = MouthReader.load(), Phases(show=show_progress)
    with phases.phase("clips", settings.clips, "clips") as advance:
        pairs = []
        for number in range(settings.clips):
            pairs.append(_pair(output, settings, number))
            advance(1)
    with phases.phase("model", 2 * len(pairs), "dubs") as advance:
        dubs = _dubs(output, "model", model)
        scores = {
            "model": measure(
                model,
                pairs,
                dubs,
                reader,
                advance,
                vae=True,
                devices=settings.devices,
                decoder=settings.decoder,
            )
        }
    few = pairs[: settings.ablation_clips]
    variants = VARIANTS if settings.ablations else {}
    models = {name: guided(model, guidance) for name, guidance in variants.items()}
    if settings.ablations:
        models["mouth mask"] = masked(model, "mouth")
    if settings.intervals:
        scales = model.config.guidance
        models |= {name: guided(model, scales.within(*each)) for name, each in GUIDED.items()}
    models |= others
    if models and len(few) < len(pairs):
        with phases.phase(SAME_CLIPS, 2 * len(few), "dubs") as advance:
            scores[SAME_CLIPS] = measure(
                model, few, dubs, reader, advance, devices=settings.devices, decoder=settings.decoder
            )
    for name, other in models.items():
        with phases.phase(name, 2 * len(few), "dubs") as advance:
            scores[name] = measure(
                other,
                few,
                _dubs(output, name, other),
                reader,
                advance,
                devices=settings.devices,
                decoder=settings.decoder,
            )
    if settings.ablations:
        scores |= _occlusion(model, output, settings, reader, phases)
    write_json(output / SCORES, {n: asdict(s) for n, s in scores.items()})
    return scores


def _check_names(names: Iterable[str]) -> None:
    """Every model has a row and a folder of its own."""
    taken = {
        "model",
        SAME_CLIPS,
        "mouth mask",
        "clips",
        "clips-occluded",
        SETTINGS,
        SCORES,
        *VARIANTS,
        *GUIDED,
        *OCCLUDED,
    }
    for name in names:
        if _folder(name) in {_folder(n) for n in taken}:
            raise UserError(f"--compare {name}=...: that name is taken by a row or folder of the evaluation")
        if Path(name).name != name:
            raise UserError(f"--compare {name}=...: the name becomes a folder's, so it has no slash")


def _folder(name: str) -> str:
    """A row's name as part of a folder's."""
    return name.replace(", ", "-").replace(" ", "-")


def _dubs(output: Path, row: str, model: Model) -> Path:
    """The folder of a row's dubs."""
    return output / f"{_folder(row)}-{dubs_digest(model)}"


def _occlusion(
    model: Model, output: Path, settings: EvalSettings, reader: MouthReader, phases: Phases
) -> dict[str, Scores]:
    """Clips in which something covers the mouth, with and without its masks."""
    pairs = [_pair(output, settings, number, True) for number in range(settings.ablation_clips)]
    scores = {}
    for name, handled in OCCLUDED.items():
        dubs = _dubs(output, name, model)
        with phases.phase(name, len(pairs), "dubs") as advance:
            scores[name] = measure(
                model,
                pairs,
                dubs,
                reader,
                advance,
                occluder=handled,
                silence=False,
                devices=settings.devices,
                decoder=settings.decoder,
            )
    return scores


def _pair(output: Path, settings: EvalSettings, number: int, occluded: bool = False) -> Pair:
    # Occluded pairs are other clips, so that no file of theirs has the name of an open one's.
    folder, first = ("clips-occluded", 50_000) if occluded else ("clips", 0)
    place = output / f"{folder}-{clips_digest()}"
    return Pair(place, settings.seed, first + number, settings.seconds, occluded)


def _settle(output: Path, model: Model, settings: EvalSettings) -> None:
    """Makes the folder and notes what it is for, or checks that it was begun for the same."""
    world = {"world": FORMAT, "seconds": settings.seconds, "seed": settings.seed}
    small = {"decoder": settings.decoder} if settings.decoder != "full" else {}
    settle(output / SETTINGS, {**identity(model), **world, **small}, "dubs", "another model or other clips")


def identity(model: Model) -> dict[str, Any]:
    """Which model it is, whatever the code; JSON can hold it."""
    config = model.config
    guidance = {name: value for name, value in to_dict(config.guidance).items() if value is not None}
    settings = {"guidance": guidance, "mask": config.mask, "steps": config.steps}
    sigmas = {"sigmas": list(config.sigmas)} if config.sigmas else {}
    return {"files": dict(model.hashes), **settings, **sigmas}


def report(scores: Mapping[str, Scores]) -> str:
    """The model's table, then a row for every variant."""
    lines = [f"{scores['model'].clips} clips", scores["model"].table()]
    others = {name: s for name, s in scores.items() if name != "model"}
    if others:
        names = [n for n in MEASURES if n not in ("psnr_vae", "lag", "lip_leak_lite", "source_truth")]
        lines += ["", f"{'':<30}" + "".join(f"{n:>17}" for n in names)]
        for name, score in {"model": scores["model"], **others}.items():
            cells = "".join(f"{_cell(score, measure):>17}" for measure in names)
            lines.append(f"{name:<30}{cells}   ({score.clips} clips)")
    return "\n".join(lines)


def _cell(score: Scores, measure: str) -> str:
    """A value, and its spread over the clips."""
    if measure not in score.values:
        return "-"
    spread = f" +-{score.spread[measure]:.3f}" if measure in score.spread else ""
    return f"{score.values[measure]:.3f}{spread}"
