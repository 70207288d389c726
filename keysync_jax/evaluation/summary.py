"""From the scores of single dubs to tables: means with intervals, leakage, comparisons; of JSON's types."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from keysync_jax.evaluation.protocol import Cell, Reference
from keysync_jax.evaluation.scoring import Scored
from keysync_jax.evaluation.statistics import Estimate, Resampling, compare, distance, holm, shift
from keysync_jax.evaluation.world import WORLD_METRICS
from keysync_jax.metrics.catalogue import METRICS, Metric, Runs
from keysync_jax.metrics.leakage import EPSILON
from keysync_jax.metrics.meter import Record
from keysync_jax.metrics.sync import correlation

KNOWN: Mapping[str, Metric] = {**METRICS, **WORLD_METRICS}

SYNC_MEASURES = (("sync",), ("lse_c", "lse_d"))
"""What leakage is read by: in the synthetic world its own reader, else SyncNet's two."""

DETAILS = frozenset({
    "psnr_inside", "psnr_outside", "ssim_inside", "ssim_outside", "lmd_sum", "lmd_eyes", "mar_open",
    "mar_std", "lag", "gain", "speaking_share", "av_offset",
})  # fmt: skip
"""Metrics of clips that stand in the large table alone, and that systems are not compared by."""

THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(1, 41))
"""Of the MAR, for the share of open frames in silence."""

EXCHANGED = 20
"""Other clips whose voices a dub is compared with for chance."""


@dataclass(frozen=True)
class Judged:
    """A system's dubs that were scored.

    Attributes:
      scores: cell -> clip -> scores.
      clips: those that have a dub in every cell the system runs, in the list's order.
    """

    system: str
    scores: Mapping[Cell, Mapping[str, Scored]]
    clips: tuple[str, ...]

    def column(self, cell: Cell, metric: str) -> np.ndarray | None:
        """A metric of the clips `[clips]`; None where one lacks it."""
        found = [self.scores[cell][clip].values.get(metric) for clip in self.clips]
        return None if not found or None in found else np.array(found, np.float64)

    def has(self, *cells: Cell) -> bool:
        return bool(self.clips) and all(cell in self.scores for cell in cells)


def sync_measures(judged: Sequence[Judged]) -> tuple[str, ...]:
    """The sync measures that all dubs have."""
    scores = [s for one in judged for cell in one.scores.values() for s in cell.values()]
    for measures in SYNC_MEASURES:
        if scores and all(m in one.values for m in measures for one in scores):
            return measures
    return ()


def row(
    judged: Judged,
    reference: Reference,
    resampling: Resampling,
    voices: Mapping[str, np.ndarray],
    partners: Mapping[str, str],
    sync: Sequence[str],
    speaking: Judged | None = None,
) -> dict[str, Any]:
    """A system with one reference, as a row of tables.

    Args:
      resampling: of the system's clips.
      voices: clip -> articulation of its voice, in the synthetic world.
      partners: clip -> clip whose voice it was given.
      sync: measures that all systems have.
      speaking: whose mouths LipLeak is relative to, where they are not the system's own.
    """
    cells = {
        cell.name: _means(judged, cell, resampling) for cell in judged.scores if cell.reference == reference
    }
    return {
        "system": judged.system,
        "reference": reference,
        "clips": len(judged.clips),
        "cells": cells,
        "leakage": _leakage(judged, reference, resampling, sync, speaking or judged),
        "chance": _chance(judged, reference, voices, partners),
        "distances": {},
        "open": _open_shares(judged, Cell("SI", reference)),
    }


def _means(judged: Judged, cell: Cell, resampling: Resampling) -> dict[str, Any]:
    found = {}
    for name in KNOWN:
        # A metric may be without a number for some clips (an offset that nothing shows).
        having = [i for i, clip in enumerate(judged.clips) if name in judged.scores[cell][clip].values]
        if having:
            part = resampling if len(having) == len(judged.clips) else resampling.of(having)
            values = [judged.scores[cell][judged.clips[i]].values[name] for i in having]
            found[name] = _told(_mean(np.array(values), part))
    return found


