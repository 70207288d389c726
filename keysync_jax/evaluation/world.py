"""Judging dubs of the synthetic world, where what a mouth should do is known and no network has to guess it.

Sync is the correlation of the dubbed opening, read by the world's mouth reader, with the articulation of the
voice. What is left of the source's mouth is told by the same correlation with the source's own articulation,
and by the gain: the slope of the dubbed opening on the source's.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from keysync_jax.evaluation.protocol import Setup
from keysync_jax.metrics.leakage import lip_leak_lite
from keysync_jax.metrics.meter import Found, Moment
from keysync_jax.metrics.mouth import MouthReader, cut_patch, eye_distance
from keysync_jax.metrics.registry import Metric
from keysync_jax.metrics.sync import best_lag, correlation
from keysync_jax.synthetic.articulation import Articulation, at_rest
from keysync_jax.synthetic.face import Picture
from keysync_jax.synthetic.face import render as render_face
from keysync_jax.synthetic.world import SIZE, SyntheticClip

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
        opening = mouths.opening.astype(np.float64)
        return {
            "sync": correlation(opening, self._voice),
            "lag": float(best_lag(opening, self._voice)),
            "source": correlation(opening, self._own),
            "gain": slope(opening, self._own),
            "mar_std": float(mouths.mar.std()),
            "mar_open": lip_leak_lite(mouths.mar),
            "mar": mouths.mar,
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


def _mixed(first: Articulation, second: Articulation, share: float) -> Articulation:
    """A mouth between two: `share` of the first."""
    pairs = zip(_parts(first), _parts(second), strict=True)
    return Articulation(*((share * a + (1 - share) * b).astype(np.float32) for a, b in pairs))


def _parts(articulation: Articulation) -> tuple[np.ndarray, ...]:
    return articulation.opening, articulation.width, articulation.rounding, articulation.teeth


def painted(clip: SyntheticClip, articulation: Articulation) -> Iterator[Picture]:
    """A dub by the world's own painter: the clip's head, movement and light with another mouth."""
    return render_face(clip.identity, clip.motion, articulation, SIZE, clip.occluder)
