"""Stills of one clip side by side: every system in every run, at the moment when the real mouth is widest."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from keysync_jax.evaluation.anchors import ANCHORS, REAL
from keysync_jax.evaluation.evaluate import Evaluation
from keysync_jax.evaluation.protocol import references_of
from keysync_jax.media.crop import crop_frame, crop_track
from keysync_jax.media.video import read_frames

SIDE = 192
QUALITY = 82


@dataclass(frozen=True)
class Still:
    """A frame of a dub, cut around the face."""

    system: str
    cell: str
    clip: str
    frame: int
    jpeg: bytes


def stills(evaluation: Evaluation) -> list[Still]:
    """The stills of the clip whose MAR the report shows, else of the first that every system has."""
    clip = _clip(evaluation)
    if clip is None:
        return []
    at = _moment(evaluation, clip)
    return list(_taken(evaluation, clip, at))


def _clip(evaluation: Evaluation) -> str | None:
    if evaluation.content["mar"]:
        return str(evaluation.content["mar"]["clip"])
    systems = {system for system, _, _ in evaluation.videos}
    for name in evaluation.content["clips"]:
        if systems and all(any((s, name) == (a, c) for a, _, c in evaluation.videos) for s in systems):
            return str(name)
    return None


def _moment(evaluation: Evaluation, clip: str) -> int:
    """Where the mouth of the real video is widest; the middle where that was not read."""
    cells = (evaluation.content["mar"] or {"systems": {}})["systems"].get(REAL, {})
    shortest = min((len(mar) for mar in cells.values()), default=0)
    if shortest:
        mar = next(iter(cells.values()))[:shortest]
        return int(np.argmax([-1 if x is None else x for x in mar]))
    return int(evaluation.content["clips"][clip]["frames"]) // 2


def _taken(evaluation: Evaluation, clip: str, at: int) -> Iterator[Still]:
    prepared = evaluation.inputs[clip]
    width, height = prepared.size
    box = np.array([0, 0, width, height])
    if prepared.landmarks is not None:
        box = crop_track(prepared.landmarks, np.ones(prepared.frames, bool), height, width)[at]
    kept: dict[str, bytes] = {}
    first = references_of(evaluation.content["protocol"])[0]
    for (system, cell, name), video in evaluation.videos.items():
        if name != clip or (system in ANCHORS and not cell.endswith(first)):
            continue
        if str(video) not in kept:
            frame = next(islice(read_frames(video), at, None), None)
            kept[str(video)] = b"" if frame is None else _jpeg(crop_frame(frame, box, SIDE))
        if kept[str(video)]:
            yield Still(system, cell, clip, at, kept[str(video)])


def _jpeg(picture: np.ndarray) -> bytes:
    _, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return encoded.tobytes()
