"""Metrics that other projects' networks compute, in PyTorch or ONNX: of an extra, on files the user brings.

Nothing is fetched: what would be is "not available". Every network is behind a function of pictures, so what
a meter does with them is tested without it. FID, CMMD and FVD keep features of the clip's frames, which
`distributions` compares.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np

from keysync_jax.errors import machine_fault
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.metrics.pictures import Square

Features = Callable[[np.ndarray], np.ndarray]
"""uint8 RGB `[N, H, W, 3]` -> float32 `[N, D]`."""

BATCH = 8

CLIP_SIDE = 336
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

VIDEO_FRAMES = 16
"""Frames of a clip that I3D looks at: consecutive, and the next ones begin after them."""

EVERY = 25
"""TOPIQ is asked for one frame in so many, the middle one: a face is found and laid straight in each."""

PATCH, PATCHES = 224, 3
"""HyperIQA's crops: pixels, and how many of the first, the middle and the last frame."""

ARCFACE_SIDE = 112
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where ArcFace has the eyes, the nose and the corners of the mouth."""


class PictureFeatures:
    """Keeps a network's features of every frame as a series; holds a batch of pictures.

    Args:
      name: of the series.
      prepared: makes of a frame's square what the network is given; all of one size.
    """

    def __init__(
        self, name: str, features: Features, prepared: Callable[[np.ndarray], np.ndarray], subject: Subject
    ) -> None:
        self._name, self._features, self._prepared = name, features, prepared
        self._square = Square(subject.boxes)
        self._waiting: list[np.ndarray] = []
        self._found: list[np.ndarray] = []

    def update(self, moment: Moment) -> None:
        self._square.next()
        self._waiting.append(self._prepared(self._square.cut(moment.frame)))
        if len(self._waiting) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._found.append(self._features(np.stack(self._waiting)))
            self._waiting = []

    def result(self) -> Found:
        self._flush()
        return {self._name: np.concatenate(self._found)} if self._found else {}


class VideoFeatures:
    """Keeps a network's features of every 16 frames; what is left at the end is not used."""

    def __init__(self, features: Features, subject: Subject) -> None:
        self._features, self._square = features, Square(subject.boxes)
        self._waiting: list[np.ndarray] = []
        self._found: list[np.ndarray] = []

    def update(self, moment: Moment) -> None:
        self._square.next()
        self._waiting.append(resized(self._square.cut(moment.frame), PATCH))
        if len(self._waiting) == VIDEO_FRAMES:
            self._found.append(self._features(np.stack(self._waiting)[None]))
            self._waiting = []

    def result(self) -> Found:
        return {"i3d": np.concatenate(self._found)} if self._found else {}


class FrameScores:
    """The mean of a network's scores of some frames.

    Args:
      name: of the metric.
      score: of a picture, uint8 RGB; None where it has none.
      chosen: numbers of the frames.
    """

    def __init__(
        self, name: str, score: Callable[[np.ndarray], float | None], chosen: set[int], subject: Subject
    ) -> None:
        self._name, self._score, self._chosen = name, score, chosen
        self._square, self._t = Square(subject.boxes), -1
        self._found: list[float] = []

    def update(self, moment: Moment) -> None:
        self._square.next()
        self._t += 1
        if self._t in self._chosen:
            score = self._score(self._square.shown(moment.frame))
            if score is not None:
                self._found.append(score)

    def result(self) -> Found:
        nothing = Unavailable("no frame has a score")
        return {self._name: float(np.mean(self._found)) if self._found else nothing}


class Likeness:
    """CSIM: the mean cosine of face features of the output and of the source at the same time."""

    def __init__(self, features: Features, subject: Subject) -> None:
        assert subject.landmarks is not None  # `Metric.needs` says so.
        assert subject.source_landmarks is not None
        self._features = features
        self._landmarks = subject.landmarks, subject.source_landmarks
        self._t = -1
        self._found: list[float] = []

    def update(self, moment: Moment) -> None:
        assert moment.source is not None
        self._t += 1
        points = [landmarks[self._t] for landmarks in self._landmarks]
        if not np.isfinite(points).all():
            return
        pictures = zip((moment.frame, moment.source), points, strict=True)
        a, b = self._features(np.stack([align_face(*pair) for pair in pictures])).astype(np.float64)
        self._found.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))

    def result(self) -> Found:
        nothing = Unavailable("no frame has a face in both videos")
        return {"csim": float(np.mean(self._found)) if self._found else nothing}


def align_face(frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """A face as ArcFace wants it: uint8 RGB `[H, W, 3]` and `[68, 2]` to uint8 `[112, 112, 3]`.

    By the similarity that brings eyes, nose and corners of the mouth nearest to their places.
    """
    points = np.stack(
        [landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0), *landmarks[[30, 48, 54]]]
    ).astype(np.float64)
    # As complex numbers the similarity is one factor and one shift, so least squares have a closed form.
    source, target = points @ [1, 1j], ARCFACE_POINTS @ [1, 1j]
    centred = source - source.mean()
    factor = np.vdot(centred, target - target.mean()) / np.vdot(centred, centred)
    shift = target.mean() - factor * source.mean()
    matrix = np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])
    return np.asarray(cv2.warpAffine(frame, matrix, (ARCFACE_SIDE, ARCFACE_SIDE), flags=cv2.INTER_LINEAR))


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle square of a picture, `[side, side, 3]`; means of pixels where it gets smaller."""
    square = middle(picture)
    shrinks = len(square) > side
    return np.asarray(
        cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    )


def middle(picture: np.ndarray) -> np.ndarray:
    """The middle square of a picture `[H, W, 3]`."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


