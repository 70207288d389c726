"""Many dubs in one run: a list of pairs, of which one that cannot be dubbed does not stop the others.

A pair that is done has its report beside it, written last. It says which inputs and settings it was made
from, so the same list goes on behind the pairs that are done.
"""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from keysync_jax.config import to_dict
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.files import fingerprint, make_folder, sha256_of, sha256_once, write_json
from keysync_jax.media.detectors import DETECTORS, detector_identity
from keysync_jax.media.writer import SUFFIXES
from keysync_jax.model import Model, components
from keysync_jax.pipeline.dub import DubSettings, dub
from keysync_jax.pipeline.identity import CHOICES
from keysync_jax.pipeline.phases import Phases, Told
from keysync_jax.pipeline.sampling import sigmas_of

log = logging.getLogger(__name__)

SUMMARY = "pairs.json"

NEEDED = ("video", "voice")
NUMBERS = ("seed", "steps", "quality")
TEXTS = ("landmarks", "occluder", "identity")
COLUMNS = (*NEEDED, "out", *TEXTS, *NUMBERS)
"""Of the list; those from `landmarks` on are options of `keysync dub`, for this pair alone."""


@dataclass(frozen=True)
class Pair:
    """One line of the list.

    Attributes:
      line: its number in the file.
      output: the dub.
    """

    line: int
    video: Path
    voice: Path
    output: Path
    settings: DubSettings

    @property
    def report(self) -> Path:
        """JSON beside the dub, see `report.DubReport.save`; with it a pair is done."""
        return self.output.with_suffix(".json")


@dataclass(frozen=True)
class Outcome:
    """What became of a pair.

    Attributes:
      state: done: dubbed now; kept: it was there already; failed: it cannot be dubbed.
      reason: why it failed, a sentence.
    """

    pair: Pair
    state: Literal["done", "kept", "failed"]
    reason: str = ""


@dataclass(frozen=True)
class ManyReport:
    """What `dub_pairs` did, pair by pair in the order of the list."""

    outcomes: tuple[Outcome, ...] = field(default_factory=tuple)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    def table(self) -> str:
        """The numbers, then each pair that failed with its reason."""
        count = {state: sum(o.state == state for o in self.outcomes) for state in ("done", "kept", "failed")}
        lines = [f"pairs      {count['done']} dubbed, {count['kept']} were there, {count['failed']} failed"]
        return "\n".join(lines + [f"failed     line {o.pair.line}: {o.reason}" for o in self.failed])

    def save(self, folder: Path) -> None:
        """Writes `pairs.json`."""
        content = [
            {
                "line": o.pair.line,
                "video": str(o.pair.video),
                "voice": str(o.pair.voice),
                "out": o.pair.output.relative_to(folder).as_posix(),
                "state": o.state,
                "reason": o.reason,
            }
            for o in self.outcomes
        ]
        write_json(folder / SUMMARY, content)


