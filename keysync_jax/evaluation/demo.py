"""The embedded model at work: dubs a synthetic clip of an unseen person; the job behind `keysync demo`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from keysync_jax.evaluation.pairs import Pair, dubs_digest
from keysync_jax.evaluation.synth_eval import Scores, measure
from keysync_jax.files import copy_file, make_folder
from keysync_jax.media.crop import landmarks_in_crop
from keysync_jax.media.masks import SIZE as MASK_SIZE
from keysync_jax.media.masks import make_mask, to_latent
from keysync_jax.media.writer import VideoWriter
from keysync_jax.metrics.mouth import MouthReader
from keysync_jax.model import Model
from keysync_jax.pipeline.phases import Phases

SEED = 2_000_003
"""World of the demo: its people are in no training set."""

SECONDS = 5.0

LABEL_ROWS = 28
TINT = np.array([60, 130, 255])


@dataclass(frozen=True)
class DemoReport:
    """What `demo` wrote and measured."""

    dub: Path
    side_by_side: Path
    scores: Scores
    phases: Phases


def demo(
    model: Model, output: str | Path, number: int = 0, seconds: float = SECONDS, show_progress: bool = False
) -> DemoReport:
    """Dubs a synthetic clip with another person's voice and measures the result.

    Args:
      output: folder; `dubbed.mp4` and `side_by_side.mp4` (source, mask, dub, truth) are written into it, and
        in `clips` the clip, its truth and the voices.
      number: of the pair; each has another person.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    output, phases = Path(output), Phases(show=show_progress)
    folder = _settle(output, model, number, seconds)
    with phases.phase("clip", 1, "clips") as advance:
        pair = Pair(folder / "clips", SEED, number, seconds)
        advance(1)
    with phases.phase("dub", 2, "dubs") as advance:
        scores = measure(model, [pair], folder, MouthReader.load(), advance, vae=True)
    frames = pair.dubbed(model, folder / f"{number:05d}.mp4")
    dubbed, side = output / "dubbed.mp4", output / "side_by_side.mp4"
    copy_file(folder / f"{number:05d}.mp4", dubbed)
    with phases.phase("side by side", len(frames), "frames") as advance:
        rows = side_by_side(pair, frames, model)
        first = next(rows)
        height, width = first.shape[:2]
        with VideoWriter(side, width, height, pair.voice) as writer:
            for row in (first, *rows):
                writer.write(row)
                advance(1)
    return DemoReport(dubbed, side, scores, phases)


def _settle(output: Path, model: Model, number: int, seconds: float) -> Path:
    """The folder of this demo's clips and dubs; another model, world or code has another one."""
    folder = output / f"pair-{number:05d}-{seconds:g}s-{dubs_digest(model)}"
    make_folder(output)
    make_folder(folder)
    return folder


def side_by_side(pair: Pair, dubbed: np.ndarray, model: Model) -> Iterator[np.ndarray]:
    """Frames with four pictures each: source, mask, dub, truth.

    Args:
      dubbed: uint8 `[T, S, S, 3]`.

    Yields:
      uint8 `[S + 28, 4 S, 3]`.
    """
    size = pair.original.shape[1]
    label = _labels(("source", "mask", "dub", "truth"), size)
    points = landmarks_in_crop(pair.unsaid.landmarks, pair.boxes, MASK_SIZE)
    for t, frame in enumerate(pair.original):
        mask = to_latent(make_mask(points[t : t + 1], model.config.mask), model.config.keyframe.latent_size)[
            0
        ]
        row = np.hstack([frame, _tinted(frame, mask, pair.boxes[t]), dubbed[t], pair.spoken.frames[t]])
        yield np.vstack([label, row])


def _tinted(frame: np.ndarray, mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The frame with the cells that are generated in blue."""
    x0, y0, x1, y1 = (int(v) for v in box)
    grown = cv2.resize(mask, (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST).astype(bool)
    shown = frame.copy()
    inside = shown[y0:y1, x0:x1]
    inside[grown] = (0.45 * inside[grown] + 0.55 * TINT).astype(np.uint8)
    return shown


def _labels(words: tuple[str, ...], size: int) -> np.ndarray:
    bar = np.full((LABEL_ROWS, size * len(words), 3), 24, np.uint8)
    for i, word in enumerate(words):
        place = (i * size + 8, LABEL_ROWS - 9)
        cv2.putText(bar, word, place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, (235, 235, 235), 1, cv2.LINE_AA)
    return bar
