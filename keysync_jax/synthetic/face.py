"""A talking head in two dimensions: pictures and exact landmarks from identity, motion and articulation."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.synthetic import hair, portrait
from keysync_jax.synthetic.articulation import Articulation
from keysync_jax.synthetic.canvas import (
    Layer,
    band,
    between,
    close_window,
    disc,
    ellipse,
    lay,
    open_window,
    stroke,
)
from keysync_jax.synthetic.identity import SHADOW, Identity, mix
from keysync_jax.synthetic.motion import Motion
from keysync_jax.synthetic.mouth import JAW_SHARE, Mouth, paint_mouth, shape_mouth
from keysync_jax.synthetic.occluders import Occluder, OccluderPainter

CENTRE = (128.0, 132.0)
"""Where the middle of the face is in a 256 x 256 picture."""

TURN, NOD = 7.0, 5.0
"""Parallax at full yaw and pitch: how far the middle of the face shifts, in face units."""

HALF_WIDTH, HALF_HEIGHT, LEVEL = 72.0, 110.0, -12.0
"""How far from the middle of the head (which is at height `LEVEL`) the parallax ends."""

FINER = 4
"""How much finer the glasses are drawn."""

BODY_FOLLOWS = 0.45
"""Share of the head's shift that the shoulders follow."""


class Picture(NamedTuple):
    """One frame and what is known about it.

    pixels: uint8 `[S, S, 3]`, RGB. landmarks: float32 `[68, 2]`, pixels, iBUG order (0-16 jaw, 17-26 brows,
    27-35 nose, 36-47 eyes, 48-59 outer and 60-67 inner lips, all from the picture's left). mouth_gap:
    distance of the inner lips at the centre, mouth_width: of the inner corners, both in pixels. occluder:
    uint8 `[S, S]`, 1 where something covers the face.
    """

    pixels: np.ndarray
    landmarks: np.ndarray
    mouth_gap: float
    mouth_width: float
    occluder: np.ndarray


def mouth_aspect_ratio(landmarks: np.ndarray) -> np.ndarray:
    """Mean of the three gaps between the inner lips over their width: `[..., 68, 2]` to `[...]`."""
    inner = np.asarray(landmarks, np.float64)[..., 60:68, :]
    gaps = np.linalg.norm(inner[..., 1:4, :] - inner[..., [7, 6, 5], :], axis=-1)
    return gaps.mean(axis=-1) / np.linalg.norm(inner[..., 0, :] - inner[..., 4, :], axis=-1)


def render(
    identity: Identity,
    motion: Motion,
    articulation: Articulation,
    size: int = 256,
    occluder: Occluder | None = None,
) -> Iterator[Picture]:
    """Render a clip, frame by frame; deterministic.

    Args:
      identity: who and where.
      motion: movement of the head, `[T]`.
      articulation: the mouth, `[T]`.
      size: side of the square picture, pixels.
      occluder: something that moves in front of the face, `[T]`.

    Raises:
      ValueError: if the tracks are not of the same length.
    """
    if len(motion) != len(articulation) or (occluder is not None and len(occluder) != len(motion)):
        raise ValueError(
            f"tracks of different lengths: motion {len(motion)}, articulation {len(articulation)}"
        )
    painter = FacePainter(identity, size)
    front = None if occluder is None else OccluderPainter(occluder, identity, size)
    for t in range(len(motion)):
        picture = painter.frame(motion, articulation, t)
        yield picture if front is None else picture._replace(occluder=front.paint(picture.pixels, t))


