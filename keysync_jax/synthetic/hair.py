"""The hair: behind the head, in front of it, and its strands. Places in face units, as in `portrait`."""

import numpy as np

from keysync_jax.synthetic.canvas import Canvas, Layer, curve, ellipse, mirrored
from keysync_jax.synthetic.identity import LIGHT, SHADOW, Colour, Identity, mix

SKULL_TOP = -92.0
"""Height of the top of the head, face units."""


def head_canvas(scale: float) -> Canvas:
    """An empty canvas for what moves with the head."""
    return Canvas(scale, -128, -140, 256, 256)


def paint_back_hair(who: Identity, scale: float) -> Layer | None:
    """The hair behind neck and head; None where there is none."""
    if who.hair_style not in ("long", "bun", "curly"):
        return None
    canvas, w, v = head_canvas(scale), who.face_width, who.hair_volume
    if who.hair_style == "long":
        half = [
            (0, SKULL_TOP - v),
            (0.75 * w, SKULL_TOP + 6),
            (w + v + 1, -50),
            (w + v + 4, 0),
            (w + v + 6, 50),
            (w + v, 92),
            (0.6 * w, 98),
            (0, 96),
        ]
        shape = curve(mirrored(np.array(half)), 10, True)
    elif who.hair_style == "bun":
        shape = ellipse(0, SKULL_TOP - v - 6, 22, 19)
    else:
        shape = _curls(who, v + 8, 40)
    canvas.paint(canvas.mask(shape), mix(who.hair, (14, 8, 16), 0.25))
    _strands(canvas, who, canvas.mask(shape, soft=1.5))
    return canvas.layer()


def paint_front_hair(canvas: Canvas, who: Identity, face: np.ndarray) -> None:
    """Paint the hair over a painted face; `face` is the face's mask."""
    w, v, style = who.face_width, who.hair_volume, who.hair_style
    if style == "bald":
        canvas.tint(
            0.5 * face * canvas.blob(20 * np.cos(who.light), SKULL_TOP + 20, 18, 9), mix(who.skin, LIGHT, 0.7)
        )
        return
    right = [
        (0, SKULL_TOP - v),
        (0.62 * w, SKULL_TOP + 10 - v),
        (w + 0.5 * v, -58),
        (w + 2, -20),
        (w - 3, -14),
    ]
    left = [(-x, y) for x, y in right[:0:-1]]
    lines = {
        "short": [
            (w - 6, -40),
            (0.8 * w, -60),
            (0.4 * w, -66),
            (0, -67),
            (-0.4 * w, -66),
            (-0.8 * w, -60),
            (6 - w, -40),
        ],
        "parted": [
            (w - 6, -38),
            (0.85 * w, -56),
            (0.5 * w, -72),
            (0.35 * w, -80),
            (0, -66),
            (-0.5 * w, -57),
            (-0.85 * w, -48),
            (6 - w, -36),
        ],
        "long": [
            (w - 7, -26),
            (0.78 * w, -52),
            (0.4 * w, -72),
            (0, -82),
            (-0.4 * w, -72),
            (-0.78 * w, -52),
            (7 - w, -26),
        ],
        "bun": [
            (w - 5, -36),
            (0.84 * w, -58),
            (0.45 * w, -73),
            (0, -77),
            (-0.45 * w, -73),
            (-0.84 * w, -58),
            (5 - w, -36),
        ],
        "curly": [
            (w - 6, -38),
            (0.75 * w, -60),
            (0.3 * w, -68),
            (0, -66),
            (-0.3 * w, -68),
            (-0.75 * w, -60),
            (6 - w, -38),
        ],
    }[style]
    shape = curve(np.array([*right, *lines, *left]), 10, True)
    shapes = [shape, *_curl_circles(who, v + 2, 22)] if style == "curly" else [shape]
    mask = canvas.mask(*shapes)
    shade = np.clip(canvas.mask(*[s + np.array([0.0, 5.0]) for s in shapes], soft=3.0) - mask, 0, 1) * face
    canvas.tint(0.4 * shade, mix(who.skin, SHADOW, 0.6))
    canvas.paint(mask, who.hair)
    _strands(canvas, who, mask)


def _strands(canvas: Canvas, who: Identity, mask: np.ndarray) -> None:
    """Light on the hair: a sheen and strands that run round the skull."""
    rng = np.random.default_rng(who.grain + 3)
    if who.hair_style == "curly":
        arcs = [
            ellipse(x, y, 6, 6)[rng.integers(12) :][:14]
            for x, y in zip(rng.uniform(-60, 60, 40), rng.uniform(-108, -20, 40), strict=True)
        ]
    else:
        turns = np.linspace(0.06, 0.94, 24) * np.pi
        arcs = []
        for stretch in rng.uniform(0.1, 1.0, 26):
            arcs.append(
                np.stack([-stretch * 66 * np.cos(turns) * rng.choice((-1, 1)), -26 - 74 * np.sin(turns)], -1)[
                    : rng.integers(8, 20)
                ]
            )
    canvas.tint(
        0.4 * mask * canvas.line(*arcs[::2], thickness=1.0, soft=0.7), mix(who.hair, (10, 6, 14), 0.5)
    )
    canvas.tint(0.45 * mask * canvas.line(*arcs[1::2], thickness=1.0, soft=0.7), mix(who.hair, LIGHT, 0.4))
    sheen = canvas.blob(34 * np.cos(who.light), -84, 24, 10)
    canvas.tint(0.5 * mask * sheen * who.light_strength, mix(who.hair, LIGHT, 0.45))


def _curl_circles(who: Identity, out: float, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(who.grain + 4)
    turns = np.linspace(-0.08, 1.08, count) * np.pi
    a, b = who.face_width + out - 8, -SKULL_TOP - 30 + out - 6
    sizes = rng.uniform(9, 13, count)
    return [ellipse(a * np.cos(t), -30 - b * np.sin(t), r, r) for t, r in zip(turns, sizes, strict=True)]


def _curls(who: Identity, out: float, count: int) -> np.ndarray:
    turns = np.linspace(-0.25, 1.25, 200) * np.pi
    bump = out + 2.2 * np.abs(np.sin(turns * count / 3))
    return np.stack(
        [(who.face_width + bump) * np.cos(turns), -30 - (-SKULL_TOP - 30 + bump) * np.sin(turns)], -1
    )


def lash_colour(who: Identity) -> Colour:
    """Colour of the lashes: the hair's, darkened."""
    return mix(who.hair, (20, 14, 18), 0.75)
