"""Painting in layers: smooth curves, soft masks and a canvas with transparency."""

from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.synthetic.identity import Colour

SUBPIXEL = 4
"""Bits of a pixel's fraction that polygons are drawn with."""


FAINT = 0.004
"""Share of a colour that changes no byte."""

COLUMNS = 3
"""Columns that a pixel's coverage is summed from."""


def curve(points: np.ndarray, steps: int = 8, closed: bool = False) -> np.ndarray:
    """Smooth curve (uniform Catmull-Rom) through points `[N, 2]`: float64 `[M, 2]`."""
    points = np.asarray(points, np.float64)
    if closed:
        around = np.concatenate([points[-1:], points, points[:2]])
    else:
        around = np.concatenate([points[:1], points, points[-1:]])
    p0, p1, p2, p3 = around[:-3, None], around[1:-2, None], around[2:-1, None], around[3:, None]
    t = (np.arange(steps) / steps)[None, :, None]
    smooth = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    smooth = smooth.reshape(-1, 2)
    return smooth if closed else np.concatenate([smooth, points[-1:]])


def along(points: np.ndarray, count: int) -> np.ndarray:
    """So many points at equal distances along a polyline `[N, 2]`, its ends included."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    length = np.concatenate([[0], np.cumsum(steps)])
    at = np.linspace(0, length[-1], count)
    return np.stack([np.interp(at, length, points[:, 0]), np.interp(at, length, points[:, 1])], axis=-1)


def ellipse(x: float, y: float, a: float, b: float, tilt: float = 0.0, count: int = 32) -> np.ndarray:
    """Outline of an ellipse with half axes a and b, turned by `tilt` radians: `[count, 2]`."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    u, v = a * np.cos(turn), b * np.sin(turn)
    return np.stack([x + u * np.cos(tilt) - v * np.sin(tilt), y + u * np.sin(tilt) + v * np.cos(tilt)], -1)


def mirrored(points: np.ndarray) -> np.ndarray:
    """A closed shape from its right half: the points, then their mirror images backwards."""
    points = np.asarray(points, np.float64)
    other = points[::-1] * (-1, 1)
    return np.concatenate([points, other[np.abs(other[:, 0]) > 1e-9]])


def fixed(points: np.ndarray) -> np.ndarray:
    """Points as OpenCV takes them with `shift=SUBPIXEL`."""
    return np.rint(np.asarray(points) * (1 << SUBPIXEL)).astype(np.int32)


def fill(image: np.ndarray, points: np.ndarray, colour: Colour | float) -> None:
    """Fill a polygon (pixels, `[N, 2]`) with smooth edges, in place."""
    cv2.fillPoly(image, [fixed(points)], colour, cv2.LINE_AA, SUBPIXEL)


def stroke(
    image: np.ndarray, points: np.ndarray, colour: Colour | float, thickness: int = 1, closed: bool = False
) -> None:
    """Draw a polyline (pixels, `[N, 2]`) with smooth edges, in place."""
    cv2.polylines(image, [fixed(points)], closed, colour, thickness, cv2.LINE_AA, SUBPIXEL)