@contextmanager
def offline() -> Iterator[None]:
    """In the block no connection can be made: libraries take what their caches have, or fail."""

    def refuse(*_: Any) -> NoReturn:
        raise ConnectionRefusedError("something would be fetched")

    connect = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]


def open_inception(weights: Path) -> Start:
    """FID's features: Inception 2015-12-05 with the resizing of its TensorFlow original."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = str(weights / "weights-inception-2015-12-05-6726825d.pth")
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
    )

    def features(pictures: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(_channels_first(pictures)))[0].numpy())

    # One size, so that a face's box may change its own; the network has 299 pixels.
    return lambda subject: PictureFeatures("inception", features, lambda x: resized(x, 299), subject)


def open_clip(weights: Path) -> Start:
    """CMMD's embeddings: CLIP ViT-L/14 at 336 pixels."""
    import torch
    from PIL import Image
    from transformers import CLIPVisionModelWithProjection

    folder = weights / "clip-vit-large-patch14-336"
    network = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True).eval()

    def prepared(picture: np.ndarray) -> np.ndarray:
        square = Image.fromarray(middle(picture))
        return np.asarray(square.resize((CLIP_SIDE, CLIP_SIDE), Image.Resampling.BICUBIC))

    def features(pictures: np.ndarray) -> np.ndarray:
        x = (pictures.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(_channels_first(x))).image_embeds.numpy())

    return lambda subject: PictureFeatures("clip", features, prepared, subject)


def open_i3d(weights: Path) -> Start:
    """FVD's features: the 400 logits of StyleGAN-V's I3D. The file is a program; it runs here."""
    import torch

    network = torch.jit.load(str(weights / "i3d_torchscript.pt"), map_location="cpu").eval()

    def features(clips: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(clips.transpose(0, 4, 1, 2, 3)).astype(np.float32))
        with torch.no_grad():
            return np.asarray(network(x, rescale=True, resize=True, return_features=True).numpy())

    return lambda subject: VideoFeatures(features, subject)


def open_topiq(_: Path) -> Start | Unavailable:
    """TOPIQ for faces, with the weights of the paper's version of pyiqa."""
    import torch

    network = _pyiqa("topiq_nr-face-v1")
    if isinstance(network, Unavailable):
        return network

    def score(picture: np.ndarray) -> float | None:
        x = torch.from_numpy(_channels_first(picture[None]).astype(np.float32) / 255)
        try:
            with torch.no_grad():
                return float(network(x))
        except AssertionError:
            return None  # It found no face.

    def start(subject: Subject) -> FrameScores:
        chosen = set(range(min(EVERY // 2, max(subject.frames - 1, 0)), subject.frames, EVERY))
        return FrameScores("topiq", score, chosen, subject)

    return start


def open_hyperiqa(_: Path) -> Start | Unavailable:
    """HyperIQA, of three seeded crops of the first, the middle and the last frame."""
    import torch

    network = _pyiqa("hyperiqa")
    if isinstance(network, Unavailable):
        return network

    def score(picture: np.ndarray) -> float | None:
        crops = random_patches(picture)
        x = torch.from_numpy(_channels_first(np.stack(crops)).astype(np.float32) / 255)
        with torch.no_grad():
            return float(network.net.forward_patch(x).mean())

    def start(subject: Subject) -> FrameScores:
        chosen = {0, subject.frames // 2, subject.frames - 1}
        return FrameScores("hyperiqa", score, chosen, subject)

    return start


def open_arcface(weights: Path) -> Start:
    """CSIM's features: ArcFace in ONNX, 512 wide."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(weights / "w600k_r50.onnx"), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def features(faces: np.ndarray) -> np.ndarray:
        x = _channels_first((faces.astype(np.float32) - 127.5) / 127.5)
        return np.asarray(session.run(None, {name: x})[0])

    return lambda subject: Likeness(features, subject)


def random_patches(picture: np.ndarray, seed: int = 0) -> Sequence[np.ndarray]:
    """Three crops of 224 pixels of a picture `[H, W, 3]`, which is enlarged if it has fewer."""
    shortest = min(picture.shape[:2])
    if shortest < PATCH:
        scale = PATCH / shortest
        size = (max(PATCH, round(picture.shape[1] * scale)), max(PATCH, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    rng = np.random.default_rng(seed)
    height, width = (side - PATCH + 1 for side in picture.shape[:2])
    corners = [(int(rng.integers(height)), int(rng.integers(width))) for _ in range(PATCHES)]
    return [picture[y : y + PATCH, x : x + PATCH] for y, x in corners]


def _pyiqa(name: str) -> Any:
    """A network of pyiqa on the CPU, from the files in its own caches."""
    import pyiqa

    try:
        with offline():
            return pyiqa.create_metric(name, device="cpu")
    except Exception as error:  # Whatever its many libraries raise where a file cannot be fetched.
        if machine_fault(error) is not None:
            raise
        fetch = f"python -c \"import pyiqa; pyiqa.create_metric('{name}')\""
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return Unavailable(
            f"pyiqa's files of {name} are not in its cache; get them with {fetch} ({first_line})"
        )


def _channels_first(pictures: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