def read_pairs(path: Path, folder: Path, settings: DubSettings) -> list[Pair]:
    """The pairs of a CSV file with a line of `COLUMNS`, of which `NEEDED` must be there.

    Args:
      path: paths of files in it are relative to its own folder.
      folder: of the dubs; `out` is a name in it, or a path below it. Without one it is VIDEO-VOICE.mp4.
      settings: of pairs whose line says nothing else.

    Raises:
      UserError: the list cannot be read, a column is unknown, a value is none, or two dubs would be in each
        other's place, in that of an input, or outside of the folder. Nothing is made of such a list.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            _check_columns(path, rows.fieldnames or [])
            pairs = [_pair(path, rows.line_num, row, folder, settings) for row in rows if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if fault := machine_fault(error):
            raise fault from error
        raise UserError(f"{path}: this list of pairs cannot be read ({error})") from None
    if not pairs:
        raise UserError(f"{path}: lists no pair")
    _check_places(path, pairs, folder)
    return pairs


def dub_pairs(
    pairs: Sequence[Pair],
    folder: Path,
    model: Model,
    show_progress: bool = False,
    made: Callable[[Sequence[Pair]], Iterable[Outcome]] | None = None,
) -> ManyReport:
    """Dubs every pair that is not done, one after another, with networks that stay loaded.

    Args:
      pairs, folder: as `read_pairs` has them.
      made: dubs the pairs in another way, the outcomes in any order; by default `dub_pair` does, here.

    Raises:
      OSError: the machine is to blame and not a pair; the same call goes on.
    """
    phases, outcomes = Phases(show=show_progress), dict[Pair, Outcome]()
    make_folder(folder)
    try:
        with phases.phase("pairs", len(pairs), "pairs") as advance:
            for outcome in made(pairs) if made is not None else _one_by_one(pairs, model):
                outcomes[outcome.pair] = outcome
                if outcome.state == "failed":
                    log.warning("line %d: %s", outcome.pair.line, outcome.reason)
                advance(1)
    finally:
        report = ManyReport(tuple(outcomes[pair] for pair in pairs if pair in outcomes))
        report.save(folder)
    return report


def _one_by_one(pairs: Sequence[Pair], model: Model) -> Iterator[Outcome]:
    loaded = loaded_for(model, pairs[0].settings)
    for pair in pairs:
        yield dub_pair(pair, loaded)


def loaded_for(model: Model, settings: DubSettings) -> Model:
    """The model as many dubs in one process use it: loaded once, all of it at first.

    So the memory that is free, by which the sizes of calls are chosen, is the same for every dub, and so are
    its programs. With `memory="small"` networks are loaded and freed by every dub.
    """
    if settings.memory == "small":
        return model
    loaded = model.kept()
    for component in components(model.config):
        loaded.load(component, "fp32" if component.startswith("audio_") else settings.compute_dtype)
    return loaded


def dub_pair(pair: Pair, model: Model, told: Told | None = None) -> Outcome:
    """Dubs a pair, unless it is done.

    Args:
      told: as `dub` takes it.

    Raises:
      OSError: the machine is to blame.
    """
    try:
        request = request_of(pair, model)
        if _is_done(pair, request):
            return Outcome(pair, "kept")
        make_folder(pair.output.parent)
        report = dub(pair.video, pair.voice, pair.output, model, pair.settings, told=told)
        report.save(pair.report, request=request)
        return Outcome(pair, "done")
    except Exception as error:
        fault = machine_fault(error)
        if fault is not None:
            raise fault from error
        if isinstance(error, UserError):
            return Outcome(pair, "failed", str(error))
        log.warning("line %d: unexpected error", pair.line, exc_info=error)
        return Outcome(pair, "failed", f"{pair.video}: unexpected {type(error).__name__}: {error}")


def request_of(pair: Pair, model: Model) -> str:
    """Names what is asked for, by content: inputs, model, and the settings that change more than rounding.

    The version of the code is not in it: a newer one does not make again what is done.

    Raises:
      UserError: an input is not there.
    """
    settings = pair.settings
    by_detector = settings.landmarks in DETECTORS
    named = settings.identity in CHOICES or settings.identity.isdecimal()
    return fingerprint(
        {
            "video": sha256_once(pair.video),
            "voice": sha256_once(pair.voice),
            "model": model.fingerprint,
            "landmarks": detector_identity(settings.landmarks, settings.landmark_model)
            if by_detector
            else sha256_of(settings.landmarks),
            "occluder": None if settings.occluder is None else sha256_of(settings.occluder),
            "identity": settings.identity if named else sha256_of(settings.identity),
            "sigmas": sigmas_of(model.config, settings.steps).tolist(),
            "guidance": to_dict(settings.guidance(model.config.guidance)),
            "decoder": settings.decoder,
            "seed": settings.seed,
            "dtype": settings.compute_dtype,
            "quality": settings.quality,
            "longer voice": settings.longer_voice,
            "provenance": settings.provenance,
        }
    )


def _is_done(pair: Pair, request: str) -> bool:
    """Whether the dub is there, whole, and of this request."""
    try:
        content = json.loads(pair.report.read_bytes())
        return bool(
            content["request"] == request
            and pair.output.is_file()
            and content["output"]["sha256"] == sha256_of(pair.output)
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _check_columns(path: Path, found: Sequence[str]) -> None:
    for name in NEEDED:
        if name not in found:
            raise UserError(f"{path}: has no column {name!r}; its first line names the columns")
    for name in found:
        if name not in COLUMNS or found.count(name) > 1:
            raise UserError(f"{path}: has the column {name!r}; known are {', '.join(COLUMNS)}, each once")


def _pair(path: Path, line: int, row: dict[str, Any], folder: Path, settings: DubSettings) -> Pair:
    where = f"{path}, line {line}"
    if None in row or None in row.values():
        raise UserError(f"{where}: has more or fewer fields than the first line")
    return replace(pair_of(where, row, path.parent, folder, settings), line=line)


def pair_of(where: str, row: Mapping[str, str], base: Path, folder: Path, settings: DubSettings) -> Pair:
    """The pair that texts by the names of `COLUMNS` describe.

    Args:
      where: begins the sentence of an error.
      base: folder that paths of inputs are relative to.

    Raises:
      UserError: as `read_pairs`.
    """
    given = {name: text.strip() for name, text in row.items() if text.strip()}
    for name in NEEDED:
        if name not in given:
            raise UserError(f"{where}: names no {name}")
    video, voice = (base / given[name] for name in NEEDED)
    changes: dict[str, Any] = {name: _number(where, name, given[name]) for name in NUMBERS if name in given}
    if "occluder" in given:
        changes["occluder"] = base / given["occluder"]
    if "landmarks" in given:
        text = given["landmarks"]
        changes["landmarks"] = text if text in DETECTORS else str(base / text)
    if "identity" in given:
        text = given["identity"]
        changes["identity"] = text if text in CHOICES or text.isdecimal() else str(base / text)
    try:
        chosen = replace(settings, **changes)
        return Pair(0, video, voice, folder / _place(given.get("out", ""), video, voice), chosen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _number(where: str, name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where}: {name} is a whole number, not {text!r}") from None


def _place(text: str, video: Path, voice: Path) -> PurePath:
    """A dub's path below its folder."""
    out = PurePath(text or f"{video.stem}-{voice.stem}.mp4")
    if out.is_absolute() or not out.parts or "\\" in text or not str(out).isprintable():
        raise UserError(f"out is a name, or a path below the folder of the dubs, not {text!r}")
    if any(part.startswith(".") for part in out.parts):
        raise UserError(f"no part of out begins with a dot, as in {str(out)!r}; give another name")
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"out ends in one of {', '.join(SUFFIXES)}, not as {str(out)!r} does")
    if out.with_suffix(".json") == PurePath(SUMMARY):
        raise UserError(f"out is {str(out)!r}, whose report would be in the place of the list's, {SUMMARY}")
    return out


def _check_places(path: Path, pairs: Sequence[Pair], folder: Path) -> None:
    """That every dub has a place of its own, in the folder, and no input lies there."""
    used: dict[str, int] = {}
    files = [f for p in pairs for f in (p.video, p.voice, p.settings.occluder, Path(p.settings.landmarks))]
    inputs = {file.resolve() for file in (*files, path) if file is not None}
    for pair in pairs:
        where = f"{path}, line {pair.line}"
        if not pair.output.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{where}: {pair.output} leads out of the folder {folder}")
        if {pair.output.resolve(), pair.report.resolve()} & inputs:
            raise UserError(f"{where}: {pair.output}, or its report, would be in the place of an input")
        key = str(pair.report.resolve()).casefold()  # Some file systems know no case.
        if key in used:
            raise UserError(
                f"{where}: {pair.output.relative_to(folder)} is that of line {used[key]} already; give each "
                "pair an out of its own, that differs in more than its suffix"
            )
        used[key] = pair.line
