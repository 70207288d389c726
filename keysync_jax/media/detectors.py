"""Landmark detectors: MediaPipe's Face Landmarker, and face-alignment (S3FD + 2DFAN-4, the paper's).

Both packages are imported only when their detector is made. Neither fetches anything by itself.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for, require
from keysync_jax.files import sha256_of
from keysync_jax.media.assets import ASSETS, resolve_asset
from keysync_jax.media.landmarks import Detector

DETECTORS = ("mediapipe", "face_alignment")

# Face Landmarker's mesh vertices that stand for the 68 points, in their order.
JAW = (162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389)
BROWS = (71, 63, 105, 66, 107, 336, 296, 334, 293, 301)
NOSE = (168, 197, 5, 4, 75, 97, 2, 326, 305)
EYES = (33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380)
LIPS = (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87)
MESH_TO_68 = JAW + BROWS + NOSE + EYES + LIPS

MAX_FACES = 5
SEARCH_SIDE = 3.0
"""Side of the square searched around the last face, in sizes of that face."""


def make_detector(name: str, model: Path | None = None, allow_download: bool = False) -> Detector:
    """Make the detector `name`, one of `DETECTORS`; `model` is a Face Landmarker file for "mediapipe".

    Raises UserError if its package is not installed, its weights are neither here nor may be fetched, or it
    takes no `model`.
    """
    if name == "mediapipe":
        with needed_for("the mediapipe detector"):
            require("mediapipe")  # Before its model is looked for, or fetched.
        return MediaPipeDetector(resolve_asset("face_landmarker", model, allow_download))
    if name == "face_alignment":
        if model is not None:
            raise UserError(f"{model}: the face_alignment detector takes no model file; leave it out")
        return FaceAlignmentDetector(allow_download)
    raise UserError(f"there is no landmark detector {name}; choose one of {', '.join(DETECTORS)}")


def detector_identity(name: str, model: Path | None = None) -> dict[str, str | None]:
    """What the landmarks of `make_detector(name, model)` depend on, without making it; JSON can hold it.

    The package's version, None where it is not installed; for "mediapipe" the SHA-256 of its model file too:
    of `model`, else of the one file that `resolve_asset` accepts. face-alignment's version says its files.

    Raises UserError if `model` cannot be read.
    """
    try:
        installed = version(name.replace("_", "-"))
    except PackageNotFoundError:
        installed = None
    if name != "mediapipe":
        return {"detector": name, "version": installed}
    weights = ASSETS["face_landmarker"].sha256 if model is None else sha256_of(model)
    return {"detector": name, "version": installed, "model": weights}


class MediaPipeDetector:
    """MediaPipe's Face Landmarker on still pictures, with a search window of its own.

    The model's face detector sees a frame at 128 x 128 and misses small faces, so a frame is searched first
    where the last face was, and only then as a whole and in overlapping squares. The largest face found there
    is followed until it is lost. Let go of the detector after use: MediaPipe cannot close while the
    interpreter exits.
    """

    def __init__(self, model: Path) -> None:
        with _loading("mediapipe"), _quiet_native_stderr():
            import mediapipe as mp
            from mediapipe.tasks.python import BaseOptions
            from mediapipe.tasks.python.vision import FaceLandmarker, FaceLandmarkerOptions
        self._mp = mp
        options = FaceLandmarkerOptions(BaseOptions(model_asset_path=str(model)), num_faces=MAX_FACES)
        try:
            with _loading("mediapipe"), _quiet_native_stderr():
                self._landmarker = FaceLandmarker.create_from_options(options)
                self._faces(np.zeros((128, 128, 3), np.uint8))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{model} is not a Face Landmarker model that this MediaPipe can load") from error
        self._last: np.ndarray | None = None

    def close(self) -> None:
        """Free the model. Left to the interpreter's end, MediaPipe prints an error of its own."""
        self._landmarker.close()

    def detect(self, frame: np.ndarray) -> np.ndarray | None:
        """Return float32 `[68, 2]` in pixels for a uint8 RGB frame `[H, W, 3]`, or None without a face."""
        found = None if self._last is None else self._follow(frame, self._last)
        if found is None and (coarse := self._search(frame)) is not None:
            finer = self._follow(frame, coarse)
            found = coarse if finer is None else finer
        self._last = self._last if found is None else found
        return found

    def _follow(self, frame: np.ndarray, last: np.ndarray) -> np.ndarray | None:
        """The face around `last` that lies nearest to it; its centre must lie inside the last face."""
        centre, extent = _centre(last), np.ptp(last, axis=0)
        half = SEARCH_SIDE / 2 * extent.max()
        x0, y0 = np.maximum(centre - half, 0).astype(int)
        x1, y1 = np.maximum(np.ceil(centre + half), 0).astype(int)
        faces = self._faces(frame[y0:y1, x0:x1], (x0, y0))

        def distance(face: np.ndarray) -> float:
            return float((np.abs(_centre(face) - centre) / extent).max())

        nearest = min(faces, key=distance, default=None)
        return nearest if nearest is not None and distance(nearest) <= 0.5 else None

    def _search(self, frame: np.ndarray) -> np.ndarray | None:
        """The largest face of the whole frame, else of the largest squares that show one."""
        faces = self._faces(frame)
        height, width = frame.shape[:2]
        for side in (min(height, width), min(height, width) // 2):
            if faces:
                break
            corners = [(x, y) for y in _tiles(height, side) for x in _tiles(width, side)]
            found = [self._faces(frame[y : y + side, x : x + side], (x, y)) for x, y in corners]
            faces = [face for tile in found for face in tile]
        return max(faces, key=lambda face: float(np.prod(np.ptp(face, axis=0))), default=None)

    def _faces(self, picture: np.ndarray, corner: tuple[int, int] = (0, 0)) -> list[np.ndarray]:
        """All faces of a picture whose upper left pixel is `corner` of the frame; float32 `[68, 2]` each."""
        height, width = picture.shape[:2]
        if min(height, width) < 16:
            return []
        image = self._mp.Image(image_format=self._mp.ImageFormat.SRGB, data=np.ascontiguousarray(picture))
        return [
            np.array([(face[i].x * width, face[i].y * height) for i in MESH_TO_68], np.float32)
            + np.array(corner, np.float32)
            for face in self._landmarker.detect(image).face_landmarks
        ]


def _centre(points: np.ndarray) -> np.ndarray:
    """Middle `[2]` of the bounding box of points `[N, 2]`."""
    return (points.min(axis=0) + points.max(axis=0)) / 2


def _tiles(length: int, side: int) -> list[int]:
    """Starts of the fewest windows of `side` that cover `length` with an overlap of at least half."""
    steps = -(-2 * (length - side) // side)
    return [round(i * (length - side) / steps) for i in range(steps + 1)] if steps else [0]


@contextmanager
def _quiet_native_stderr() -> Iterator[None]:
    """Keep the chatter of native code off the terminal; what goes wrong is raised as an exception."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        terminal = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _loading(detector: str) -> Iterator[None]:
    """The sentence for a package that is not installed, or whose native libraries are not there."""
    try:
        with needed_for(f"the {detector} detector"):
            yield
    except ImportError as error:
        raise UserError(f"the package {detector} cannot be loaded: {error}") from error
    except OSError as error:
        if error.errno is not None:  # Only what ctypes raises for a library has none.
            raise
        raise UserError(f"the package {detector} cannot be loaded: {error}") from error


class FaceAlignmentDetector:
    """The face-alignment package: S3FD finds the faces, 2DFAN-4 the landmarks of the largest one."""

    def __init__(self, allow_download: bool = False, device: str | None = None) -> None:
        with _loading("face_alignment"):
            import face_alignment
            import torch
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        for name in _face_alignment_weights(face_alignment):
            resolve_asset(name, allow_download=allow_download, folder=folder)
        network = face_alignment.FaceAlignment
        compiles = "compile" in inspect.signature(network).parameters
        self._network = network(
            face_alignment.LandmarksType.TWO_D,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            flip_input=False,
            **({"compile": False} if compiles else {}),
        )

    def close(self) -> None:
        """Nothing is held that needs closing."""

    def detect(self, frame: np.ndarray) -> np.ndarray | None:
        """Return float32 `[68, 2]` in pixels for a uint8 RGB frame `[H, W, 3]`, or None without a face."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No faces were detected")
            faces, _, boxes = self._network.get_landmarks_from_image(
                np.ascontiguousarray(frame), return_bboxes=True
            )
        if not faces:
            return None
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
        return np.asarray(faces[int(np.argmax(areas))], np.float32)[:, :2]


def _face_alignment_weights(package: ModuleType) -> list[str]:
    """Names in `ASSETS` of the two files that the installed version loads from torch's cache folder."""
    from face_alignment.detection.sfd import sfd_detector

    networks = getattr(package.api, "default_model_urls", package.api.models_urls)
    known = {asset.file_name: name for name, asset in ASSETS.items()}
    urls = (sfd_detector.models_urls["s3fd"], networks["2DFAN-4"])
    try:
        return [known[url.rsplit("/", 1)[1]] for url in urls]
    except KeyError as error:
        raise UserError(
            f"face-alignment {package.__version__} uses weights that are not known here: {error}"
        ) from error
