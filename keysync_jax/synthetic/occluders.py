"""Things that pass in front of the lower face: a hand or a microphone."""

from dataclasses import dataclass

import cv2
import numpy as np

from keysync_jax.synthetic.canvas import Canvas, curve, ellipse
from keysync_jax.synthetic.identity import Colour, Identity, mix
from keysync_jax.synthetic.motion import FPS

KINDS = ("hand", "microphone")
FAINTEST = 8
"""Alpha (of 255) below which an occluder's soft edge is cut off, so that the mask is exact."""

SPRITE = 150.0
"""Side of the square that an occluder is painted on, face units; its reference point is the middle."""


@dataclass(frozen=True)
class Occluder:
    """What passes and its track, float32 `[T]`, in pixels of a 256 x 256 picture.

    Attributes:
      kind: "hand" or "microphone".
      colour: of the microphone's body or the sleeve.
      x: place of the reference point (middle of the palm, or of the microphone's head).
      y: the same, downwards.
      turn: radians, clockwise.
      scale: factor on its size.
    """

    kind: str
    colour: Colour
    x: np.ndarray
    y: np.ndarray
    turn: np.ndarray
    scale: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def draw_occluder(rng: np.random.Generator, frames: int) -> Occluder:
    """Draw an occluder that enters from below, covers part of the mouth for a while and leaves again."""
    kind = str(rng.choice(KINDS))
    side = float(rng.choice((-1.0, 1.0)))
    rest = np.array([128 + side * rng.uniform(0, 14), rng.uniform(158, 176)])
    away = np.array([128 + side * rng.uniform(40, 90), 256 + SPRITE / 2])
    time = np.arange(frames, dtype=np.float64)
    enter, leave = frames * rng.uniform(0.12, 0.3), frames * rng.uniform(0.65, 0.9)
    pace = FPS * rng.uniform(0.06, 0.14)
    there = 1 / (1 + np.exp((enter - time) / pace)) / (1 + np.exp((time - leave) / pace))
    place = away + (rest - away) * there[:, None]
    phase, speed = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.4, 1.2, 3)
    sway = np.sin(2 * np.pi * speed * time[:, None] / FPS + phase)
    tilt = -side * rng.uniform(0.1, 0.5)
    colour = tuple(float(c) for c in rng.uniform(30, 90, 3))
    return Occluder(
        kind,
        (colour[0], colour[1], colour[2]),
        (place[:, 0] + 5 * sway[:, 0]).astype(np.float32),
        (place[:, 1] + 4 * sway[:, 1]).astype(np.float32),
        (tilt + 0.08 * sway[:, 2]).astype(np.float32),
        np.full(frames, rng.uniform(0.85, 1.1), np.float32),
    )


