"""The metrics by name: what each is, what it needs, and how to compute those one asks for in one pass.

    bench = Bench(["psnr", "lse_d"], weights=Path("weights"))
    bench.missing                       # metric -> the sentence why it is not available
    reading = bench.start(Subject(...))
    for moment in moments:
        reading.update(moment)
    record = reading.result()           # Record: values, missing, series
    combine("lip_leak", {"silent": records, "dub": others})

A metric of a clip comes out of a `Measure`, which may give several at once. A metric of a set is a function
of the records of some runs over the same clips in the same order; `Metric.runs` names them. docs/metrics.md
has the definitions and the choices that are ours.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

import keysync_jax
from keysync_jax.extras import EXTRAS
from keysync_jax.files import sha256_once
from keysync_jax.metrics.meter import NEEDS, Found, Meter, Moment, Need, Record, Start, Subject, Unavailable

Better = Literal["higher", "lower", "zero", "reference"]
"""Which numbers are good: "zero" is best at 0, worse to both sides; "reference" at the real video's own."""

Runs = Mapping[str, Sequence[Record]]
"""Run -> the records of its clips, in one order for all runs."""


@dataclass(frozen=True)
class Weights:
    """A file that the user brings, in the folder of the weights.

    Attributes:
      file: its name there.
      what: it is.
      get: how to get it, the end of a sentence.
      terms: its licence, or what is known of it.
    """

    file: str
    what: str
    get: str
    terms: str


@dataclass(frozen=True)
class Measure:
    """Computes metrics of one clip, all of them together.

    Attributes:
      opens: "module:function" below `keysync_jax.metrics`, a `meter.Open`; imported when it is first used.
      computed_by: network or formula, with its version.
      weights: names of `WEIGHTS`.
      packages: modules that it imports beside the project's own.
      noncommercial: whether a licence of these forbids commercial use; reports say so.
    """

    opens: str
    computed_by: str
    weights: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    noncommercial: bool = False


@dataclass(frozen=True)
class Metric:
    """A number of a clip or, where `runs` are named, of sets of clips.

    Attributes:
      name: key of the results.
      title: as tables head it.
      unit: "dB", "px", ...; empty for a number without one.
      better: which numbers are good.
      what: its definition in a line.
      measure: what computes it, of `MEASURES`.
      needs: what a clip must bring beside the output's frames.
      runs: names of the runs that a metric of sets is made of; empty for one of a clip.
      combine: the number of those runs; None for a metric of a clip. It takes the records of any choice of
        clips, so it can be bootstrapped, and raises ValueError where one lacks what it needs.
      resampling: how a metric of sets may be resampled: "bootstrap", or "halves" where drawing clips more
        than once would bias it (distances of distributions).
    """

    name: str
    title: str
    unit: str
    better: Better
    what: str
    measure: str
    needs: tuple[Need, ...] = ()
    runs: tuple[str, ...] = ()
    combine: Callable[[Runs], float] | None = None
    resampling: Literal["bootstrap", "halves"] = "bootstrap"


def _mean(run: str, name: str) -> Callable[[Runs], float]:
    """The mean over a run's clips of a metric of clips."""
    return lambda runs: float(np.mean(_column(runs[run], name)))


def _column(records: Sequence[Record], name: str) -> np.ndarray:
    """A metric of clips, float64 `[clips]`."""
    if not records or not all(name in record.values for record in records):
        raise ValueError(f"every clip needs its {name}")
    return np.array([record.values[name] for record in records])


def _lip_leak(runs: Runs) -> float:
    from keysync_jax.metrics.leakage import lip_leak_of_stds

    return lip_leak_of_stds(_column(runs["silent"], "mar_std"), _column(runs["dub"], "mar_std"))


WEIGHTS: dict[str, Weights] = {}
"""Files that metrics need, by name."""


