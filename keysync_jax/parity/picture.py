"""The errors of a comparison as a picture: entries in the order of the computation.

A panel for each network, and one for its training.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keysync_jax.files import replacing
from keysync_jax.parity.compare import Comparison

WIDTH, PANEL, LEFT, TOP, BOTTOM = 1600, 320, 70, 40, 30
INK, FAINT, OURS, FLOOR, BAD = (40, 40, 40), (215, 215, 215), (60, 120, 30), (200, 140, 60), (40, 40, 220)
"""Colours, BGR: text, grid and bounds, our errors, the reference's floors, what is beyond its bound."""


def write_picture(path: Path, comparisons: Sequence[Comparison], title: str) -> None:
    """Writes a PNG; each panel shows the errors, floors and bounds of its entries on a logarithmic scale."""
    import cv2

    names = dict.fromkeys(_panel_of(c.entry) for c in comparisons)
    scale = _Scale(comparisons)
    panels = [_panel(name, [c for c in comparisons if _panel_of(c.entry) == name], scale) for name in names]
    head = np.full((TOP, WIDTH, 3), 255, np.uint8)
    _text(head, title, (LEFT, 26), INK)
    for x, (name, colour) in zip((900, 1010, 1190, 1320), _LEGEND, strict=True):
        _text(head, name, (x, 26), colour)
    with replacing(path) as partial:
        partial.write_bytes(cv2.imencode(".png", np.concatenate([head, *panels]))[1].tobytes())


_LEGEND = (("ours", OURS), ("reference", FLOOR), ("bound", (150, 150, 150)), ("beyond its bound", BAD))


class _Scale:
    """Powers of ten from the smallest error to the largest."""

    def __init__(self, comparisons: Sequence[Comparison]):
        values = [
            x for c in comparisons for x in (c.error, c.floor or 0.0, c.bound) if x > 0 and math.isfinite(x)
        ]
        self.low = math.floor(math.log10(min(values, default=1e-8)))
        self.high = max(math.ceil(math.log10(max(values, default=1.0))), self.low + 1)

    def row(self, value: float) -> int:
        """Of a panel; what is 0 lies on its floor, what is no number at its top."""
        if not math.isfinite(value):
            return BOTTOM // 2
        power = math.log10(value) if value > 0 else self.low
        share = min(max((power - self.low) / (self.high - self.low), 0.0), 1.0)
        return round(PANEL - BOTTOM - share * (PANEL - 2 * BOTTOM))


def _panel_of(entry: str) -> str:
    network = entry.partition("/")[0]
    return f"{network}, training" if _group(entry) == "training" else network


def _panel(name: str, comparisons: Sequence[Comparison], scale: _Scale) -> np.ndarray:
    import cv2

    panel = np.full((PANEL, WIDTH, 3), 255, np.uint8)
    for power in range(scale.low, scale.high + 1):
        row = scale.row(10.0**power)
        cv2.line(panel, (LEFT, row), (WIDTH - 20, row), FAINT, 1)
        _text(panel, f"1e{power}", (8, row + 5), INK)
    columns = np.linspace(LEFT + 10, WIDTH - 30, max(len(comparisons), 2)).astype(int)
    _groups(panel, comparisons, columns)
    for x, c in zip(columns.tolist(), comparisons, strict=False):
        if c.bounded:
            cv2.line(panel, (x - 2, scale.row(c.bound)), (x + 2, scale.row(c.bound)), (150, 150, 150), 1)
        if c.floor is not None:
            cv2.circle(panel, (x, scale.row(c.floor)), 2, FLOOR, -1, cv2.LINE_AA)
        cv2.circle(panel, (x, scale.row(c.error)), 3 if c.ok else 6, OURS if c.ok else BAD, -1, cv2.LINE_AA)
    parting = next((i for i, c in enumerate(comparisons) if not c.ok), None)
    label = name if parting is None else f"{name}: parts at {comparisons[parting].entry.partition('/')[2]}"
    _text(panel, label, (LEFT + 6, 18), INK if parting is None else BAD)
    return panel


def _groups(panel: np.ndarray, comparisons: Sequence[Comparison], columns: np.ndarray) -> None:
    """Names of the groups of entries below the panel, where each begins, or where there is room."""
    drawn, free = "", 0
    for x, c in zip(columns.tolist(), comparisons, strict=False):
        group = _group(c.entry)
        if group != drawn and x >= free:
            _text(panel, group, (x - 3, PANEL - 8), INK, 0.4)
            drawn, free = group, x + 9 * len(group)


def _group(entry: str) -> str:
    _, group, name = [*entry.split("/", 2), "", ""][:3]
    if half := next((half for half in ("encoder", "decoder") if name.startswith(f"{half}.")), ""):
        return half
    names = {
        "uncond": "conditions",
        "cond": "conditions",
        "block": "network",
        "layer": "network",
        "out": "outputs",
    }
    names |= {"step": "steps", "grad": "training", "train": "training"}
    return names.get(group, group)


def _text(
    image: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int], size: float = 0.5
) -> None:
    import cv2

    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)
