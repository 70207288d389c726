"""Leakage: how much of the source's mouth is left in a dub (sections 4.2 and D of the paper)."""

from collections.abc import Sequence

import numpy as np

from keysync_jax.metrics.sync import Pair, mean_correlation

EPSILON = 1e-5
OPEN = 0.25
"""MAR above which a mouth counts as open."""


def lip_leak(mar_silent: np.ndarray, mar_speech: np.ndarray) -> float:
    """LipLeak: std(MAR | silent audio) / (std(MAR | speech) + 1e-5); no unit, 0 or more, lower is better.

    0 for a mouth that rests in silence, about 1 for one that the source moves as speech would. A mouth that
    rests in speech too gets a high number for the least movement in silence.

    Args:
      mar_silent: MAR of the dub of a talking source with a silent voice, `[T]`.
      mar_speech: MAR of the dub with speech, `[T]`; the lengths may differ.

    Raises:
      ValueError: one of them is empty or not finite.
    """
    silent, speech = _finite(mar_silent), _finite(mar_speech)
    return float(silent.std() / (speech.std() + EPSILON))


def lip_leak_lite(mar_silent: np.ndarray, threshold: float = OPEN) -> float:
    """LipLeak_lite: share of the frames with a MAR above the threshold; 0 to 1, lower is better.

    Args:
      mar_silent: MAR of the dub of a talking source with a silent voice, `[T]`.
      threshold: of the MAR.

    Raises:
      ValueError: there is no frame, or one is not finite.
    """
    return float((_finite(mar_silent) > threshold).mean())


def lip_leak_of_stds(silent: np.ndarray, speech: np.ndarray) -> float:
    """LipLeak of a set of clips: mean std(MAR | silent audio) / (mean std(MAR | speech) + 1e-5).

    Not the mean of the clips' ratios, which a single mouth that hardly speaks decides.

    Args:
      silent, speech: standard deviation of each clip's MAR, `[clips]` each.

    Raises:
      ValueError: one of them is empty or not finite.
    """
    return float(_finite(silent).mean() / (_finite(speech).mean() + EPSILON))


def lip_sync_difference(matched: Sequence[float], mismatched: Sequence[float]) -> float:
    """LSD: what a system's sync loses with a foreign voice; no unit, 0 or more, lower is better.

    0.5 (|C_AM - C_XM| + |D_AM - D_XM|). All four are means over a set of clips: it is a difference of means,
    not a mean of differences. A system that is weak in both setups has a low one too, so it is read beside
    C_XM.

    Args:
      matched: (LSE-C, LSE-D) of the dubs with the videos' own voices, AM.
      mismatched: the same with other clips' voices, each scored with the voice that drove it, XM.

    Source: Yaman et al. 2025 (arXiv 2511.08613). Which reference picture the system
    was given makes it LSD-CR (the current frame) or LSD-AR (another one).
    """
    return 0.5 * sum(abs(a - b) for a, b in zip(matched, mismatched, strict=True))


def source_correlation(pairs: Sequence[Pair]) -> float:
    """Mean over clips of the correlation of the dubbed mouth with the source's; -1 to 1, near 0 is best.

    It says something only where the dub's voice is not the source's (cross-sync).

    Args:
      pairs: (dub, source) of the mouth's opening or MAR in each clip, `[T]` each.

    Raises:
      ValueError: see `sync.mean_correlation`.
    """
    return mean_correlation(pairs)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("expected one or more frames with a finite MAR")
    return values
