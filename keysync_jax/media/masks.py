"""Masks of the region to generate (paper, algorithm 1 and its ablations; 1 = generate).

Landmarks are in pixels of the square crop, by default 512 x 512, in the 68-point order.
"""

import numpy as np

SIZE, LATENT_SIZE = 512, 64
NOSE_BRIDGE, NOSE_MIDDLE, NOSE_BASE, NOSTRILS = 28, 29, 33, (31, 35)
LEFT_CHEEK = 2
MOUTH = slice(48, 68)
MOUTH_MARGIN = 5
REGION_MARGIN = 0.5
"""Width that `mouth_region` adds around the mouth's bounding box, over the box's larger side; half a side."""
STRATEGIES = ("box", "full", "heart", "mouth")


def scale_landmarks(landmarks: np.ndarray, width: int, height: int, size: int = SIZE) -> np.ndarray:
    """Landmarks `[T, 68, 2]` of a width x height picture as whole pixels of a size x size one.

    Scaled, then truncated: int32 (paper, algorithm 1).
    """
    return (landmarks / np.array([width, height], np.float32) * size).astype(np.int32)


def make_mask(landmarks: np.ndarray, strategy: str = "box", size: int = SIZE) -> np.ndarray:
    """Mask the lower face: landmarks `[T, 68, 2]` in crop pixels (truncated) to uint8 `[T, size, size]`.

    "box" (the released weights'): between the outermost landmarks, from the nose bridge to the bottom edge.
    "full": everything from the nose bridge down. "heart": the box from the middle of the nose down, without
    the nose. "mouth": the box from just above the nose bridge to just below the chin.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown mask strategy {strategy}; it is one of {', '.join(STRATEGIES)}")
    masks = np.zeros((len(landmarks), size, size), np.uint8)
    for mask, points in zip(masks, landmarks.astype(np.int32), strict=True):
        x, y = points[:, 0], points[:, 1]
        left, right, bottom = x.min(), x.max(), size - 1
        if strategy == "box":
            _fill(mask, left, y[NOSE_BRIDGE], right, bottom, 1)
        elif strategy == "full":
            _fill(mask, 0, y[NOSE_BRIDGE], size - 1, bottom, 1)
        elif strategy == "heart":
            _fill(mask, left, y[NOSE_MIDDLE], right, bottom, 1)
            margin = (x[NOSE_MIDDLE] - x[LEFT_CHEEK]) / 10
            nose = np.trunc([x[NOSTRILS[0]] - margin, x[NOSTRILS[1]] + margin]).astype(int)
            _fill(mask, nose[0], y[NOSE_MIDDLE], nose[1], y[NOSE_BASE], 0)
        else:
            _fill(mask, left, y[NOSE_BRIDGE] - MOUTH_MARGIN, right, y.max() + MOUTH_MARGIN, 1)
    return masks


def _fill(mask: np.ndarray, left: int, top: int, right: int, bottom: int, value: int) -> None:
    """Set a rectangle, corners included, as far as it lies in the mask."""
    mask[max(top, 0) : max(bottom + 1, 0), max(left, 0) : max(right + 1, 0)] = value


def mouth_region(landmarks: np.ndarray, size: int) -> np.ndarray:
    """1 in the mouth's bounding box with a margin: landmarks `[68, 2]` in pixels -> uint8 `[size, size]`."""
    points = landmarks[MOUTH]
    low, high = points.min(axis=0), points.max(axis=0)
    margin = REGION_MARGIN * (high - low).max() / 2
    (left, top), (right, bottom) = low - margin, high + margin
    rows, columns = np.mgrid[:size, :size] + 0.5
    inside = (columns >= left) & (columns <= right) & (rows >= top) & (rows <= bottom)
    return inside.astype(np.uint8)


def to_latent(mask: np.ndarray, size: int = LATENT_SIZE) -> np.ndarray:
    """Nearest-resize square masks `[..., S, S]` to the latent grid `[..., size, size]`.

    Cell i takes pixel floor(i * S / size), as the reference's nearest resize does.
    """
    picked = np.arange(size) * mask.shape[-1] // size
    return mask[..., picked[:, None], picked]


def exclude(mask: np.ndarray, occluder: np.ndarray) -> np.ndarray:
    """M' = M and not M_obj (paper, eq. 7): leave what lies before the face. uint8; shapes broadcast."""
    return ((mask > 0) & ~(occluder > 0)).astype(np.uint8)
