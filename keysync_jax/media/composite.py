"""Pasting the generated crop back into the full frame, with no visible edge.

Only the masked region was generated. Around it the decoded crop still repeats the source, so the paste
fades out there, outside the mask; and it fades to nothing before the crop's edges, where the mask itself
ends at the bottom (but not where the crop ends with the frame, for nothing lies beyond).
"""

import cv2
import numpy as np

CANVAS = 512
"""Side of the crop in the pixels that widths are given in, whatever a model's own crop size."""

FEATHER = 24
"""Width of the fade, in pixels of a 512 crop."""

GAP = 4
"""Outermost pixels of a 512 crop that are never pasted."""


def paste_weights(
    mask: np.ndarray, box: np.ndarray, frame_shape: tuple[int, ...], feather: int = FEATHER
) -> np.ndarray:
    """Share of the generated crop in each pixel of `box`: float32 `[y1 - y0, x1 - x0]` in [0, 1].

    1 inside the mask, falling smoothly to 0 over `feather` pixels (of a 512 crop) outside of it and towards
    the crop's edges. mask: `[M, M]`, 1 = generated, at any resolution (grown by nearest);
    box: (x0, y0, x1, y1); frame_shape: (H, W, ...).
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    generated = (np.asarray(mask) > 0).astype(np.uint8)
    grown = cv2.resize(generated, (CANVAS, CANVAS), interpolation=cv2.INTER_NEAREST)
    if not grown.any():
        return np.zeros((y1 - y0, x1 - x0), np.float32)
    outside = cv2.distanceTransform(1 - grown, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    edge = np.arange(CANVAS, dtype=np.float32)
    column = np.minimum(_rise(edge, feather, x0 > 0), _rise(edge[::-1], feather, x1 < frame_shape[1]))
    row = np.minimum(_rise(edge, feather, y0 > 0), _rise(edge[::-1], feather, y1 < frame_shape[0]))
    weights = _smooth(1 - outside / (feather + 1)) * row[:, None] * column
    return np.clip(cv2.resize(weights, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR), 0.0, 1.0)


def _rise(distance: np.ndarray, feather: int, fades: bool) -> np.ndarray:
    """Weight by the distance from one edge of the crop."""
    return _smooth((distance - GAP + 1) / (feather + 1)) if fades else np.ones_like(distance)


def _smooth(share: np.ndarray) -> np.ndarray:
    """0 to 1 with level ends (3 s^2 - 2 s^3)."""
    share = np.clip(share, 0.0, 1.0)
    return (share * share * (3 - 2 * share)).astype(np.float32)


def paste(
    frame: np.ndarray, generated: np.ndarray, mask: np.ndarray, box: np.ndarray, feather: int = FEATHER
) -> np.ndarray:
    """Return a copy of the uint8 RGB frame `[H, W, 3]` with the generated crop blended into `box`.

    generated: uint8 `[S, S, 3]`; mask and box: see `paste_weights`. Outside `pasted_region` the frame's
    pixels are untouched.
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    size = generated.shape[0]
    weights = paste_weights(mask, box, frame.shape, feather)
    left, top, width, height = cv2.boundingRect((weights > 0).astype(np.uint8))
    rows, columns = slice(top, top + height), slice(left, left + width)
    method = cv2.INTER_AREA if 2 * min(x1 - x0, y1 - y0) < size else cv2.INTER_CUBIC
    face = cv2.resize(generated, (x1 - x0, y1 - y0), interpolation=method)[rows, columns]
    result = frame.copy()
    region = result[y0:y1, x0:x1][rows, columns]
    source = region.astype(np.float32)
    share = weights[rows, columns, None]
    region[...] = np.rint(source + share * (face.astype(np.float32) - source)).astype(np.uint8)
    return result


def pasted_region(
    mask: np.ndarray, box: np.ndarray, frame_shape: tuple[int, ...], feather: int = FEATHER
) -> np.ndarray:
    """Where `paste` can change a frame of this shape: bool `[H, W]`."""
    x0, y0, x1, y1 = (int(v) for v in box)
    region = np.zeros(frame_shape[:2], bool)
    region[y0:y1, x0:x1] = paste_weights(mask, box, frame_shape, feather) > 0
    return region


def seam_energy(
    source: np.ndarray, pasted: np.ndarray, mask: np.ndarray, box: np.ndarray, feather: int = FEATHER
) -> tuple[float, float]:
    """How much there is to see along the border of what was pasted: before and after.

    The mean squared gradient of the luma (levels per pixel, Sobel over 8), where the paste fades out. A
    border that shows has more after than before; 0 and 0 where nothing was pasted.

    Args:
      source, pasted: uint8 RGB `[H, W, 3]`.
      mask, box, feather: as `paste` took them.
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    weights = paste_weights(mask, box, source.shape, feather)
    fade = (weights > 0) & (weights < 1)
    if not fade.any():
        return 0.0, 0.0
    found = []
    for picture in (source, pasted):
        luma = cv2.cvtColor(np.ascontiguousarray(picture[y0:y1, x0:x1]), cv2.COLOR_RGB2GRAY)
        across, down = (cv2.Sobel(luma, cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1)))
        found.append(float((across[fade] ** 2 + down[fade] ** 2).mean()))
    return found[0], found[1]
