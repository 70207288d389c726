"""The parts of a picture that are painted once for an identity: background, body, back hair and head.

Face units: pixels of a 256 x 256 picture, origin in the middle of the face, y downwards.
"""

import numpy as np

from keysync_jax.synthetic.canvas import Canvas, Layer, along, curve, ellipse, mirrored
from keysync_jax.synthetic.hair import SKULL_TOP, head_canvas, paint_front_hair
from keysync_jax.synthetic.identity import LIGHT, SHADOW, Identity, mix

EYE_Y, BROW_Y, BRIDGE_Y = -26.0, -44.0, -24.0
"""Heights of the eyes, the brows and the top of the nose, face units."""


def face_outline(who: Identity) -> np.ndarray:
    """Closed outline of skull and jaw with the mouth shut, from the top clockwise in the picture."""
    w, chin = who.face_width, who.chin_y
    jaw = w * (0.74 + 0.13 * who.jaw)
    breadth = w * (0.26 + 0.16 * who.chin)
    half = [(0, SKULL_TOP), (0.6 * w, SKULL_TOP + 12), (0.95 * w, -54), (w, -22), (0.97 * w, 4),
            (jaw, chin - 24), (breadth, chin - 3.5), (0, chin)]  # fmt: skip
    return curve(mirrored(np.array(half)), 12, closed=True)


def jaw_line(who: Identity) -> np.ndarray:
    """The 17 landmarks of the jaw with the mouth shut, from the picture's left over the chin: `[17, 2]`."""
    outline = face_outline(who)
    return along(outline[outline[:, 1] >= BRIDGE_Y][::-1], 17)


def paint_background(who: Identity, size: int) -> np.ndarray:
    """What lies behind: uint8 `[S, S, 3]`, soft everywhere."""
    rng = np.random.default_rng(who.grain)
    canvas = Canvas(size / 256, 0, 0, 256, 256)
    first, second = who.scene
    x, y = canvas.x / 256, canvas.y / 256
    turn = rng.uniform(0, np.pi)
    slope = np.clip(0.5 + (x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn), 0, 1)[..., None]
    canvas.alpha[:] = 1
    canvas.colour[:] = np.array(first) * (1 - slope) + np.array(mix(first, second, 0.6)) * slope
    if who.background == "stripes":
        phase = (x * np.cos(turn) + y * np.sin(turn)) * rng.uniform(4, 8) * 2 * np.pi
        canvas.tint(0.5 / (1 + np.exp(-4 * np.sin(phase))), second)
    elif who.background == "bokeh":
        for _ in range(14):
            x0, y0, radius = rng.uniform(0, 256), rng.uniform(0, 200), rng.uniform(8, 26)
            spot = ellipse(x0, y0, radius, radius)
            glow = mix(second, (255, 250, 235), rng.uniform(0.2, 0.8))
            canvas.tint(rng.uniform(0.15, 0.45) * canvas.mask(spot, soft=2.0), glow)
    elif who.background == "wall":
        left, high = rng.choice((14, 178)), rng.uniform(20, 50)
        for inset, colour in ((0, mix(second, (70, 50, 40), 0.6)), (5, (244, 240, 230)), (11, second)):
            a, b, c, d = left + inset, high + inset, left + 64 - inset, high + 84 - inset
            canvas.tint(canvas.mask(np.array([(a, b), (c, b), (c, d), (a, d)]), soft=1.0), colour)
        canvas.tint(
            0.8 * canvas.mask(ellipse(left + 32, high + 54, 17, 12), soft=3.0), mix(first, (60, 90, 80), 0.5)
        )
    vignette = 1.04 - 0.25 * ((x - 0.5) ** 2 + (y - 0.45) ** 2)
    canvas.brighten(vignette)
    return canvas.picture()[..., :3].copy()