def open_window(
    image: np.ndarray, points: np.ndarray, margin: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of a picture around points: a view of it, a float32 copy `[3, h, w]`, and its corner."""
    corner = np.maximum(np.floor(points.min(0)).astype(int) - margin, 0)
    end = np.ceil(points.max(0)).astype(int) + margin + 1
    view = image[corner[1] : end[1], corner[0] : end[0]]
    return view, np.ascontiguousarray(view.transpose(2, 0, 1), np.float32), corner


def close_window(view: np.ndarray, patch: np.ndarray) -> None:
    """Write a patch `[3, h, w]` back, rounded."""
    view[:] = (patch + np.float32(0.5)).transpose(1, 2, 0)


def between(upper: np.ndarray, lower: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Share of every pixel that lies between two curves: float32 `[h, w]`, exact for level edges.

    OpenCV rounds a filled polygon's edges to whole rows, which would make small motions jerk.

    upper, lower: pixels `[N, 2]`, both from left to right.
    """
    rows = np.arange(shape[0], dtype=np.float32)[:, None]
    columns = (np.arange(shape[1] * COLUMNS) + 0.5) / COLUMNS - 0.5
    top = np.interp(columns, upper[:, 0], upper[:, 1], np.inf, np.inf).astype(np.float32)
    bottom = np.interp(columns, lower[:, 0], lower[:, 1], -np.inf, -np.inf).astype(np.float32)
    share = np.minimum(rows + np.float32(0.5), bottom)
    share -= np.maximum(rows - np.float32(0.5), top)
    np.maximum(share, 0, out=share)
    total = share[:, ::COLUMNS].copy()
    for column in range(1, COLUMNS):
        total += share[:, column::COLUMNS]
    return total / np.float32(COLUMNS)


def band(
    patch: np.ndarray,
    colour: np.ndarray | Colour,
    upper: np.ndarray,
    lower: np.ndarray,
    strength: float = 1.0,
) -> None:
    """Lay a colour between two curves (as in `between`) over a patch `[3, h, w]`, in place."""
    x0, x1 = max(int(upper[0, 0]) - 1, 0), int(upper[-1, 0]) + 3
    y0, y1 = max(int(upper[:, 1].min()) - 1, 0), int(lower[:, 1].max()) + 3
    part = patch[:, y0:y1, x0:x1]
    share = between(upper - (x0, y0), lower - (x0, y0), part.shape[1:])
    over = np.asarray(colour, np.float32)
    lay(
        part,
        over if over.ndim == 1 else over[:, y0:y1, x0:x1],
        share if strength == 1 else share * np.float32(strength),
    )


def disc(centre: np.ndarray, radius: float, shape: tuple[int, ...]) -> np.ndarray:
    """Share of every pixel that lies in a disc: float32 `[h, w]`."""
    x = np.arange(shape[1], dtype=np.float32) - np.float32(centre[0])
    y = np.arange(shape[0], dtype=np.float32)[:, None] - np.float32(centre[1])
    return np.minimum(np.maximum(np.float32(radius + 0.5) - np.sqrt(x * x + y * y), 0), 1)


def lay(patch: np.ndarray, colour: np.ndarray | Colour, share: np.ndarray) -> None:
    """Lay a colour or a picture `[3, h, w]` over a patch `[3, h, w]`, in place; share 0 to 1, `[h, w]`."""
    over = np.asarray(colour, np.float32)
    patch += ((over if over.ndim == 3 else over[:, None, None]) - patch) * share


class Layer(NamedTuple):
    """A painted layer: premultiplied uint8 `[h, w, 4]`; its corner and box (x0, y0, x1, y1) in face units."""

    picture: np.ndarray
    left: float
    top: float
    box: np.ndarray


class Canvas:
    """A layer to paint on: premultiplied colour float32 `[H, W, 3]` and alpha float32 `[H, W]`, 0 to 1.

    Places are given in face units (pixels of a 256 x 256 picture), with (`left`, `top`) in the corner and
    `scale` canvas pixels a unit.
    """

    def __init__(self, scale: float, left: float, top: float, width: float, height: float) -> None:
        self.scale, self.left, self.top = scale, left, top
        rows, columns = round(height * scale), round(width * scale)
        self.colour = np.zeros((rows, columns, 3), np.float32)
        self.alpha = np.zeros((rows, columns), np.float32)
        self.x, self.y = np.meshgrid(
            np.arange(columns, dtype=np.float32) / scale + left,
            np.arange(rows, dtype=np.float32) / scale + top,
        )

    def mask(self, *shapes: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """Float32 `[H, W]`, 1 inside any of the closed shapes; `soft` is the blur's sigma in face units."""
        drawn = np.zeros(self.alpha.shape, np.uint8)
        for shape in shapes:
            fill(drawn, (shape - (self.left, self.top)) * self.scale, 255)
        return self._softened(drawn, soft)

    def line(self, *lines: np.ndarray, thickness: float, soft: float = 0.0) -> np.ndarray:
        """Float32 `[H, W]`, 1 on the polylines."""
        drawn = np.zeros(self.alpha.shape, np.uint8)
        for points in lines:
            stroke(
                drawn,
                (points - (self.left, self.top)) * self.scale,
                255,
                max(1, round(thickness * self.scale)),
            )
        return self._softened(drawn, soft)

    def blob(self, x: float, y: float, a: float, b: float) -> np.ndarray:
        """A Gaussian spot of height 1, cut off where it is invisible."""
        across, down = np.exp(-(((self.x[0] - x) / a) ** 2)), np.exp(-(((self.y[:, 0] - y) / b) ** 2))
        spot = np.outer(down, across).astype(np.float32)
        return np.where(spot > FAINT, spot, np.float32(0))

    def paint(self, mask: np.ndarray, colour: Colour) -> None:
        """Lay a colour over what is there."""
        self.tint(mask, colour, opaque=True)
        self.alpha += (1 - self.alpha) * mask

    def tint(self, mask: np.ndarray, colour: Colour, opaque: bool = False) -> None:
        """Colour what is painted by the share `mask`; with `opaque`, as if everything were painted."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return
        area = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        share = mask[area].astype(np.float32)
        self.colour[area] *= (1 - share)[..., None]
        if not opaque:
            share = share * self.alpha[area]
        self.colour[area] += np.asarray(colour, np.float32) * share[..., None]

    def brighten(self, factor: np.ndarray) -> None:
        """Multiply the colours by a map `[H, W]`."""
        np.clip(self.colour * factor[..., None], 0, 255 * self.alpha[..., None], out=self.colour)

    def picture(self) -> np.ndarray:
        """The layer as uint8 `[H, W, 4]`: premultiplied colour and alpha."""
        return np.rint(np.dstack([self.colour, 255 * self.alpha])).clip(0, 255).astype(np.uint8)

    def layer(self) -> Layer:
        """The painted part of a canvas, with an empty edge around it where there is room."""
        picture, scale = self.picture(), self.scale
        rows, columns = np.flatnonzero(picture[..., 3].any(1)), np.flatnonzero(picture[..., 3].any(0))
        top, left = max(rows[0] - 2, 0), max(columns[0] - 2, 0)
        part = np.ascontiguousarray(picture[top : rows[-1] + 3, left : columns[-1] + 3])
        x, y = self.left + left / scale, self.top + top / scale
        return Layer(part, x, y, np.array([x, y, x + part.shape[1] / scale, y + part.shape[0] / scale]))

    def _softened(self, drawn: np.ndarray, soft: float) -> np.ndarray:
        mask = drawn.astype(np.float32) / 255
        return cv2.GaussianBlur(mask, (0, 0), soft * self.scale) if soft else mask
