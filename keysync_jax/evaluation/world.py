"""Judging dubs of the synthetic world, where what a mouth should do is known and no network has to guess it.

Sync is the correlation of the dubbed opening, read by the world's mouth reader, with the articulation of the
voice. What is left of the source's mouth is told by the same correlation with the source's own articulation,
and by the gain: the slope of the dubbed opening on the source's.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from keysync_jax.evaluation.protocol import Setup
from keysync_jax.media.timeline import FPS
from keysync_jax.metrics.leakage import lip_leak_lite
from keysync_jax.metrics.meter import Found, Moment
from keysync_jax.metrics.mouth import MouthReader, cut_patch, eye_distance
from keysync_jax.metrics.registry import Metric
from keysync_jax.metrics.sync import best_lag, correlation
from keysync_jax.synthetic.articulation import Articulation, at_rest
from keysync_jax.synthetic.face import Picture
from keysync_jax.synthetic.face import render as render_face
from keysync_jax.synthetic.voice import SAMPLE_RATE
from keysync_jax.synthetic.world import SIZE, SyntheticClip

SAMPLES = SAMPLE_RATE // FPS
"""Of a frame."""

Truth = Mapping[str, np.ndarray]
"""Of a clip, as `synthetic.world.truth_of` gives it."""

_READ = "mouth_reader"

WORLD_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("sync", "sync", "", "higher", "correlation of the dubbed opening with the articulation of the "
               "voice that scores it", _READ),
        Metric("lag", "lag", "frames", "zero", "frames by which the mouth is late: the lag of the highest "
               "correlation", _READ),
        Metric("source", "source", "", "zero", "correlation of the dubbed opening with the source's own",
               _READ),
        Metric("gain", "gain", "", "zero", "slope of the dubbed opening on the source's own: the share of "
               "the source's movement that is left", _READ),
    )
}  # fmt: skip
"""What is read of the synthetic world beside MAR, by name."""


class WorldMeter:
    """Reads the mouths of a dub, as a `metrics.meter.Meter`."""

    def __init__(self, reader: MouthReader, source: Truth, scored: Truth, frames: int) -> None:
        """Begins a clip.

        Args:
          source: of the clip that was dubbed.
          scored: of the clip whose voice scores it.
          frames: that will be shown.
        """
        self._reader, self._landmarks = reader, source["landmarks"]
        self._own = (source["gap"] / eye_distance(source["landmarks"]))[:frames]
        self._voice = scored["opening"][:frames]
        self._patches: list[np.ndarray] = []

    def update(self, moment: Moment) -> None:
        self._patches.append(cut_patch(moment.frame, self._landmarks[len(self._patches)]))

    def result(self) -> Found:
        mouths = self._reader.read_patches(np.stack(self._patches))
        return told(mouths.opening, mouths.mar, self._own, self._voice)


def told(opening: np.ndarray, mar: np.ndarray, own: np.ndarray, voice: np.ndarray) -> Found:
    """What is said of a mouth.

    Args:
      opening, mar: of the dub, `[T]`.
      own: the source's opening in the same unit.
      voice: articulated opening of the voice that scores it, in any unit.
    """
    opening = np.asarray(opening, np.float64)
    return {
        "sync": correlation(opening, voice),
        "lag": float(best_lag(opening, voice)),
        "source": correlation(opening, own),
        "gain": slope(opening, own),
        "mar_std": float(np.std(mar)),
        "mar_open": lip_leak_lite(mar),
        "mar": np.asarray(mar),
        "opening": opening,
    }


def slope(dub: np.ndarray, source: np.ndarray) -> float:
    """Slope of one series on another, `[T]` each; 0 where the other does not move."""
    source = np.asarray(source, np.float64) - np.mean(source)
    moved = float(source @ source)
    return float((np.asarray(dub, np.float64) @ source) / moved) if moved > 0 else 0.0


def articulated(
    clip: SyntheticClip, driving: SyntheticClip, setup: Setup, leak: float = 0.0, heard: float = 1.0
) -> Articulation:
    """What the mouth of a system does that is made to leak.

    Args:
      clip: the source.
      driving: whose voice it is given in the mismatched setup.
      leak: share of the source's mouth in the dub, 0 to 1.
      heard: share of the right mouth in what is not the source's; the rest is another mouth, of neither.
    """
    rest = at_rest(len(clip))
    voice = {"AM": clip.articulation, "XM": driving.articulation, "SI": rest}[setup]
    # A system that hears badly still rests in silence.
    late = Articulation(*(np.roll(x, len(x) // 2) for x in _parts(driving.articulation)))
    said = _mixed(voice, rest if setup == "SI" else late, heard)
    return _mixed(clip.articulation, said, leak)


def by_loudness(wave: np.ndarray, frames: int) -> Articulation:
    """The mouth of a system that hears how loud a voice is and nothing else, the same for all people.

    Args:
      wave: `[samples]` at 16 kHz.
    """
    heard = np.pad(wave, (0, max(0, frames * SAMPLES - len(wave))))[: frames * SAMPLES]
    loud = np.sqrt((heard.reshape(frames, SAMPLES).astype(np.float64) ** 2).mean(axis=1))
    opening = 0.6 * np.minimum(loud / max(np.percentile(loud, 95), 1e-4), 1)
    still = np.zeros(frames, np.float32)
    return Articulation(opening.astype(np.float32), still, still, still)


def _mixed(first: Articulation, second: Articulation, share: float) -> Articulation:
    """A mouth between two: `share` of the first."""
    pairs = zip(_parts(first), _parts(second), strict=True)
    return Articulation(*((share * a + (1 - share) * b).astype(np.float32) for a, b in pairs))


def _parts(articulation: Articulation) -> tuple[np.ndarray, ...]:
    return articulation.opening, articulation.width, articulation.rounding, articulation.teeth


def painted(clip: SyntheticClip, articulation: Articulation) -> Iterator[Picture]:
    """A dub by the world's own painter: the clip's head, movement and light with another mouth."""
    return render_face(clip.identity, clip.motion, articulation, SIZE, clip.occluder)