def paint_body(who: Identity, scale: float) -> Layer:
    """Neck and shoulders."""
    canvas = Canvas(scale, -160, 0, 320, 160)
    neck = 0.6 * who.face_width
    shape = curve(
        mirrored(
            np.array(
                [(0, 10), (neck, 10), (neck, 66), (neck + 5, 84), (neck + 10, 96), (neck, 165), (0, 165)]
            )
        ),
        8,
        True,
    )
    canvas.paint(canvas.mask(shape), who.skin)
    canvas.tint(
        0.5 * canvas.mask(ellipse(0, who.chin_y + 4, 0.85 * who.face_width, 22), soft=5.0),
        mix(who.skin, SHADOW, 0.55),
    )
    cut = {"round": (0, 104), "vee": (0, 122), "open": (0, 116)}[who.collar]
    half = [
        cut,
        (0.6 * neck + 4, 98 if who.collar == "round" else 96),
        (neck + 5, 84),
        (58, 92),
        (92, 104),
        (116, 124),
        (128, 170),
        (0, 170),
    ]
    if who.collar == "round":
        half.insert(1, (0.35 * neck, 102))
    shirt = mirrored(np.concatenate([half[:-4], curve(np.array(half[-4:-1]), 8), half[-1:]]))
    canvas.paint(canvas.mask(shirt), who.shirt)
    side = np.cos(who.light) * who.light_strength
    canvas.tint(
        canvas.mask(shirt) * np.clip(0.3 - side * canvas.x / 200, 0, 0.5), mix(who.shirt, (20, 16, 40), 0.5)
    )
    edge = np.array([p for p in half[: len(half) - 4]])
    for line in (edge, edge * (-1, 1)):
        canvas.tint(
            0.8 * canvas.line(line + np.array([0.0, 2.0]), thickness=2.5, soft=0.4),
            mix(who.shirt, (255, 255, 255), 0.3),
        )
    if who.collar == "open":
        for sign in (-1, 1):
            flap = np.array(
                [(sign * (neck + 4), 82), (sign * 4, 118), (sign * 20, 126), (sign * (neck + 14), 90)]
            )
            canvas.paint(canvas.mask(flap), mix(who.shirt, (255, 255, 255), 0.18))
    return canvas.layer()


def paint_head(who: Identity, scale: float) -> Layer:
    """Ears, face, nose, beard and front hair with the mouth shut."""
    canvas = head_canvas(scale)
    _ears(canvas, who)
    face = canvas.mask(face_outline(who))
    canvas.paint(face, who.skin)
    _complexion(canvas, who, face)
    _nose(canvas, who)
    _beard(canvas, who, face)
    paint_front_hair(canvas, who, face)
    return canvas.layer()


def _ears(canvas: Canvas, who: Identity) -> None:
    for sign in (-1, 1):
        x = sign * (who.face_width + 1.5)
        canvas.paint(canvas.mask(ellipse(x, -18, 7.5, who.ear, sign * 0.14)), mix(who.skin, SHADOW, 0.1))
        canvas.tint(
            0.5 * canvas.mask(ellipse(x + sign, -18, 3.8, 0.62 * who.ear, sign * 0.14), soft=1.0),
            mix(who.skin, (120, 30, 30), 0.4),
        )


def _complexion(canvas: Canvas, who: Identity, face: np.ndarray) -> None:
    """Shading of a rounded face by the light, red cheeks, sockets, freckles."""
    w, strength = who.face_width, who.light_strength
    x, y = canvas.x / w, (canvas.y + 14) / 78
    facing = x * np.cos(who.light) - y * np.sin(who.light)
    lit = np.clip(facing, 0, 1) * (1 - 0.3 * np.clip(x**2 + y**2, 0, 1))
    warm = mix((225, 238, 255), LIGHT, 0.5 + 0.5 * who.light_warmth)
    canvas.tint(face * 0.42 * strength * lit, mix(who.skin, warm, 0.6))
    canvas.tint(face * 0.5 * strength * np.clip(-facing - 0.1, 0, 1), mix(who.skin, SHADOW, 0.5))
    rim = np.clip(x**2 + y**2 - 0.55, 0, 1)
    canvas.tint(face * 0.35 * rim, mix(who.skin, SHADOW, 0.4))
    for sign in (-1, 1):
        canvas.tint(
            0.5 * who.blush * canvas.blob(sign * 0.6 * w, 2, 15, 11), mix(who.skin, (226, 70, 80), 0.45)
        )
        canvas.tint(0.3 * canvas.blob(sign * who.eye_spacing, EYE_Y - 5, 14, 8), mix(who.skin, SHADOW, 0.4))
        canvas.tint(0.22 * canvas.blob(sign * who.eye_spacing, EYE_Y + 9, 12, 4), mix(who.skin, SHADOW, 0.4))
    if who.freckles:
        rng = np.random.default_rng(who.grain + 1)
        for _ in range(46):
            at = rng.normal(0, 0.36 * w), rng.normal(-4, 7)
            spot = canvas.blob(*at, *[rng.uniform(0.7, 1.2)] * 2)
            canvas.tint(0.6 * who.freckles * spot, mix(who.skin, (110, 50, 20), 0.5))


