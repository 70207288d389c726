"""What every report shows beside the systems: the real video, and the real video with a mouth that rests.

The real video with its own voice is the ceiling of sync, with a foreign voice the floor, and in silence a
mouth that leaks all of the source. The frozen mouth shows what is read of a mouth that never moves.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from keysync_jax.evaluation.inputs import Prepared
from keysync_jax.files import sha256_once
from keysync_jax.media.video import read_frames
from keysync_jax.media.writer import VideoWriter
from keysync_jax.synthetic.face import mouth_aspect_ratio

REAL, FROZEN = "real video", "frozen mouth"
ANCHORS = (REAL, FROZEN)

STEADY = (27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45)
"""Points that speech does not move: the nose and the corners of the eyes."""

MARGIN = 0.35
"""What is taken around the mouth, over its width; the outer half fades."""

QUALITY = 12


def frozen(clip: Prepared) -> Path | None:
    """The clip with the mouth of its most closed frame in all frames; None where its face is not known."""
    if clip.landmarks is None:
        return None
    path = clip.folder / f"{clip.clip.name}.{sha256_once(clip.clip.video)[:8]}.frozen.mp4"
    if not path.is_file():
        width, height = clip.size
        with VideoWriter(path, width, height, quality=QUALITY, preset="veryfast", threads=1) as writer:
            for frame in _frozen_frames(clip.video, clip.landmarks):
                writer.write(frame)
    return path


def _frozen_frames(video: Path, landmarks: np.ndarray) -> Iterator[np.ndarray]:
    still = int(np.argmin(np.nan_to_num(mouth_aspect_ratio(landmarks), nan=np.inf)))
    closed = next(frame for t, frame in enumerate(read_frames(video)) if t == still)
    # As wide as the mouth ever opens: the patch has to cover every open one.
    spread = _about_nose(landmarks) + landmarks[still, 30]
    fade = _fade(spread, closed.shape[:2])
    for t, frame in enumerate(read_frames(video)):
        yield _laid(frame, closed, fade, landmarks[still], landmarks[t])


def _about_nose(landmarks: np.ndarray) -> np.ndarray:
    """Box (low, high) of all mouths and chins about the tip of the nose: `[2, 2]`."""
    points = (landmarks - landmarks[:, 30:31])[:, [*range(48, 68)]]
    return np.stack([points.min(axis=(0, 1)), points.max(axis=(0, 1))])


def _fade(box: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """1 within a box, to 0 over its margin: float32 `[H, W, 1]`."""
    margin = MARGIN * (box[1, 0] - box[0, 0])
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    beyond = [
        np.maximum(np.maximum(low - at, at - high), 0)
        for at, low, high in zip((columns, rows), box[0], box[1], strict=True)
    ]
    outside = np.hypot(*beyond) / margin
    return np.clip(2 - 2 * outside, 0, 1).astype(np.float32)[..., None]


def _laid(
    frame: np.ndarray, closed: np.ndarray, fade: np.ndarray, source: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """A frame with the closed mouth laid over it where its face is."""
    found = cv2.estimateAffinePartial2D(source[[*STEADY]], target[[*STEADY]], method=cv2.LMEDS)
    matrix: np.ndarray | None = found[0]
    if matrix is None:
        return frame
    size = (frame.shape[1], frame.shape[0])
    moved = cv2.warpAffine(closed, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    share = cv2.warpAffine(fade, matrix, size, flags=cv2.INTER_LINEAR)[..., None]
    return np.rint(frame + share * (moved.astype(np.float32) - frame)).astype(np.uint8)
