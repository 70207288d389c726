"""The sounds of the synthetic language, the utterances made of them, and what the mouth does in each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from keysync_jax.synthetic.articulation import Articulation

FRAME_RATE = 25.0
# Distances at which a neighbour's say in the mouth's shape has fallen to 1/e, seconds.
_VOWEL_REACH = 0.06
_CONSONANT_REACH = 0.045
# Lips start to move to a closure, and have left it again, so many seconds outside the sound.
_CLOSURE_RAMP = 0.035
# A pause closes the mouth within so many seconds from either of its ends.
_REST_RAMP = 0.1
_REST_FROM = 0.2
# So many syllables may prove too long for what is left of an utterance before it ends.
_MISFITS = 10
# One pause in ten is as long as these seconds: the mouth has to rest as long as nobody speaks.
_LONG_PAUSE = (0.8, 2.0)
# What a cut leaves of a sound is dropped if it is shorter.
_SLIVER = 0.04


@dataclass(frozen=True)
class Phoneme:
    """One sound, and the mouth that makes it.

    Attributes:
      symbol: its name.
      kind: "vowel", "nasal", "plosive", "fricative", "approximant" or "silence".
      formants: resonances of the vocal tract of an average adult, Hz, four of them.
      bandwidths: of the formants, Hz.
      voicing: share of the glottal source, 0 to 1; in a plosive, that of the voice heard through its closure.
      frication: centre (Hz), bandwidth (Hz) and level of the noise; in a plosive, of the burst at its end.
      level: loudness relative to the loudest vowel, 0 to 1.
      seconds: shortest and longest duration at speech rate 1.
      opening, width, rounding, teeth: the mouth's target, in the units of `Articulation`.
      dominance: how strongly it imposes its mouth on its neighbours; a vowel has about 1.
    """

    symbol: str
    kind: str
    formants: tuple[float, float, float, float]
    bandwidths: tuple[float, float, float, float]
    voicing: float
    frication: tuple[float, float, float]
    level: float
    seconds: tuple[float, float]
    opening: float
    width: float
    rounding: float
    teeth: float
    dominance: float


_Mouth = tuple[float, float, float, float]
_Four = tuple[float, float, float, float]
_Span = tuple[float, float]
_NO_NOISE = (3000.0, 2000.0, 0.0)
# Lips close for longer than tongues do, so that every closure is seen at 25 frames a second.
_LIPS, _TONGUE = (0.1, 0.14), (0.08, 0.12)


def _vowel(symbol: str, formants: _Four, level: float, mouth: _Mouth) -> Phoneme:
    bandwidths = (70.0, 90.0, 130.0, 200.0)
    return Phoneme(symbol, "vowel", formants, bandwidths, 1.0, _NO_NOISE, level, (0.1, 0.2), *mouth, 1.0)


def _nasal(symbol: str, second: float, mouth: _Mouth, dominance: float, seconds: _Span) -> Phoneme:
    formants, bandwidths = (240.0, second, 2350.0, 3300.0), (90.0, 220.0, 300.0, 400.0)
    return Phoneme(symbol, "nasal", formants, bandwidths, 1.0, _NO_NOISE, 0.45, seconds, *mouth, dominance)


def _plosive(
    symbol: str,
    second: float,
    voicing: float,
    burst: tuple[float, float, float],
    mouth: _Mouth,
    dominance: float,
    seconds: _Span,
) -> Phoneme:
    formants, bandwidths = (220.0, second, 2500.0, 3400.0), (100.0, 150.0, 200.0, 300.0)
    return Phoneme(symbol, "plosive", formants, bandwidths, voicing, burst, 0.6, seconds, *mouth, dominance)


def _fricative(
    symbol: str,
    second: float,
    voicing: float,
    noise: tuple[float, float, float],
    mouth: _Mouth,
    dominance: float,
) -> Phoneme:
    formants, bandwidths = (300.0, second, 2500.0, 3400.0), (100.0, 150.0, 200.0, 300.0)
    return Phoneme(
        symbol, "fricative", formants, bandwidths, voicing, noise, 0.7, (0.08, 0.14), *mouth, dominance
    )


def _approximant(symbol: str, formants: _Four, level: float, mouth: _Mouth, dominance: float) -> Phoneme:
    bandwidths = (80.0, 110.0, 160.0, 250.0)
    return Phoneme(
        symbol, "approximant", formants, bandwidths, 1.0, _NO_NOISE, level, (0.07, 0.11), *mouth, dominance
    )


# Formants after Peterson and Barney (1952), rounded; mouths are (opening, width, rounding, teeth).
PHONEMES: tuple[Phoneme, ...] = (
    Phoneme(
        symbol="silence",
        kind="silence",
        formants=(500.0, 1450.0, 2500.0, 3500.0),
        bandwidths=(100.0, 120.0, 160.0, 250.0),
        voicing=0.0,
        frication=_NO_NOISE,
        level=0.0,
        seconds=(0.15, 0.8),
        opening=0.0,
        width=0.0,
        rounding=0.0,
        teeth=0.0,
        dominance=0.6,
    ),
    _vowel("a", (800, 1200, 2500, 3500), 1.0, (0.95, 0.1, 0.0, 0.35)),
    _vowel("ae", (700, 1750, 2500, 3500), 0.95, (0.85, 0.4, 0.0, 0.5)),
    _vowel("uh", (640, 1250, 2450, 3500), 0.85, (0.7, 0.05, 0.05, 0.3)),
    _vowel("e", (540, 1850, 2550, 3550), 0.75, (0.5, 0.45, 0.0, 0.5)),
    _vowel("schwa", (480, 1450, 2500, 3500), 0.65, (0.4, 0.0, 0.0, 0.3)),
    _vowel("ih", (400, 2050, 2650, 3600), 0.6, (0.35, 0.6, 0.0, 0.55)),
    _vowel("i", (290, 2350, 3050, 3700), 0.5, (0.25, 0.9, 0.0, 0.7)),
    _vowel("o", (500, 850, 2450, 3350), 0.75, (0.55, -0.6, 0.7, 0.05)),
    _vowel("u", (310, 780, 2250, 3250), 0.5, (0.2, -0.9, 1.0, 0.0)),
    _vowel("y", (290, 1750, 2150, 3300), 0.5, (0.2, -0.7, 0.9, 0.05)),
    _nasal("m", 950, (0.0, 0.0, 0.1, 0.0), 0.6, _LIPS),
    _nasal("n", 1600, (0.18, 0.2, 0.0, 0.5), 0.8, _TONGUE),
    _plosive("p", 850, 0.0, (900, 1200, 0.5), (0.0, 0.0, 0.1, 0.0), 0.6, _LIPS),
    _plosive("b", 850, 0.25, (700, 900, 0.3), (0.0, 0.0, 0.1, 0.0), 0.6, _LIPS),
    _plosive("t", 1750, 0.0, (4500, 2500, 0.8), (0.18, 0.2, 0.0, 0.6), 0.8, _TONGUE),
    _plosive("d", 1750, 0.25, (4000, 2500, 0.5), (0.18, 0.2, 0.0, 0.6), 0.8, _TONGUE),
    _plosive("k", 2100, 0.0, (2000, 1000, 0.8), (0.22, 0.1, 0.0, 0.3), 0.7, _TONGUE),
    _plosive("g", 2100, 0.25, (1900, 900, 0.5), (0.22, 0.1, 0.0, 0.3), 0.7, _TONGUE),
    _fricative("f", 1100, 0.0, (6800, 5000, 0.14), (0.04, 0.1, 0.0, 0.9), 0.9),
    _fricative("v", 1100, 0.45, (6500, 5000, 0.1), (0.04, 0.1, 0.0, 0.9), 0.9),
    _fricative("s", 1700, 0.0, (6000, 1800, 0.6), (0.12, 0.5, 0.0, 0.95), 0.9),
    _fricative("z", 1700, 0.4, (5800, 1800, 0.45), (0.12, 0.5, 0.0, 0.95), 0.9),
    _fricative("sh", 1900, 0.0, (3000, 1400, 0.65), (0.22, -0.5, 0.8, 0.8), 1.1),
    _fricative("th", 1400, 0.0, (5000, 6000, 0.1), (0.2, 0.15, 0.0, 0.6), 0.7),
    _fricative("h", 1450, 0.0, (1300, 2200, 0.25), (0.4, 0.0, 0.0, 0.25), 0.2),
    _approximant("l", (370, 1150, 2750, 3500), 0.5, (0.32, 0.1, 0.0, 0.4), 0.5),
    _approximant("r", (360, 1200, 1600, 3100), 0.5, (0.25, -0.45, 0.55, 0.3), 0.8),
    _approximant("w", (300, 650, 2200, 3200), 0.45, (0.1, -1.0, 1.0, 0.0), 1.2),
    _approximant("j", (270, 2250, 3050, 3700), 0.45, (0.2, 0.8, 0.0, 0.7), 0.8),
)
INDEX: dict[str, int] = {phoneme.symbol: i for i, phoneme in enumerate(PHONEMES)}
SILENCE = INDEX["silence"]

_VOWELS = tuple(i for i, p in enumerate(PHONEMES) if p.kind == "vowel")
# The lips' closures are drawn twice as often as other sounds: they are what a viewer checks first.
_ONSETS = tuple(i for i, p in enumerate(PHONEMES) if p.kind not in ("vowel", "silence")) + tuple(
    INDEX[s] for s in ("m", "p", "b")
)
_CODAS = tuple(
    INDEX[s] for s in ("m", "n", "p", "b", "t", "d", "k", "g", "f", "v", "s", "z", "sh", "th", "l")
)
_DIPHTHONGS = tuple(
    (INDEX[x], INDEX[y]) for x, y in (("a", "ih"), ("a", "u"), ("e", "ih"), ("o", "u"), ("o", "ih"))
)


@dataclass(frozen=True)
class Utterance:
    """Sounds in time.

    Attributes:
      phonemes: index into `PHONEMES` of each segment, int `[N]`.
      boundaries: edges of the segments in seconds, float64 `[N + 1]`: segment n is from `[n]` to `[n + 1]`,
        the first edge is 0 and the last is the duration.
    """

    phonemes: np.ndarray
    boundaries: np.ndarray

    @property
    def seconds(self) -> float:
        """Its duration."""
        return float(self.boundaries[-1])

    def segments_at(self, seconds: np.ndarray) -> np.ndarray:
        """The segment that sounds at each of the times given; times outside have the nearest."""
        return np.clip(np.searchsorted(self.boundaries, seconds, "right") - 1, 0, len(self.phonemes) - 1)


def silent_utterance(seconds: float) -> Utterance:
    """Nothing said, for so many seconds."""
    return Utterance(np.array([SILENCE]), np.array([0.0, seconds]))


def draw_utterance(rng: np.random.Generator, seconds: float, speech_rate: float = 1.0) -> Utterance:
    """Draws phrases of two to seven words with pauses between them, of 0.15 to 0.8 s, now and then longer.

    It begins and ends with a silence of at least 0.1 s; the last fills what no further syllable fits into.

    Args:
      rng: the source of chance.
      seconds: duration of the whole, exactly.
      speech_rate: divides the durations of the sounds, not of the pauses.
    """
    phonemes, durations = [SILENCE], [float(rng.uniform(0.1, 0.3))]
    shortest_end = float(rng.uniform(0.1, 0.2))
    left, misfits = seconds - durations[0] - shortest_end, 0
    for pause, syllable in _syllables(rng):
        lengths = [float(rng.uniform(*PHONEMES[i].seconds)) / speech_rate for i in syllable]
        if pause + sum(lengths) > left:
            misfits += 1
            if misfits == _MISFITS:
                break
            continue
        if pause:
            phonemes.append(SILENCE)
            durations.append(pause)
        phonemes.extend(syllable)
        durations.extend(lengths)
        left -= pause + sum(lengths)
    if len(phonemes) == 1:
        return silent_utterance(seconds)
    boundaries = np.concatenate([[0.0], np.cumsum(durations), [seconds]])
    return Utterance(np.array([*phonemes, SILENCE]), boundaries)


def excerpt(utterance: Utterance, start: float, seconds: float) -> Utterance:
    """The part of an utterance from `start` on, as a recording that was cut from a longer one.

    What is left of a sound at either end is dropped where it is shorter than 40 ms; its neighbour lasts
    longer.

    Args:
      start, seconds: where the part begins and its duration; it must lie within the utterance.
    """
    if start < 0 or start + seconds > utterance.seconds + 1e-9:
        raise ValueError(f"{start} to {start + seconds} s is not within {utterance.seconds} s")
    inner = utterance.boundaries[1:-1] - start
    inner = inner[(inner >= _SLIVER) & (inner <= seconds - _SLIVER)]
    boundaries = np.concatenate([[0.0], inner, [seconds]])
    middles = start + (boundaries[1:] + boundaries[:-1]) / 2
    return Utterance(utterance.phonemes[utterance.segments_at(middles)], boundaries)


def _syllables(rng: np.random.Generator) -> Iterator[tuple[float, list[int]]]:
    """Without end: the pause before a syllable (0 within a phrase) and the syllable's phonemes."""
    pause = 0.0
    while True:
        for _ in range(rng.integers(2, 8)):
            for _ in range(rng.integers(1, 4)):
                yield pause, _syllable(rng)
                pause = 0.0
        pause = float(rng.uniform(*(_LONG_PAUSE if rng.random() < 0.1 else PHONEMES[SILENCE].seconds)))