class OccluderPainter:
    """Paints an occluder over pictures of a size."""

    def __init__(self, occluder: Occluder, who: Identity, size: int) -> None:
        self.occluder, self.size, self.detail = occluder, size, 2 * size / 256
        canvas = Canvas(self.detail, -SPRITE / 2, -SPRITE / 2, SPRITE, 2.2 * SPRITE)
        if occluder.kind == "hand":
            _paint_hand(canvas, who.skin, occluder.colour)
        else:
            _paint_microphone(canvas, occluder.colour)
        self.sprite = canvas.picture()

    def paint(self, pixels: np.ndarray, t: int) -> np.ndarray:
        """Paint frame t over uint8 `[S, S, 3]`, in place; its mask, uint8 `[S, S]`."""
        track, unit = self.occluder, self.size / 256
        k = track.scale[t] * unit / self.detail
        cos, sin = k * np.cos(track.turn[t]), k * np.sin(track.turn[t])
        linear = np.array([[cos, -sin], [sin, cos]])
        middle = np.full(2, self.detail * SPRITE / 2)
        shift = unit * np.array([track.x[t], track.y[t]]) - linear @ middle
        layer = cv2.warpAffine(self.sprite, np.column_stack([linear, shift]), (self.size, self.size))
        layer[layer[..., 3] < FAINTEST] = 0
        through = 255 - layer[..., 3:].astype(np.int32)
        pixels[:] = np.minimum(layer[..., :3] + (pixels * through + 127) // 255, 255)
        return (layer[..., 3] > 0).astype(np.uint8)


def _paint_hand(canvas: Canvas, skin: Colour, sleeve: Colour) -> None:
    """The back of a hand, fingers up."""
    dark = mix(skin, (70, 20, 30), 0.4)
    arm = np.array([(-17, 26), (17, 26), (24, 250), (-24, 250)], float)
    canvas.paint(canvas.mask(arm), skin)
    canvas.paint(canvas.mask(arm * (1.3, 1) + np.array([0.0, 44.0])), sleeve)
    fingers = [
        _finger(-17, -14, -0.16, 34),
        _finger(-6, -19, -0.05, 41),
        _finger(6, -18, 0.05, 38),
        _finger(17, -12, 0.17, 30),
    ]
    thumb = _finger(-17, 20, -0.75, 30)
    palm = curve(
        np.array([(-23, -12), (0, -20), (23, -10), (24, 12), (17, 34), (-17, 34), (-25, 14)]), 8, True
    )
    for finger in (thumb, *fingers):
        canvas.paint(canvas.mask(finger + np.array([0.6, 0.0])), dark)
        canvas.paint(canvas.mask(curve(finger, 2, True) * 0.985 + finger.mean(0) * 0.015), skin)
    canvas.paint(canvas.mask(palm), skin)
    canvas.tint(0.35 * canvas.blob(12, 16, 22, 26), dark)
    for x, y in ((-17, -13), (-6, -18), (6, -17), (17, -11)):
        canvas.tint(0.35 * canvas.blob(x, y, 4, 2.5), dark)


def _finger(x: float, y: float, lean: float, length: float) -> np.ndarray:
    tip = x + length * np.sin(lean), y - length * np.cos(lean)
    across = 5.6 * np.array([np.cos(lean), np.sin(lean)])
    turn = np.linspace(np.pi, 2 * np.pi, 12) + lean
    cap = np.stack([tip[0] + 5.2 * np.cos(turn), tip[1] + 5.2 * np.sin(turn)], -1)
    return np.concatenate([[(x - across[0], y - across[1] + 6)], cap, [(x + across[0], y + across[1] + 6)]])


def _paint_microphone(canvas: Canvas, colour: Colour) -> None:
    """A round head with a grid, a ring and a stem."""
    stem = np.array([(-9, 22), (9, 22), (6.5, 250), (-6.5, 250)], float)
    canvas.paint(canvas.mask(stem), colour)
    canvas.tint(
        0.4 * canvas.line(np.array([(-3.0, 24), (-2.5, 250)]), thickness=2.5, soft=1.0), (255, 255, 255)
    )
    ball = curve(
        np.array(
            [(0, -25), (17, -18), (22, -2), (16, 16), (9, 24), (-9, 24), (-16, 16), (-22, -2), (-17, -18)]
        ),
        8,
        True,
    )
    head = canvas.mask(ball)
    canvas.paint(head, (112, 114, 122))
    canvas.tint(0.7 * head * np.clip(0.4 + canvas.x / 50 + canvas.y / 60, 0, 1), (40, 40, 50))
    lines = [np.array([(x, -40.0), (x + 40.0 * s, 40.0)]) for x in range(-60, 70, 7) for s in (-1, 1)]
    canvas.tint(0.5 * head * canvas.line(*lines, thickness=0.8, soft=0.3), (190, 192, 200))
    canvas.tint(0.6 * head * canvas.blob(-8, -12, 8, 7), (235, 236, 240))
    canvas.tint(0.9 * canvas.mask(ellipse(0, 20, 13, 3.2)), (60, 60, 66))