class Pose(NamedTuple):
    """From face units to pixels in one frame: jaw, then parallax, then scale, turn and shift."""

    matrix: np.ndarray
    scale: float
    yaw: float
    pitch: float
    jaw: float
    jaw_top: float
    jaw_length: float

    def lower(self, points: np.ndarray) -> np.ndarray:
        """Points of the closed face where the jaw takes them."""
        down = self.jaw * np.clip((points[:, 1] - self.jaw_top) / self.jaw_length, 0, 1)
        return points + np.stack([np.zeros_like(down), down], -1)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Points of the face (jaw already lowered) in pixels."""
        seen = np.empty((len(points), 2))
        seen[:, 0] = _push(points[:, 0], self.yaw * TURN, HALF_WIDTH)
        seen[:, 1] = _push(points[:, 1] - LEVEL, self.pitch * NOD, HALF_HEIGHT) + LEVEL
        return seen @ self.matrix[:, :2].T + self.matrix[:, 2]

    def place_all(self, *lines: np.ndarray) -> list[np.ndarray]:
        """Several polylines in pixels, at the price of one."""
        placed, start = self.place(np.concatenate(lines)), 0
        split = []
        for line in lines:
            split.append(placed[start : start + len(line)])
            start += len(line)
        return split

    def source(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the closed face, in face units, the picture's pixels lie: the inverse of the above."""
        back = cv2.invertAffineTransform(self.matrix).astype(np.float32)
        x = back[0, 0] * columns + back[0, 1] * rows + back[0, 2]
        y = back[1, 0] * columns + back[1, 1] * rows + back[1, 2]
        x -= self.yaw * TURN * np.maximum(1 - (x / HALF_WIDTH) ** 2, 0)
        y -= self.pitch * NOD * np.maximum(1 - ((y - LEVEL) / HALF_HEIGHT) ** 2, 0)
        return x, y - self.jaw * np.clip((y - self.jaw_top) / (self.jaw_length + self.jaw), 0, 1)


def _push(at: np.ndarray, reach: float, end: float) -> np.ndarray:
    """Solve seen = at + reach (1 - (seen / end)^2) for what lies within the end; the rest stays."""
    bend = reach / end**2
    within = np.minimum(np.maximum(at, -end), end)
    pushed = within + reach
    return at - within + 2 * pushed / (1 + np.sqrt(1 + 4 * bend * pushed))