def distances(judged: Judged, real: Judged, reference: Reference, seed: int) -> dict[str, dict[str, Any]]:
    """Distances of the set of dubs from the set of real videos (FID, FVD, CMMD): cell -> metric -> distance.

    On the clips that both have, 4 or more. The interval is that of random halves, whose values are larger;
    `bias` is what two halves of the real set give.
    """
    found: dict[str, dict[str, Any]] = {}
    clips = [clip for clip in judged.clips if clip in real.clips]
    for cell in (cell for cell in judged.scores if cell.reference == reference and cell.setup != "SI"):
        sets = [one.scores[cell][clip] for one in (judged, real) if cell in one.scores for clip in clips]
        if len(clips) < 4 or len(sets) < 2 * len(clips) or any(one.features is None for one in sets):
            continue
        records = [one.record() for one in sets]
        dubs, truths = records[: len(clips)], records[len(clips) :]
        for name, metric in METRICS.items():
            if metric.resampling == "halves" and metric.combine is not None:
                made = _distance(metric.combine, dubs, truths, seed)
                found.setdefault(cell.name, {}).update({name: made} if made else {})
    return found


def _distance(
    combine: Callable[[Runs], float], dubs: Sequence[Record], truths: Sequence[Record], seed: int
) -> dict[str, Any] | None:
    """One distance; None where the clips lack its features."""

    def between(real: np.ndarray, of: np.ndarray) -> float:
        return combine({"real": [truths[i] for i in real], "dub": [dubs[i] for i in of]})

    def within(first: np.ndarray, second: np.ndarray) -> float:
        return combine({"real": [truths[i] for i in first], "dub": [truths[i] for i in second]})

    try:
        found = distance(between, within, len(dubs), seed)
    except ValueError:
        return None
    halves = found.halves
    told = {"value": found.value, "low": halves.low, "high": halves.high, "bias": found.bias}
    return {**{key: _number(x) for key, x in told.items()}, "clips": found.clips}


def _mean(values: np.ndarray, resampling: Resampling) -> Estimate:
    """The mean; of an infinite one (equal pictures) there is no interval."""
    if np.isfinite(values).all():
        return resampling.mean(values)
    return Estimate(float(values.mean()), float("nan"), float("nan"), len(values))


def _leakage(
    judged: Judged, reference: Reference, resampling: Resampling, sync: Sequence[str], speaking: Judged
) -> dict[str, Any]:
    matched, mismatched, silent = (Cell(setup, reference) for setup in ("AM", "XM", "SI"))
    found: dict[str, Any] = {}
    if judged.has(silent, mismatched):
        still = judged.column(silent, "mar_std")
        moving = replace(speaking, clips=judged.clips).column(mismatched, "mar_std")
        if still is not None and moving is not None:
            draws = resampling.means(still) / (resampling.means(moving) + EPSILON)
            value = float(still.mean() / (moving.mean() + EPSILON))
            found["lip_leak"] = _told(resampling.estimate(value, draws))
            found["lip_leak_clips"] = float(np.median(still / (moving + EPSILON)))
    if judged.has(silent):
        for name, metric in {"lip_leak_lite": "mar_open", "gain_s": "gain"}.items():
            values = judged.column(silent, metric)
            if values is not None:
                found[name] = _told(resampling.mean(values))
        for measure in sync:
            values = judged.column(silent, measure)
            if values is not None:
                found[f"{measure}_s"] = _told(resampling.mean(values))
    if judged.has(matched, mismatched) and sync:
        pairs = [[judged.column(cell, m) for m in sync] for cell in (matched, mismatched)]
        lsd = shift(np.stack(pairs[0], -1), np.stack(pairs[1], -1), resampling)  # type: ignore[arg-type]
        found["lsd"] = {
            **_told(lsd.value),
            "signed": dict(zip(sync, map(_number, lsd.signed), strict=True)),
            "chance": _number(lsd.chance),
            "p": _number(lsd.p),
        }
    return found