def _syllable(rng: np.random.Generator) -> list[int]:
    onset = [int(rng.choice(_ONSETS))] if rng.random() < 0.85 else []
    if rng.random() < 0.2:
        nucleus = list(_DIPHTHONGS[rng.integers(len(_DIPHTHONGS))])
    else:
        nucleus = [int(rng.choice(_VOWELS))]
    coda = [int(rng.choice(_CODAS))] if rng.random() < 0.35 else []
    return onset + nucleus + coda


def frame_times(frames: int) -> np.ndarray:
    """The middles of so many video frames, seconds, float64 `[T]`."""
    return (np.arange(frames) + 0.5) / FRAME_RATE


def phonemes_of_frames(utterance: Utterance, frames: int) -> np.ndarray:
    """The phoneme at the middle of each frame, as an index into `PHONEMES`, int `[T]`."""
    return utterance.phonemes[utterance.segments_at(frame_times(frames))]


def articulate(utterance: Utterance, frames: int) -> Articulation:
    """Moves the mouth through an utterance, with coarticulation.

    Each value is the mean of the segments' targets, weighted by their dominance, which falls exponentially
    with the distance in time from the segment, before it as after it (Cohen and Massaro, 1993, "Modeling
    coarticulation in synthetic visual speech", equations 1 to 4). Two things are sure beyond that: the lips
    are at their target in the middle of p, b, m, f and v, and at rest within a pause of 0.2 s or more.

    Args:
      utterance: what is said.
      frames: how many frames at 25 a second; each value is that at the frame's middle.
    """
    sounds = [PHONEMES[i] for i in utterance.phonemes]
    targets = np.array([(s.opening, s.width, s.rounding, s.teeth) for s in sounds])
    times = frame_times(frames)
    weights = _dominances(utterance, sounds, times)
    mouth = weights @ targets / weights.sum(axis=1, keepdims=True)
    for number, sound in enumerate(sounds):
        start, end = utterance.boundaries[number : number + 2]
        if sound.kind == "silence" and end - start >= _REST_FROM:
            # Before the first sound and after the last there is nothing to leave or to come back from.
            start = -np.inf if number == 0 else start
            end = np.inf if number == len(sounds) - 1 else end
            rest = _plateau(times, start, end, _REST_RAMP)
            mouth *= 1 - rest[:, None]
        elif sound.kind != "silence" and sound.opening < 0.05:
            inset = 0.2 * (end - start)
            held = _plateau(times, start + inset - _CLOSURE_RAMP, end - inset + _CLOSURE_RAMP, _CLOSURE_RAMP)
            mouth[:, 0] += held * (sound.opening - mouth[:, 0])
    mouth = np.clip(mouth, [0, -1, 0, 0], 1).astype(np.float32)
    return Articulation(*mouth.T.copy())


def _dominances(utterance: Utterance, sounds: list[Phoneme], times: np.ndarray) -> np.ndarray:
    """How much each segment has to say at each time, `[T, N]`."""
    edges = utterance.boundaries
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    distances = np.maximum(np.abs(times[:, None] - middles) - lengths / 4, 0)
    reaches = np.array([_VOWEL_REACH if s.kind == "vowel" else _CONSONANT_REACH for s in sounds])
    # Far from every segment all weights would vanish together; the floor keeps their mean defined.
    exponents = np.maximum(-distances / reaches, -50)
    return np.array([s.dominance for s in sounds]) * np.exp(exponents)


def _plateau(times: np.ndarray, start: float, end: float, ramp: float) -> np.ndarray:
    """0 outside `start` to `end`, 1 where both are further than `ramp`, raised cosines between."""
    inside = np.clip(np.minimum(times - start, end - times) / ramp, 0, 1)
    return 0.5 - 0.5 * np.cos(np.pi * inside)
