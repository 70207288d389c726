"""Reading the mouths of the synthetic world from pixels: generated frames have no true landmarks.

A patch around the mouth is cut by the eyes of the source video, which speech does not move, and a small
convolutional network measures the inner lips in it. It knows this world's faces alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.backend import computing
from keysync_jax.errors import UserError
from keysync_jax.nn import functional as F
from keysync_jax.tensorfile import TensorFile
from keysync_jax.typing import Array, Params

PATCH = 48
"""Side of the patch in pixels."""

SIDE, TOP = 1.6, 0.7
"""Side of the patch, and its upper edge below the eyes, over the distance between the eye centres."""

BATCH = 64

WEIGHTS = Path(__file__).with_name("mouth_reader.safetensors")

MEAN, SPREAD = np.array([[0.3, 0.72, 0.36], [0.23, 0.15, 0.32]], np.float32)
"""Of opening, width and MAR in the training frames, rounded: what the network's outputs are relative to."""


class Mouths(NamedTuple):
    """Mouths of a video, float32 `[T]` each; no unit.

    Attributes:
      mar: mouth aspect ratio of the inner lips, as `synthetic.face.mouth_aspect_ratio`.
      opening: gap between the inner lips at the centre over the distance between the eye centres.
      width: distance of the inner corners of the mouth over the same.
    """

    mar: np.ndarray
    opening: np.ndarray
    width: np.ndarray


class MouthNetwork(nnx.Module):
    """Patches uint8 `[N, 48, 48, 3]` -> (opening, width, MAR), fp32 `[N, 3]`."""

    def __init__(self, *, rngs: nnx.Rngs):
        sizes = ((3, 16, 5, 2), (16, 32, 3, 2), (32, 32, 3, 1), (32, 48, 3, 2))
        self.convs = nnx.List(
            [nnx.Conv(a, b, (size, size), strides=stride, rngs=rngs) for a, b, size, stride in sizes]
        )
        self.hidden = nnx.Linear(48 * (PATCH // 8) ** 2, 48, rngs=rngs)
        self.out = nnx.Linear(48, 3, rngs=rngs)

    def __call__(self, patches: Array) -> Array:
        x = patches.astype(jnp.float32) / 127.5 - 1
        for conv in self.convs:
            x = nnx.relu(conv(x))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.out(x) * SPREAD + MEAN


def make_network(rngs: nnx.Rngs) -> MouthNetwork:
    """The network, for `nn.functional`."""
    return MouthNetwork(rngs=rngs)


class MouthReader:
    """Reads mouths from frames. `MouthReader.load()` gives the one that is shipped.

    Attributes:
      accuracy: its errors on people that it never saw, by name; see `mouth_training.measure`.
    """

    def __init__(self, params: Params, accuracy: Mapping[str, float]) -> None:
        graphdef, shapes = F.shapes(make_network)
        if {name: x.shape for name, x in params.items()} != {name: x.shape for name, x in shapes.items()}:
            raise ValueError("these are not the weights of a mouth reader")
        self.accuracy = dict(accuracy)
        self._params = {name: jnp.asarray(x) for name, x in params.items()}
        self._network = jax.jit(lambda weights, patches: F.bind(graphdef, weights)(patches))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "MouthReader":
        """The reader in a file.

        Raises:
          UserError: the file cannot be read, or is none of a mouth reader.
        """
        file = TensorFile(path)
        try:
            return cls(dict(file), json.loads(file.metadata["accuracy"]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: holds no mouth reader") from error

    def read(self, frames: Iterable[np.ndarray], landmarks: np.ndarray) -> Mouths:
        """Measure the mouth in each frame.

        Args:
          frames: uint8 RGB `[H, W, 3]`, of a dub or of anything else whose head is where the source's is.
          landmarks: finite `[T, 68, 2]` of the source video, pixels. Only the corners of the eyes are used.

        Raises:
          ValueError: there are more frames than landmarks, or fewer.
        """
        patches = [cut_patch(*pair) for pair in zip(frames, landmarks, strict=True)]
        return self.read_patches(np.stack(patches)) if patches else Mouths(*np.zeros((3, 0), np.float32))

    def read_patches(self, patches: np.ndarray) -> Mouths:
        """Measure the mouths in patches uint8 `[T, 48, 48, 3]`, as `cut_patch` gives them."""
        with computing("fp32"):
            outputs = [np.asarray(self._network(self._params, batch)) for batch in _batches(patches)]
        opening, width, mar = np.concatenate(outputs)[: len(patches)].T
        return Mouths(np.maximum(mar, 0), np.maximum(opening, 0), width)


def cut_patch(frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The mouth of a uint8 RGB frame `[H, W, 3]`, upright and in units of the eyes: uint8 `[48, 48, 3]`.

    landmarks: `[68, 2]`, pixels.
    """
    left, right = eye_centres(landmarks)
    axis = right - left
    # A patch of at least the frame's own resolution, averaged down: no aliasing, whatever the frame's size.
    finer = max(1, int(np.ceil(np.hypot(*axis) * SIDE / PATCH)))
    scale = finer * PATCH / SIDE
    turn = scale / (axis @ axis) * np.array([[axis[0], axis[1]], [-axis[1], axis[0]]])
    place = scale * np.array([SIDE / 2, -TOP]) - 0.5
    matrix = np.column_stack([turn, place - turn @ (left + right) / 2])
    size = (finer * PATCH, finer * PATCH)
    patch = cv2.warpAffine(frame, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(patch, (PATCH, PATCH), interpolation=cv2.INTER_AREA)


def eye_centres(landmarks: np.ndarray) -> np.ndarray:
    """Midpoints between the corners of each eye, from the picture's left: `[..., 68, 2]` to `[..., 2, 2]`.

    The corners, because blinks do not move them.
    """
    points = np.asarray(landmarks, np.float64)
    return (points[..., [36, 42], :] + points[..., [39, 45], :]) / 2


def eye_distance(landmarks: np.ndarray) -> np.ndarray:
    """Distance between the eye centres in pixels: `[..., 68, 2]` to `[...]`."""
    centres = eye_centres(landmarks)
    return np.linalg.norm(centres[..., 1, :] - centres[..., 0, :], axis=-1)


def _batches(patches: np.ndarray) -> Iterator[np.ndarray]:
    """Batches of one size, so that one program is compiled; the last one is filled with zeros."""
    for first in range(0, len(patches), BATCH):
        batch = patches[first : first + BATCH]
        yield np.concatenate([batch, np.zeros((BATCH - len(batch), *batch.shape[1:]), np.uint8)])
