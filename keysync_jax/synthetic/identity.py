"""Who is seen: everything about a person and a scene that stays for a whole clip."""

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]
"""Red, green and blue, 0 to 255."""

HAIR_STYLES = ("bald", "short", "parted", "long", "bun", "curly")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square")
BACKGROUNDS = ("gradient", "stripes", "bokeh", "wall")

SKINS = ((253, 224, 204), (247, 206, 178), (236, 188, 150), (219, 164, 122), (192, 134, 94), (158, 104, 70),
         (122, 78, 53), (92, 58, 42))  # fmt: skip
HAIRS = ((38, 30, 30), (62, 42, 34), (98, 62, 40), (146, 92, 52), (196, 146, 84), (226, 190, 128),
         (168, 76, 42), (150, 148, 150), (214, 210, 206))  # fmt: skip
EYES = ((86, 56, 38), (116, 80, 46), (104, 120, 72), (84, 128, 160), (96, 146, 130), (58, 42, 36))
LIPS = ((206, 92, 96), (188, 70, 84), (222, 110, 112), (170, 54, 74), (196, 82, 70), (150, 48, 62))
SHIRTS = ((58, 84, 130), (176, 72, 66), (64, 116, 100), (232, 224, 210), (54, 56, 68), (216, 164, 74),
          (120, 88, 140), (120, 152, 178))  # fmt: skip
SCENES = ((206, 222, 230), (240, 220, 196), (190, 210, 190), (222, 204, 224), (150, 172, 196),
          (238, 200, 180), (120, 146, 148), (96, 104, 128), (248, 236, 214), (170, 150, 140))  # fmt: skip

SHADOW, LIGHT = (60.0, 20.0, 40.0), (255.0, 240.0, 210.0)
"""What colours are mixed with in the shade and in the light."""

GREYS = 2
"""How many of `HAIRS`, at the end, are grey."""

LIGHT_SKIN = 480.0
"""Sum of a skin's red, green and blue from which all colours of hair and eyes are drawn."""

LIP_CONTRAST = 55.0
"""Least distance in RGB between the lips and the skin."""