def _nose(canvas: Canvas, who: Identity) -> None:
    n, y = who.nose_width, who.nose_y
    dark, lit = mix(who.skin, SHADOW, 0.45), mix(who.skin, LIGHT, 0.55)
    away = -1.0 if np.cos(who.light) > 0 else 1.0
    bridge = curve(
        np.array(
            [
                (away * 5, BRIDGE_Y - 8),
                (away * 3.2, BRIDGE_Y + 6),
                (away * 5, y - 12),
                (away * n * 0.95, y - 4),
            ]
        ),
        8,
    )
    canvas.tint(0.5 * canvas.line(bridge, thickness=2.5, soft=2.0), dark)
    canvas.tint(0.5 * canvas.blob(0, y + 4.5, n, 3.2), dark)
    canvas.tint(0.4 * canvas.blob(-0.2 * away, -12, 3.0, 15), lit)
    canvas.tint(0.6 * canvas.blob(-1.5 * away, y - 6, 4.2, 3.4), lit)
    wings = [
        curve(np.array([(s * n * 0.8, y - 7), (s * n * 1.05, y - 3), (s * n * 0.85, y + 1)]), 6)
        for s in (-1, 1)
    ]
    canvas.tint(0.6 * canvas.line(*wings, thickness=1.2, soft=0.6), dark)
    under = curve(
        np.array(
            [(-n * 0.75, y + 1), (-n * 0.4, y + 0.4), (0, y + 3), (n * 0.4, y + 0.4), (n * 0.75, y + 1)]
        ),
        6,
    )
    canvas.tint(0.55 * canvas.line(under, thickness=1.1, soft=0.5), dark)
    holes = [ellipse(s * n * 0.45, y, 0.24 * n, 1.5, s * -0.25) for s in (-1, 1)]
    canvas.tint(0.8 * canvas.mask(*holes, soft=0.35), mix(who.skin, (40, 8, 16), 0.72))


def _beard(canvas: Canvas, who: Identity, face: np.ndarray) -> None:
    if who.beard == "none":
        return
    w, m, nose, chin = 1.1 * who.mouth_width, who.mouth_y, who.nose_y, who.chin_y
    lip = curve(
        mirrored(
            np.array(
                [
                    (0, nose + 6),
                    (0.55 * w, nose + 8),
                    (1.12 * w, m - 1),
                    (1.16 * w, m + 5),
                    (0.7 * w, m - 1),
                    (0, m + 1),
                ]
            )
        ),
        8,
        True,
    )
    cheeks = [
        (0, m),
        (0.8 * w, m - 3),
        (1.3 * w, m - 9),
        (0.98 * who.face_width, -12),
        (60, -20),
        (60, 80),
        (0, 80),
    ]
    full = np.concatenate([mirrored(np.array(cheeks))])
    patch = curve(
        mirrored(
            np.array(
                [
                    (0, m),
                    (1.0 * w, m),
                    (1.16 * w, m + 4),
                    (0.95 * w, chin - 8),
                    (0.55 * w, chin + 2),
                    (0, chin + 3),
                ]
            )
        ),
        8,
        True,
    )
    grain = np.random.default_rng(who.grain + 2).uniform(0.75, 1.0, canvas.alpha.shape).astype(np.float32)
    shapes = {"stubble": (full, lip), "moustache": (lip,), "goatee": (patch, lip), "full": (full, lip)}[
        who.beard
    ]
    mask = canvas.mask(*shapes, soft=2.5 if who.beard in ("stubble", "full") else 0.7) * face
    density = 0.3 if who.beard == "stubble" else 0.93
    canvas.tint(density * grain * mask, who.beard_colour)
    if who.beard != "stubble":
        side = np.clip(0.25 + 0.3 * np.cos(who.light) * canvas.x / 50, 0, 0.5)
        canvas.tint(mask * side * grain, mix(who.beard_colour, LIGHT, 0.25))
