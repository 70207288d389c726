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
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import keysync_jax
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.files import sha256_once
from keysync_jax.metrics.catalogue import MEASURES, METRICS, WEIGHTS, Measure, Metric, Runs
from keysync_jax.metrics.meter import NEEDS, Found, Meter, Moment, Record, Start, Subject, Unavailable
from keysync_jax.tensorfile import TensorFile

_DISTRIBUTIONS = {"PIL": "pillow"}
"""Packages that install under another name than they are imported by."""


def unavailable(metric: str, weights: Path | None = None) -> Unavailable | None:
    """Why a metric cannot be computed here at all; None where it can.

    Args:
      metric: its name.
      weights: folder of the weights.
    """
    measure = MEASURES[METRICS[metric].measure]
    for name in measure.weights:
        needed = WEIGHTS[name]
        if weights is None or not (weights / needed.file).exists():
            place = "a folder of weights" if weights is None else str(weights)
            return Unavailable(
                f"needs {needed.what}, {needed.file} in {place}; {needed.get} (terms: {needed.terms})"
            )
    for package in measure.packages:
        if find_spec(package) is None:
            return Unavailable(f"needs {package}; get it with pip install 'keysync_jax[{measure.extra}]'")
    return None


def provenance(metric: str, weights: Path | None = None) -> dict[str, str]:
    """What computes a metric: network or formula, versions of packages, SHA-256 of weights; for reports."""
    measure = MEASURES[METRICS[metric].measure]
    found = {"computed by": measure.computed_by, "keysync_jax": keysync_jax.__version__}
    for package in measure.packages:
        try:
            found[package] = version(_DISTRIBUTIONS.get(package, package))
        except PackageNotFoundError:
            found[package] = "of an unknown version"
    if weights is not None:
        for name in measure.weights:
            found |= _origin(weights / WEIGHTS[name].file)
    if measure.noncommercial:
        found["licence"] = "non-commercial use only"
    return found


def _origin(path: Path) -> dict[str, str]:
    """SHA-256 of a file of weights, or of each in a folder, and what it was converted from."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return {f"{path.name}/{file.name}": sha256_once(file) for file in files}
    if not path.is_file():
        return {}
    found = {path.name: sha256_once(path)}
    if path.suffix == ".safetensors":
        found[f"{path.name} is of"] = TensorFile(path).metadata.get("converted_from", "")
    return found


class Bench:
    """The measures of some metrics, opened once for all clips.

    Attributes:
      metrics: names of those that are computed, in the registry's order; of clips and of sets of them.
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
        asked = {METRICS[name].measure for name in metrics}
        self.missing: dict[str, Unavailable] = {}
        self.metrics: list[str] = []
        self._starts: dict[str, Start] = {}
        for measure in (name for name in MEASURES if name in asked):
            names = [name for name, metric in METRICS.items() if metric.measure == measure]
            found = unavailable(names[0], weights) or _opened(MEASURES[measure], weights)
            if isinstance(found, Unavailable):
                self.missing |= dict.fromkeys(names, found)
            else:
                self._starts[measure] = found
                self.metrics += names
        self.metrics.sort(key=list(METRICS).index)

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
    for name in (name for name in wanted if not METRICS[name].runs):
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
    made: Metric = METRICS[metric]
    if made.combine is None:
        raise ValueError(f"{metric} is a metric of a clip")
    absent = [run for run in made.runs if not runs.get(run)]
    if absent:
        return Unavailable(f"needs the runs {', '.join(absent)}")
    reasons = [record.missing.get(metric) for run in made.runs for record in runs[run]]
    if any(reasons):
        return next(reason for reason in reasons if reason)
    try:
        return made.combine(runs)
    except ValueError as error:
        return Unavailable(str(error))


def _absent(name: str, subject: Subject) -> Unavailable | None:
    needs = [NEEDS[need] for need in METRICS[name].needs if not subject.has(need)]
    return Unavailable("needs " + " and ".join(needs)) if needs else None


def _opened(measure: Measure, weights: Path | None) -> Start | Unavailable:
    module, _, function = measure.opens.partition(":")
    opens = getattr(importlib.import_module(f"keysync_jax.metrics.{module}"), function)
    try:
        found: Start | Unavailable = opens(weights or Path())
    except Exception as error:
        if isinstance(error, UserError) or machine_fault(error) or not (measure.weights and measure.packages):
            raise
        # Libraries raise anything where a file is not what they take it for.
        files = " and ".join(WEIGHTS[name].file for name in measure.weights)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{weights}: {files} cannot be used ({first_line})") from error
    return found