@dataclass(frozen=True)
class Identity:
    """A person and the scene. Lengths are pixels of a 256 x 256 picture before `camera` is applied.

    Attributes:
      skin: colour of face, ears and neck.
      hair: colour of the hair; brows and beard are near it.
      hair_style: one of `HAIR_STYLES`.
      hair_volume: how far the hair stands off the skull.
      face_width: half the width of the face.
      jaw: squareness of the jaw, 0 to 1.
      chin: breadth of the chin, 0 to 1.
      chin_y: height of the chin below the middle of the face.
      eye_size: half the width of an eye.
      eye_height: height of an open eye over its width.
      eye_spacing: distance of the eye's centre from the middle of the face.
      eye_tilt: how much the outer corner is raised.
      eye: colour of the iris.
      brow: colour of the brows.
      brow_thickness: thickness of a brow.
      brow_arch: height of a brow's arch.
      nose_width: half the width of the nose at the nostrils.
      nose_y: height of the nose's base below the middle of the face.
      ear: half the height of an ear.
      lip: colour of the lips, at least `LIP_CONTRAST` away from the skin.
      lip_fullness: factor on the thickness of the lips.
      mouth_width: half the distance of the outer corners at rest.
      mouth_y: height of the closed mouth below the middle of the face.
      mouth_curve: how much the corners of the closed mouth are raised.
      mouth_gain: factor on the opening.
      beard: one of `BEARDS`.
      beard_colour: its colour.
      glasses: one of `GLASSES`.
      glasses_colour: the frame's colour.
      freckles: strength of freckles, 0 to 1.
      blush: strength of red cheeks, 0 to 1.
      shirt: colour of the shirt.
      collar: "round", "vee" or "open".
      background: one of `BACKGROUNDS`.
      scene: the background's two colours.
      light: where the light comes from, radians: 0 right, pi / 2 above, pi left.
      light_strength: contrast of the shading, 0 to 1.
      light_warmth: -1 (cool) to 1 (warm).
      camera: factor on all lengths.
      grain: seed of the small things (freckles, strands, circles behind).
    """

    skin: Colour
    hair: Colour
    hair_style: str
    hair_volume: float
    face_width: float
    jaw: float
    chin: float
    chin_y: float
    eye_size: float
    eye_height: float
    eye_spacing: float
    eye_tilt: float
    eye: Colour
    brow: Colour
    brow_thickness: float
    brow_arch: float
    nose_width: float
    nose_y: float
    ear: float
    lip: Colour
    lip_fullness: float
    mouth_width: float
    mouth_y: float
    mouth_curve: float
    mouth_gain: float
    beard: str
    beard_colour: Colour
    glasses: str
    glasses_colour: Colour
    freckles: float
    blush: float
    shirt: Colour
    collar: str
    background: str
    scene: tuple[Colour, Colour]
    light: float
    light_strength: float
    light_warmth: float
    camera: float
    grain: int


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour that lies so far (0 to 1) from the first to the second."""
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def draw_identity(rng: np.random.Generator) -> Identity:
    """Draw a person and a scene; the same state of `rng` always gives the same."""
    skin = _between(rng, SKINS)
    hair = _hair(rng, skin)
    style = str(rng.choice(HAIR_STYLES, p=(0.1, 0.2, 0.2, 0.2, 0.15, 0.15)))
    bearded = style in ("bald", "short", "parted", "curly")
    beard = str(rng.choice(BEARDS, p=(0.4, 0.2, 0.12, 0.14, 0.14))) if bearded else "none"
    width = rng.uniform(48, 54)
    scene = rng.permutation(len(SCENES))[:2]
    return Identity(
        skin=skin,
        hair=hair,
        hair_style=style,
        hair_volume=rng.uniform(4, 9),
        face_width=width,
        jaw=rng.uniform(0, 1),
        chin=rng.uniform(0, 1),
        chin_y=rng.uniform(55, 61),
        eye_size=rng.uniform(10.5, 13),
        eye_height=rng.uniform(0.54, 0.7),
        eye_spacing=width * rng.uniform(0.4, 0.45),
        eye_tilt=rng.uniform(-0.5, 2.0),
        eye=_eye(rng, skin),
        brow=mix(hair, (40, 28, 26), rng.uniform(0.25, 0.6)),
        brow_thickness=rng.uniform(3.6, 6.2),
        brow_arch=rng.uniform(2, 5),
        nose_width=rng.uniform(8.5, 12),
        nose_y=rng.uniform(2, 5),
        ear=rng.uniform(12, 16),
        lip=_lip(rng, skin),
        lip_fullness=rng.uniform(0.8, 1.25),
        mouth_width=width * rng.uniform(0.4, 0.45),
        mouth_y=rng.uniform(22.5, 25.5),
        mouth_curve=rng.uniform(0, 2.5),
        mouth_gain=rng.uniform(0.85, 1.15),
        beard=beard,
        beard_colour=mix(hair, (44, 32, 28), rng.uniform(0.1, 0.4)),
        glasses=str(rng.choice(GLASSES, p=(0.7, 0.15, 0.15))),
        glasses_colour=mix((36, 34, 40), (130, 70, 50), rng.uniform(0, 1)),
        freckles=rng.uniform(0.4, 1) if rng.random() < 0.25 else 0.0,
        blush=rng.uniform(0.15, 0.8),
        shirt=_near(rng, SHIRTS[int(rng.integers(len(SHIRTS)))], 12),
        collar=str(rng.choice(("round", "vee", "open"))),
        background=str(rng.choice(BACKGROUNDS)),
        scene=(_near(rng, SCENES[scene[0]], 10), _near(rng, SCENES[scene[1]], 10)),
        light=rng.uniform(0.1, 0.9) * np.pi,
        light_strength=rng.uniform(0.35, 1.0),
        light_warmth=rng.uniform(-0.6, 1.0),
        camera=rng.uniform(0.96, 1.04),
        grain=int(rng.integers(2**31)),
    )


def _near(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    red, green, blue = np.clip(np.asarray(colour) + rng.uniform(-spread, spread, 3), 0, 255)
    return float(red), float(green), float(blue)


def _between(rng: np.random.Generator, palette: tuple[Colour, ...]) -> Colour:
    """A colour anywhere along the palette."""
    place = rng.uniform(0, len(palette) - 1)
    at = min(int(place), len(palette) - 2)
    return _near(rng, mix(palette[at], palette[at + 1], place - at), 4)


def _eye(rng: np.random.Generator, skin: Colour) -> Colour:
    choices = EYES if sum(skin) > LIGHT_SKIN else EYES[:2] + EYES[-1:]
    return _near(rng, choices[int(rng.integers(len(choices)))], 8)


def _hair(rng: np.random.Generator, skin: Colour) -> Colour:
    """A natural colour: any over light skin, dark over dark skin, now and then grey."""
    light, grey = sum(skin) > LIGHT_SKIN, rng.random() < 0.18
    choices = HAIRS[-GREYS:] if grey else HAIRS[:-GREYS] if light else HAIRS[:3]
    return _near(rng, choices[int(rng.integers(len(choices)))], 5)


def _lip(rng: np.random.Generator, skin: Colour) -> Colour:
    """A red that is told from the skin; darker and bluer until it is."""
    lip = _near(rng, LIPS[int(rng.integers(len(LIPS)))], 8)
    lip = mix(lip, skin, rng.uniform(0.0, 0.25))
    away = (168.0, 40.0, 66.0) if sum(skin) > 330 else (206.0, 92.0, 104.0)
    while np.linalg.norm(np.subtract(lip, skin)) < LIP_CONTRAST:
        lip = mix(lip, away, 0.2)
    return lip
