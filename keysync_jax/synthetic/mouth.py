"""The mouth: contours of the lips from an articulation, and how they are painted."""

from typing import NamedTuple

import numpy as np

from keysync_jax.synthetic.canvas import band, close_window, open_window
from keysync_jax.synthetic.identity import Identity, mix

WIDEST_GAP = 0.75
"""Gap between the inner lips at full opening over the mouth's outer width at rest."""

RAISE = 0.15
"""Share of the gap that the upper lip rises."""

JAW_SHARE = 0.3
"""How far the chin goes down over the gap."""

INNER = 0.88
"""Width between the inner corners over the width between the outer ones, lips not rounded."""

LOWER_TEETH_FROM = 0.45
"""Opening from which the lower teeth show."""

CAVITY, DEEP = (48.0, 10.0, 16.0), (60.0, 10.0, 30.0)
STEPS = 25
SHINE = slice(STEPS // 2 - 5, STEPS // 2 + 6)
ACROSS = np.sin(np.linspace(-np.pi / 2, np.pi / 2, STEPS))
"""Places along a contour, -1 (left corner) to 1; closer together at the corners."""


class Mouth(NamedTuple):
    """A mouth in face units.

    The contours are `[STEPS, 2]` from the picture's left corner to its right one; `gap` is the distance of
    the inner lips at the centre, `half` half the width of the outer ones.
    """

    upper_outer: np.ndarray
    upper_inner: np.ndarray
    lower_inner: np.ndarray
    lower_outer: np.ndarray
    gap: float
    half: float

    def landmarks(self) -> np.ndarray:
        """Points 48 to 67 of the 68: `[20, 2]`."""
        outer = np.rint(np.array([0, 0.15, 0.35, 0.5, 0.65, 0.85, 1]) * (STEPS - 1)).astype(int)
        inner = np.rint(np.array([0, 0.3, 0.5, 0.7, 1]) * (STEPS - 1)).astype(int)
        return np.concatenate([
            self.upper_outer[outer],
            self.lower_outer[outer[-2:0:-1]],
            self.upper_inner[inner],
            self.lower_inner[inner[-2:0:-1]],
        ])  # fmt: skip


def shape_mouth(who: Identity, opening: float, width: float, rounding: float) -> Mouth:
    """The lips' contours; the gap grows in proportion to the opening, and is 0 at opening 0."""
    gap = WIDEST_GAP * 2 * who.mouth_width * who.mouth_gain * max(opening, 0.0)
    spread = 1 + (0.24 if width > 0 else 0.34) * width - 0.08 * rounding - 0.06 * opening
    half = who.mouth_width * spread
    full = who.lip_fullness * (1 + 0.35 * rounding - 0.16 * max(width, 0) - 0.14 * opening)
    u = ACROSS
    bow = np.sqrt(1 - u**2) ** (1.1 - 0.25 * rounding)
    smile = (who.mouth_curve + 1.5 * max(width, 0)) * (1 - 0.6 * rounding)
    rest = who.mouth_y - smile * u**2
    sag = 0.3 * gap * (1 - bow)
    upper_inner = rest - RAISE * gap * bow + sag * 0.6
    lower_inner = rest + (1 - RAISE) * gap * bow + sag * 0.6
    dip = 1 - 0.16 * np.exp(-((u / 0.14) ** 2)) * (1 - 0.6 * rounding)
    swell = (1 - np.abs(u) ** (1.7 + 0.7 * rounding)) ** (0.9 - 0.3 * rounding)
    upper = upper_inner - 7.2 * full * swell * dip
    lower = lower_inner + 9.0 * full * (1 - u**2) ** (0.75 - 0.2 * rounding)
    corner = (INNER - 0.14 * rounding) * half * u
    return Mouth(
        np.stack([half * u, upper], -1),
        np.stack([corner, upper_inner], -1),
        np.stack([corner, lower_inner], -1),
        np.stack([half * u, lower], -1),
        gap,
        half,
    )


def paint_mouth(
    image: np.ndarray, mouth: Mouth, who: Identity, opening: float, teeth: float, unit: float
) -> None:
    """Paint a mouth whose contours are in pixels of the picture; `unit` is pixels a face unit."""
    view, patch, corner = open_window(image, np.concatenate(mouth[:4]), 3)
    top, upper, lower, bottom = (_rising(contour - corner) for contour in mouth[:4])
    seam_top, seam_bottom = (np.concatenate([top[:1], line, top[-1:]]) for line in (upper, lower))
    thin = np.array([0.0, 0.6 * unit])
    band(patch, mix(who.lip, DEEP, 0.1), top, bottom)
    band(patch, who.lip, seam_bottom, bottom)
    band(patch, mix(who.lip, DEEP, 0.3), top, top + 2 * thin, 0.7)
    shine = (0.58 * lower + 0.42 * bottom)[SHINE]
    width = (np.cos(np.linspace(-1.4, 1.4, len(shine))) * 1.1 * unit)[:, None] * (0, 1)
    band(patch, mix(who.lip, (255, 225, 220), 0.4), shine - width, shine + width)
    band(patch, mix(who.lip, (30, 4, 14), 0.72), seam_top - thin, seam_bottom + thin)
    _paint_cavity(patch, upper, lower, mouth.gap * unit, opening, teeth, unit)
    close_window(view, patch)


def _paint_cavity(
    patch: np.ndarray,
    upper: np.ndarray,
    lower: np.ndarray,
    gap: float,
    opening: float,
    teeth: float,
    unit: float,
) -> None:
    """Paint what is seen between the lips: dark, the tongue, lower and upper teeth."""
    if gap <= 0:
        return
    depth, taper = lower[:, 1] - upper[:, 1], (1 - ACROSS**2) ** 0.4
    band(patch, CAVITY, upper, lower)
    tongue = 0.36 * gap * np.maximum(1 - (ACROSS / 0.7) ** 2, 0) * min(1.0, opening / 0.15)
    band(patch, (168.0, 64.0, 72.0), _moved(lower, -np.minimum(tongue, depth)), lower)
    if opening > LOWER_TEETH_FROM:
        rise = min(3.0 * unit, 0.1 * gap) * min(1.0, (opening - LOWER_TEETH_FROM) / 0.2)
        band(patch, (216.0, 206.0, 194.0), _moved(lower, -np.minimum(rise * taper**2, depth)), lower)
    show = teeth * min(6.5 * unit, 0.42 * gap) * taper
    band(patch, (246.0, 242.0, 232.0), upper, _moved(upper, np.minimum(show, depth)))


def _moved(contour: np.ndarray, down: np.ndarray) -> np.ndarray:
    return np.column_stack([contour[:, 0], contour[:, 1] + down])


def _rising(contour: np.ndarray) -> np.ndarray:
    """A contour whose x never falls, as a tilted mouth's could at its corners."""
    return np.column_stack([np.maximum.accumulate(contour[:, 0]), contour[:, 1]])