MEASURES: dict[str, Measure] = {
    "pictures": Measure("pictures:open_pictures", "PSNR and SSIM of keysync_jax, 1"),
    "sharpness": Measure("pictures:open_sharpness", "cv2.Laplacian, kernel of size 1"),
    "mouth": Measure("landmarks:open_mouth", "MAR of 68 landmarks, keysync_jax, 1"),
    "lmd": Measure("landmarks:open_lmd", "LMD of 68 landmarks, keysync_jax, 1"),
}
"""Name -> what computes metrics of a clip."""


_METRICS = (
    Metric("psnr", "PSNR", "dB", "higher", "10 log10(255² / mean squared error), pooled over the clip's "
           "frames and pixels; infinite for equal pictures", "pictures", ("truth",)),
    Metric("psnr_inside", "PSNR inside", "dB", "higher", "PSNR of the repainted pixels",
           "pictures", ("truth", "mask")),
    Metric("psnr_outside", "PSNR outside", "dB", "higher", "PSNR of the other pixels against the source",
           "pictures", ("source", "mask")),
    Metric("ssim", "SSIM", "", "higher", "structural similarity, RGB, range 255, Gaussian window of 11 with "
           "sigma 1.5, mean of frames", "pictures", ("truth",)),
    Metric("ssim_inside", "SSIM inside", "", "higher", "mean of SSIM's map over the repainted pixels",
           "pictures", ("truth", "mask")),
    Metric("ssim_outside", "SSIM outside", "", "higher", "mean of SSIM's map over the other pixels, against "
           "the source", "pictures", ("source", "mask")),
    Metric("vl", "VL", "grey²", "reference", "variance of the Laplacian of grey frames, mean of frames",
           "sharpness"),
    Metric("mar_std", "MAR std", "", "reference", "standard deviation over time of the mouth aspect ratio of "
           "the inner lips", "mouth", ("landmarks",)),
    Metric("mar_open", "open mouth", "", "reference", "share of frames with a MAR above 0.25",
           "mouth", ("landmarks",)),
    Metric("lmd", "LMD", "px", "lower", "mean distance of the 20 mouth landmarks from the truth's, both "
           "about their own mean", "lmd", ("landmarks", "truth_landmarks")),
    Metric("lmd_sum", "LMD (ATVGnet)", "px", "lower", "LMD with the 20 distances summed, as the first code "
           "of it does: 20 times LMD", "lmd", ("landmarks", "truth_landmarks")),
    Metric("lmd_eyes", "LMD / eyes", "", "lower", "LMD over the mean distance of the truth's eye centres",
           "lmd", ("landmarks", "truth_landmarks")),
    Metric("lip_leak", "LipLeak", "", "lower", "mean std of MAR with silence / mean std of MAR with "
           "speech", "mouth", ("landmarks",), ("silent", "dub"), _lip_leak),
    Metric("lip_leak_lite", "LipLeak_lite", "", "lower", "share of frames with a MAR above 0.25 with "
           "silence, mean of clips", "mouth", ("landmarks",), ("silent",), _mean("silent", "mar_open")),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
"""Name -> metric, in the order of reports."""


def unavailable(metric: str, weights: Path | None = None) -> Unavailable | None:
    """Why a metric cannot be computed here at all; None where it can.

    Args:
      metric: its name.
      weights: folder of the weights.
    """
    measure = MEASURES[METRICS[metric].measure]
    for name in measure.weights:
        needed = WEIGHTS[name]
        if weights is None or not (weights / needed.file).is_file():
            place = "a folder of weights" if weights is None else str(weights)
            return Unavailable(
                f"needs {needed.what}, {needed.file} in {place}; {needed.get} (terms: {needed.terms})"
            )
    for package in measure.packages:
        if find_spec(package) is None:
            return Unavailable(f"needs {package}; get it with pip install 'keysync_jax[{EXTRAS[package]}]'")
    return None


def provenance(metric: str, weights: Path | None = None) -> dict[str, str]:
    """What computes a metric: network or formula, versions of packages, SHA-256 of weights; for reports."""
    measure = MEASURES[METRICS[metric].measure]
    found = {"computed by": measure.computed_by, "keysync_jax": keysync_jax.__version__}
    for package in measure.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "of an unknown version"
    if weights is not None:
        for name in measure.weights:
            file = weights / WEIGHTS[name].file
            if file.is_file():
                found[file.name] = sha256_once(file)
    if measure.noncommercial:
        found["licence"] = "non-commercial use only"
    return found


class Bench:
    """The measures of some metrics, opened once for all clips.

    Attributes:
      metrics: names of those of clips that are computed, in the registry's order.
      missing: metric -> why it is not, of those asked for.
    """

    def __init__(self, metrics: Iterable[str] = METRICS, weights: Path | None = None) -> None:
        """Opens what is there.

        Args:
          metrics: names. One of sets brings the series and metrics of clips that it is made of.
          weights: folder of the weights.

        Raises:
          KeyError: no metric has such a name.
          UserError: weights are damaged, or are another network's.
        """
        asked = {METRICS[name].measure: None for name in metrics}
        self.missing: dict[str, Unavailable] = {}
        self.metrics: list[str] = []
        for name, metric in METRICS.items():
            if metric.measure in asked:
                reason = unavailable(name, weights)
                if reason is not None:
                    self.missing[name] = reason
                elif not metric.runs:
                    self.metrics.append(name)
        used = dict.fromkeys(METRICS[name].measure for name in self.metrics)
        self._starts = {name: _opened(MEASURES[name], weights) for name in used}

    def start(self, subject: Subject) -> "Reading":
        """Begins a clip."""
        missing = {name: absent for name in self.metrics if (absent := _absent(name, subject))}
        wanted = [name for name in self.metrics if name not in missing]
        measures = dict.fromkeys(METRICS[name].measure for name in wanted)
        meters = [self._starts[name](subject) for name in measures]
        return Reading(meters, wanted, {**self.missing, **missing})


class Reading:
    """One clip being read."""

    def __init__(
        self, meters: Sequence[Meter], wanted: Sequence[str], missing: Mapping[str, Unavailable]
    ) -> None:
        self._meters, self._wanted, self._missing = meters, wanted, missing

    def update(self, moment: Moment) -> None:
        """Shows the next frame to all meters."""
        for meter in self._meters:
            meter.update(moment)

    def result(self) -> Record:
        """What was found, after the last frame."""
        found: dict[str, float | np.ndarray | Unavailable] = {}
        for meter in self._meters:
            found |= meter.result()
        return _record(found, self._wanted, self._missing)


def _record(found: Found, wanted: Sequence[str], missing: Mapping[str, Unavailable]) -> Record:
    series = {name: x for name, x in found.items() if isinstance(x, np.ndarray)}
    values: dict[str, float] = {}
    absent = dict(missing)
    for name in wanted:
        value = found[name]
        if isinstance(value, Unavailable):
            absent[name] = value
        else:
            values[name] = float(value)
    return Record(values, absent, series)


def combine(metric: str, runs: Runs) -> float | Unavailable:
    """A metric of sets.

    Args:
      metric: its name.
      runs: the records of the runs that `Metric.runs` names, of the same clips in the same order.
    """
    made = METRICS[metric]
    if made.combine is None:
        raise ValueError(f"{metric} is a metric of a clip")
    absent = [run for run in made.runs if not runs.get(run)]
    if absent:
        return Unavailable(f"needs the runs {', '.join(absent)}")
    try:
        return made.combine(runs)
    except ValueError as error:
        return Unavailable(str(error))


def _absent(name: str, subject: Subject) -> Unavailable | None:
    needs = [NEEDS[need] for need in METRICS[name].needs if not subject.has(need)]
    return Unavailable("needs " + " and ".join(needs)) if needs else None


def _opened(measure: Measure, weights: Path | None) -> Start:
    module, _, function = measure.opens.partition(":")
    opens = getattr(importlib.import_module(f"keysync_jax.metrics.{module}"), function)
    start: Start = opens(weights or Path())
    return start