class FacePainter:
    """Paints the frames of one identity; what stays is painted once."""

    def __init__(self, who: Identity, size: int) -> None:
        self.who, self.size, self.unit = who, size, size / 256
        self.detail = 2 * self.unit
        self.background = portrait.paint_background(who, size)
        self.body = portrait.paint_body(who, self.detail)
        self.back_hair = hair.paint_back_hair(who, self.detail)
        self.head = portrait.paint_head(who, self.detail)
        self.frames = _glasses(who)
        self.jaw_line = portrait.jaw_line(who)
        self.columns, self.rows = np.meshgrid(
            np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32)
        )

    def frame(self, motion: Motion, articulation: Articulation, t: int) -> Picture:
        """Paint frame t."""
        who = self.who
        opening, teeth = float(articulation.opening[t]), float(articulation.teeth[t])
        mouth = shape_mouth(who, opening, float(articulation.width[t]), float(articulation.rounding[t]))
        pose = self.pose(motion, t, mouth)
        image = self._layers(pose, motion, t)
        eyes, brows = self._eyes_and_brows(image, pose, motion, t)
        top, upper, lower, bottom = pose.place_all(*mouth[:4])
        placed = mouth._replace(upper_outer=top, upper_inner=upper, lower_inner=lower, lower_outer=bottom)
        self._creases(image, pose, mouth)
        paint_mouth(image, placed, who, opening, teeth, pose.scale)
        self._glasses(image, pose)
        if motion.flicker[t] != 1:
            cv2.convertScaleAbs(image, image, alpha=float(motion.flicker[t]))
        nose = pose.place(_nose_points(who))
        jaw = pose.place(pose.lower(self.jaw_line))
        points = np.concatenate([jaw, brows, nose, eyes, placed.landmarks()]).astype(np.float32)
        gap, width = np.linalg.norm(points[62] - points[66]), np.linalg.norm(points[60] - points[64])
        return Picture(image, points, float(gap), float(width), np.zeros((self.size, self.size), np.uint8))

    def pose(self, motion: Motion, t: int, mouth: Mouth) -> Pose:
        """Where the face is in frame t."""
        who = self.who
        scale = self.unit * who.camera * float(motion.scale[t])
        cos, sin = scale * np.cos(motion.roll[t]), scale * np.sin(motion.roll[t])
        x, y = self.unit * (CENTRE[0] + motion.x[t]), self.unit * (CENTRE[1] + motion.y[t])
        matrix = np.array([[cos, -sin, x], [sin, cos, y]], np.float64)
        length = who.chin_y - who.mouth_y
        drop = JAW_SHARE * mouth.gap
        return Pose(matrix, scale, float(motion.yaw[t]), float(motion.pitch[t]), drop, who.mouth_y, length)

    def _layers(self, pose: Pose, motion: Motion, t: int) -> np.ndarray:
        """Background, back hair, body and head over each other: uint8 `[S, S, 3]`."""
        image = self.background.copy()
        if self.back_hair is not None:
            self._lay_rigid(image, self.back_hair, pose.matrix)
        k = self.unit * self.who.camera
        x = self.unit * (CENTRE[0] + BODY_FOLLOWS * motion.x[t])
        y = self.unit * (CENTRE[1] + BODY_FOLLOWS * motion.y[t])
        self._lay_rigid(image, self.body, np.array([[k, 0, x], [0, k, y]]))
        left, top, right, bottom = self._bounds(
            self.head.box + np.array([-TURN, -NOD, TURN, NOD + pose.jaw]), pose.matrix
        )
        area = slice(top, bottom), slice(left, right)
        x, y = pose.source(self.columns[area], self.rows[area])
        x -= self.head.left
        y -= self.head.top
        x *= self.detail
        y *= self.detail
        _lay(image[area], cv2.remap(self.head.picture, x, y, cv2.INTER_LINEAR))
        return image

    def _lay_rigid(self, image: np.ndarray, layer: Layer, matrix: np.ndarray) -> None:
        """Lay a layer that only moves, turns and grows over the picture."""
        left, top, right, bottom = self._bounds(layer.box, matrix)
        linear = matrix[:, :2] / self.detail
        shift = matrix[:, :2] @ np.array([layer.left, layer.top]) + matrix[:, 2] - (left, top)
        size = right - left, bottom - top
        warped = cv2.warpAffine(layer.picture, np.column_stack([linear, shift]), size, flags=cv2.INTER_LINEAR)
        _lay(image[top:bottom, left:right], warped)

    def _bounds(self, box: np.ndarray, matrix: np.ndarray) -> tuple[int, int, int, int]:
        """The part of the picture (left, top, right, bottom) that a box in face units may cover."""
        corners = box[[[0, 1], [2, 1], [2, 3], [0, 3]]] @ matrix[:, :2].T + matrix[:, 2]
        low, high = np.floor(corners.min(0)) - 1, np.ceil(corners.max(0)) + 2
        left, top = np.clip(low, 0, self.size - 1).astype(int)
        right, bottom = np.clip(high, 1, self.size).astype(int)
        return int(left), int(top), int(right), int(bottom)

    def _eyes_and_brows(
        self, image: np.ndarray, pose: Pose, motion: Motion, t: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Paint eyes and brows; their landmarks 36-47 and 17-26 in pixels."""
        gaze = float(motion.gaze_x[t]), float(motion.gaze_y[t])
        eyes, brows = [], []
        for sign in (-1, 1):
            eyes.append(self._paint_eye(image, pose, sign, float(motion.blink[t]), gaze))
            ridge, top, bottom = pose.place_all(*_brow(self.who, sign, float(motion.brow[t])))
            view, patch, corner = open_window(image, np.concatenate([top, bottom]), 3)
            band(patch, self.who.brow, top - corner, bottom - corner)
            close_window(view, patch)
            brows.append(ridge)
        return np.concatenate(eyes), np.concatenate(brows)

    def _paint_eye(
        self, image: np.ndarray, pose: Pose, sign: int, blink: float, gaze: tuple[float, float]
    ) -> np.ndarray:
        """Paint one eye; its six landmarks in pixels."""
        who, unit = self.who, self.unit
        x, y = sign * who.eye_spacing + 2.6 * gaze[0], portrait.EYE_Y + 1.6 * gaze[1]
        glint = np.array([[x, y], [x + 1.6 * np.cos(who.light), y - 1.9]])
        upper, lower, centres = pose.place_all(*_eye_contour(who, sign, blink), glint)
        points = np.concatenate([upper[[0, 4, 8, 12]], lower[[8, 4]]])
        view, patch, corner = open_window(image, np.concatenate([upper, lower]), round(6 * unit))
        upper, lower, centres = upper - corner, lower - corner, centres - corner
        inside, shape = np.full_like(patch, 245.0), patch.shape[1:]
        for share, colour in (
            (1.0, mix(who.eye, (20, 16, 20), 0.55)),
            (0.84, who.eye),
            (0.45, (22.0, 18.0, 22.0)),
        ):
            lay(inside, colour, disc(centres[0], share * 0.52 * who.eye_size * pose.scale, shape))
        lay(inside, (255.0, 255.0, 255.0), disc(centres[1], 1.3 * pose.scale, shape))
        band(patch, inside, upper, lower)
        lash, thin = hair.lash_colour(who), np.array([0.0, unit])
        crease = upper[2:-2] - 3.2 * thin
        band(patch, mix(who.skin, SHADOW, 0.35), crease - 0.5 * thin, crease + 0.5 * thin)
        band(patch, mix(who.skin, lash, 0.35), lower[2:-2], lower[2:-2] + thin)
        band(patch, lash, upper - 1.4 * thin, upper + 0.6 * thin)
        close_window(view, patch)
        return points

    def _creases(self, image: np.ndarray, pose: Pose, mouth: Mouth) -> None:
        """Folds beside the mouth and the shadow under the lower lip; deeper the more the mouth does."""
        who, half = self.who, mouth.half
        low = float(mouth.lower_outer[:, 1].max())
        folds = [
            _bend(
                (s * 1.15 * who.nose_width, who.nose_y - 2),
                (s * (0.6 * half + 0.8 * who.nose_width), 0.4 * who.nose_y + 0.6 * who.mouth_y - 4),
                (s * (half + 5), who.mouth_y + 0.25 * mouth.gap),
            )
            for s in (-1, 1)
        ]
        lines = pose.place_all(*folds, _bend((-0.5 * half, low + 2), (0, low + 6), (0.5 * half, low + 2)))
        view, patch, corner = open_window(image, np.concatenate(lines), round(8 * self.unit))
        depth = 110 + 110 * min(1.0, mouth.gap / who.mouth_width)
        drawn = np.zeros(view.shape[:2], np.uint8)
        for line in lines[:2]:
            stroke(drawn, line - corner, depth)
        thick = np.array([0.0, 1.8 * self.unit])
        under = between(lines[2] - corner - thick, lines[2] - corner + thick, drawn.shape)
        mask = cv2.GaussianBlur(drawn / np.float32(255) + 0.5 * under, (0, 0), 1.8 * self.unit)
        colour = who.beard_colour if who.beard in ("goatee", "full") else who.skin
        lay(patch, mix(colour, SHADOW, 0.5), mask)
        close_window(view, patch)

    def _glasses(self, image: np.ndarray, pose: Pose) -> None:
        """Paint the glasses, drawn finer and made smaller so that their edges move smoothly."""
        if not self.frames:
            return
        lines = pose.place_all(*self.frames)
        view, patch, corner = open_window(image, np.concatenate(lines), 4)
        height, width = view.shape[:2]
        drawn = np.zeros((FINER * height, FINER * width), np.uint8)
        for line in lines:
            fine = (line - corner + 0.5) * FINER - 0.5
            stroke(drawn, fine, 255, max(1, round(2.2 * FINER * self.unit)))
        mask = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA) / np.float32(255)
        lay(patch, self.who.glasses_colour, mask)
        close_window(view, patch)


def _lay(image: np.ndarray, layer: np.ndarray) -> None:
    """Lay a premultiplied picture `[h, w, 4]` over another `[h, w, 3]`, in place."""
    through = cv2.cvtColor(255 - layer[..., 3], cv2.COLOR_GRAY2RGB)
    image[:] = cv2.add(cv2.multiply(image, through, scale=1 / 255), cv2.cvtColor(layer, cv2.COLOR_RGBA2RGB))


def _bend(start: tuple[float, float], towards: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """A quadratic Bezier curve: `[13, 2]`."""
    t = np.linspace(0, 1, 13)[:, None]
    return (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(towards) + t**2 * np.array(end)


def _glasses(who: Identity) -> list[np.ndarray]:
    """Lines of the glasses: rim and side of either eye, then the bridge; none without glasses."""
    if who.glasses == "none":
        return []
    half = min(who.eye_spacing - 4, 18.0)
    y, lines = portrait.EYE_Y + 1, []
    for sign in (-1, 1):
        x = sign * who.eye_spacing
        rim = ellipse(x, y, half, 15.5) if who.glasses == "round" else _rounded(x, y, half, 12.5)
        lines.append(np.concatenate([rim, rim[:1]]))
        lines.append(np.array([(x + sign * half, y - 3), (sign * who.face_width, y - 6)]))
    inner = who.eye_spacing - half
    return [*lines, _bend((-inner, y - 2), (0, y - 8), (inner, y - 2))]


def _nose_points(who: Identity) -> np.ndarray:
    """Landmarks 27 to 35 of the unmoved face: `[9, 2]`."""
    n, y = who.nose_width, who.nose_y
    bridge = [(0.0, s) for s in np.linspace(portrait.BRIDGE_Y, y - 6, 4)]
    return np.array(
        [*bridge, (-0.75 * n, y + 1), (-0.4 * n, y + 2), (0, y + 3), (0.4 * n, y + 2), (0.75 * n, y + 1)]
    )


def _eye_contour(who: Identity, sign: int, blink: float) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lid from the picture's left to its right, `[13, 2]` each."""
    u = np.linspace(-1, 1, 13)
    bow = (1 - np.abs(u) ** 2.2) ** 0.8
    x = sign * who.eye_spacing + who.eye_size * u
    base = portrait.EYE_Y + 1 - who.eye_tilt * u * sign
    high = who.eye_height * who.eye_size
    lower = base + 0.72 * high * bow
    upper = base - 1.05 * high * bow
    upper = upper + (lower - upper) * min(blink, 1.0)
    return np.stack([x, upper], -1), np.stack([x, lower], -1)


def _brow(who: Identity, sign: int, raised: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five landmarks on the brow, from the picture's left, its upper and its lower edge."""
    u = np.linspace(-1, 1, 17)
    x = sign * who.eye_spacing + 1.3 * who.eye_size * u
    outward = u * sign
    lift = who.brow_arch * (1 - (outward - 0.25) ** 2) - 1.2 * outward
    y = portrait.BROW_Y + 1.5 - lift - 4 * raised * (1 - 0.2 * outward)
    thick = (
        who.brow_thickness
        * (1 - 0.55 * np.clip(outward + 0.2, 0, 1))
        * np.clip(1.6 * (1.08 - np.abs(u)), 0.2, 1)
    )
    top, bottom = np.stack([x, y - thick / 2], -1), np.stack([x, y + thick / 2], -1)
    return np.stack([x, y], -1)[::4], top, bottom


def _rounded(x: float, y: float, a: float, b: float) -> np.ndarray:
    """A rectangle with round corners."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack(
        [x + a * np.sign(cos) * np.abs(cos) ** 0.45, y + b * np.sign(sin) * np.abs(sin) ** 0.45], -1
    )