def _chance(
    judged: Judged, reference: Reference, voices: Mapping[str, np.ndarray], partners: Mapping[str, str]
) -> dict[str, float]:
    """Mean correlation with voices of other clips than those that a dub is scored by: in XM, and in SI."""
    found = {}
    for setup in ("XM", "SI"):
        cell = Cell(setup, reference)
        if not judged.has(cell) or not voices or len(judged.clips) < 2:
            continue
        scores, clips = judged.scores[cell], judged.clips
        pairs = [
            (scores[clip].series["opening"], voices[clips[(i + step) % len(clips)]])
            for i, clip in enumerate(clips)
            for step in range(1, min(len(clips), EXCHANGED + 1))
            if "opening" in scores[clip].series and clips[(i + step) % len(clips)] != partners.get(clip)
        ]
        correlations = [
            correlation(np.array(a)[: len(b)], b[: len(a)]) for a, b in pairs if min(len(a), len(b)) > 1
        ]
        if correlations:
            found[setup] = _number(float(np.mean(correlations)))
    return found


def _open_shares(judged: Judged, cell: Cell) -> list[float]:
    """Share of frames in silence with a MAR above each of `THRESHOLDS`, mean of clips."""
    if not judged.has(cell):
        return []
    series = [np.array(judged.scores[cell][clip].series.get("mar", [])) for clip in judged.clips]
    if not all(len(mar) for mar in series):
        return []
    return [_number(float(np.mean([np.mean(mar > t) for mar in series]))) for t in THRESHOLDS]


def comparisons(
    judged: Sequence[Judged], cells: Sequence[Cell], clips: Sequence[str], resampling: Resampling
) -> list[dict[str, Any]]:
    """Every two systems by every metric with a better side, on the clips that both have; p adjusted by Holm.

    Silence is left out: there no sync is good.

    Args:
      clips: names, in the order of the resampling.
    """
    made: dict[str, dict[str, Any]] = {}
    for i, first in enumerate(judged):
        for second in judged[i + 1 :]:
            common = [clip for clip in clips if clip in first.clips and clip in second.clips]
            if len(common) < 2:
                continue
            part = resampling.of([clips.index(clip) for clip in common])
            for cell in (cell for cell in cells if cell.setup != "SI"):
                for metric, found in _compared(first, second, cell, common, part).items():
                    told = {
                        "cell": cell.name,
                        "metric": metric,
                        "first": first.system,
                        "second": second.system,
                    }
                    made[str(len(made))] = {**told, **found}
    adjusted = holm({key: one["permutation"] for key, one in made.items()})
    return [{**one, "holm": _number(adjusted[key])} for key, one in made.items()]


def _compared(
    first: Judged, second: Judged, cell: Cell, clips: Sequence[str], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if cell not in first.scores or cell not in second.scores:
        return found
    for name, metric in KNOWN.items():
        a, b = (_of(one, cell, clips, name) for one in (first, second))
        compared = metric.better in ("higher", "lower") and name not in DETAILS
        if compared and a is not None and b is not None:
            one = compare(a, b, resampling)
            found[name] = {
                **_told(one.difference),
                "permutation": _number(one.permutation),
                "wilcoxon": None if one.wilcoxon is None else _number(one.wilcoxon),
                "visible": _number(one.visible),
            }
    return found


def _of(judged: Judged, cell: Cell, clips: Sequence[str], metric: str) -> np.ndarray | None:
    """Finite values of some clips."""
    found = [judged.scores[cell][clip].values.get(metric, np.nan) for clip in clips]
    return np.array(found) if np.isfinite(found).all() else None


def _told(found: Estimate) -> dict[str, Any]:
    """An estimate for JSON: 6 digits, None where there is no number, "inf" where it is infinite."""
    return {key: x if isinstance(x, int) else _number(x) for key, x in asdict(found).items()}


def _number(value: float) -> Any:
    if np.isnan(value):
        return None
    return float(f"{value:.6g}") if np.isfinite(value) else str(value)
