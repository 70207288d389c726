"""Metrics of pictures over a clip: PSNR and SSIM against the truth and around the mask, sharpness."""

from pathlib import Path

import numpy as np

from keysync_jax.media.crop import crop_frame
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.metrics.quality import BRIGHTEST, SSIM_EDGE, laplacian_variance, ssim_map

SHOWN = 512
"""Side that the face's crop is resized to where a metric depends on the size."""

_REGIONS = ("", "_inside", "_outside")


class Square:
    """The square of a clip that metrics of pictures look at: a frame's box, or all of it."""

    def __init__(self, boxes: np.ndarray | None) -> None:
        self._boxes, self._t = boxes, -1

    def next(self) -> None:
        """Goes to the next frame."""
        self._t += 1

    def box(self, shape: tuple[int, ...]) -> np.ndarray:
        """int `[4]`, of a frame of this shape."""
        if self._boxes is not None:
            return np.asarray(self._boxes[self._t])
        return np.array([0, 0, shape[1], shape[0]])

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """Of a frame or a mask of its size, not resized."""
        x0, y0, x1, y1 = self.box(picture.shape)
        return picture[y0:y1, x0:x1]

    def shown(self, frame: np.ndarray) -> np.ndarray:
        """The crop at 512 pixels or, without boxes, the frame as it is: of one size in all of a clip."""
        return frame if self._boxes is None else crop_frame(frame, self._boxes[self._t], SHOWN)


class Pictures:
    """PSNR (pooled) and SSIM (mean of frames' means): of all pixels, inside and outside of a mask."""

    def __init__(self, subject: Subject) -> None:
        self._square = Square(subject.boxes)
        self._square_error = dict.fromkeys(_REGIONS, (0, 0))
        self._similarity: dict[str, list[float]] = {region: [] for region in _REGIONS}

    def update(self, moment: Moment) -> None:
        self._square.next()
        frame = self._square.cut(moment.frame)
        mask = None if moment.mask is None else self._square.cut(np.asarray(moment.mask, bool))
        if moment.truth is not None:
            regions = {"": np.ones(frame.shape[:2], bool)}
            if mask is not None:
                regions["_inside"] = mask
                if moment.truth is moment.source:
                    regions["_outside"] = ~mask
            self._compare(frame, self._square.cut(moment.truth), regions)
        if moment.source is not None and mask is not None and moment.truth is not moment.source:
            self._compare(frame, self._square.cut(moment.source), {"_outside": ~mask})

    def _compare(self, frame: np.ndarray, other: np.ndarray, regions: dict[str, np.ndarray]) -> None:
        similarity = ssim_map(frame, other)
        difference = frame.astype(np.int32) - other
        squares = (difference * difference).sum(axis=-1)
        for name, region in regions.items():
            total, count = self._square_error[name]
            self._square_error[name] = total + int(squares[region].sum()), count + 3 * int(region.sum())
            whole = region[SSIM_EDGE:-SSIM_EDGE, SSIM_EDGE:-SSIM_EDGE]
            if whole.any():
                self._similarity[name].append(float(similarity[whole].mean()))

    def result(self) -> Found:
        found: dict[str, float | np.ndarray | Unavailable] = {}
        for region in _REGIONS:
            total, count = self._square_error[region]
            similarity = self._similarity[region]
            nothing = Unavailable("there is no pixel to compare")
            found[f"psnr{region}"] = _decibel(total, count) if count else nothing
            found[f"ssim{region}"] = float(np.mean(similarity)) if similarity else nothing
        return found


def _decibel(squares: int, count: int) -> float:
    return float(10 * np.log10(BRIGHTEST**2 * count / squares)) if squares else float("inf")


class Sharpness:
    """Variance of the Laplacian, of the crop at 512 pixels or, without boxes, of the frame as it is."""

    def __init__(self, subject: Subject) -> None:
        self._square = Square(subject.boxes)
        self._found: list[float] = []

    def update(self, moment: Moment) -> None:
        self._square.next()
        self._found.append(laplacian_variance(self._square.shown(moment.frame)))

    def result(self) -> Found:
        return {"vl": float(np.mean(self._found)) if self._found else Unavailable("there is no frame")}


def open_pictures(_: Path) -> Start:
    """PSNR and SSIM."""
    return Pictures


def open_sharpness(_: Path) -> Start:
    """The variance of the Laplacian."""
    return Sharpness
