"""Planted leakage: what the metrics say of systems whose leak is known."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import pytest

from keysync_jax.evaluation.protocol import PROTOCOLS, Setup
from keysync_jax.evaluation.scoring import Scored
from keysync_jax.evaluation.statistics import Resampling
from keysync_jax.evaluation.summary import Judged, row
from keysync_jax.evaluation.world import WorldMeter, articulated, by_loudness, painted, told
from keysync_jax.metrics.meter import Found, Moment
from keysync_jax.metrics.mouth import MouthReader
from keysync_jax.synthetic.articulation import Articulation
from keysync_jax.synthetic.world import SyntheticClip, draw_clip, truth_of

SEED, CLIPS, SECONDS = 5_000_011, 10, 3.0
NOISE = 0.004
"""Of the mouth reader, in units of the opening."""

Says = Callable[[SyntheticClip, SyntheticClip, Setup], Articulation]


@pytest.fixture(scope="module")
def clips() -> list[SyntheticClip]:
    return [draw_clip(SEED, number, SECONDS) for number in range(CLIPS)]


def driving(clips: list[SyntheticClip], i: int) -> SyntheticClip:
    return clips[(i + 3) % len(clips)]


def judged(clips: list[SyntheticClip], says: Says) -> tuple[dict[str, float], dict[str, float]]:
    """Leakage metrics and sync of a system, from what its mouth does and not from pixels; and chance."""
    cells, noise = PROTOCOLS["leakage"][:3], np.random.default_rng(0)
    scores: dict[str, dict[str, Scored]] = {cell.name: {} for cell in cells}
    for i, clip in enumerate(clips):
        for cell in cells:
            opening = says(clip, driving(clips, i), cell.setup).opening
            opening = np.maximum(opening + NOISE * noise.normal(size=len(opening)), 0)
            voice = (driving(clips, i) if cell.setup == "XM" else clip).articulation.opening
            scores[cell.name][clip.name] = scored(told(opening, opening, clip.articulation.opening, voice))
    names = tuple(clip.name for clip in clips)
    one = Judged("planted", {cell: scores[cell.name] for cell in cells}, names)
    voices = {clip.name: clip.articulation.opening for clip in clips}
    partners = {clip.name: driving(clips, i).name for i, clip in enumerate(clips)}
    found = row(one, "CR", Resampling(names, draws=500), voices, partners, ("sync",))
    values = {name: e["value"] for name, e in found["leakage"].items() if isinstance(e, Mapping)}
    values |= {"p": found["leakage"]["lsd"]["p"], "XM": found["cells"]["XM-CR"]["sync"]["value"]}
    values |= {"source": found["cells"]["XM-CR"]["source"]["value"]}
    return values, found["chance"]


def scored(found: Found) -> Scored:
    values = {name: x for name, x in found.items() if isinstance(x, float)}
    return Scored(values, {}, {name: x.tolist() for name, x in found.items() if isinstance(x, np.ndarray)})


def test_every_leakage_metric_grows_with_what_is_left_of_the_source(clips: list[SyntheticClip]) -> None:
    shares = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    found = [judged(clips, lambda c, d, s, a=a: articulated(c, d, s, leak=a)) for a in shares]  # type: ignore[misc]
    for name in ("lip_leak", "lip_leak_lite", "sync_s", "gain_s", "lsd", "source"):
        values = [one[name] for one, _ in found]
        assert all(b >= a - 0.01 for a, b in pairwise(values)), (name, values)
        assert values[-1] > values[0] + 0.3, (name, values)
    gains = [one["gain_s"] for one, _ in found]
    np.testing.assert_allclose(gains, shares, atol=0.02)
    # At a = 0 all of them are where chance has them.
    clean, chance = found[0]
    assert clean["lip_leak"] < 0.03
    assert clean["lip_leak_lite"] == 0
    assert abs(clean["sync_s"] - chance["SI"]) < 0.1
    assert abs(chance["SI"]) < 0.1
    assert clean["lsd"] < 0.01
    assert abs(clean["source"]) < 0.15
    # At a = 1 the mouth is the source's, whatever the voice.
    whole, _ = found[-1]
    assert whole["sync_s"] > 0.99
    assert whole["lip_leak"] == pytest.approx(1, abs=0.02)
    assert whole["p"] < 0.01


def test_lsd_does_not_fire_for_a_system_that_is_merely_weak(clips: list[SyntheticClip]) -> None:
    weak, _ = judged(clips, lambda c, d, s: articulated(c, d, s, heard=0.5))
    leaking, _ = judged(clips, lambda c, d, s: articulated(c, d, s, leak=0.5))
    assert 0.3 < weak["XM"] < 0.9
    assert weak["lsd"] < 0.12 < 0.25 < leaking["lsd"]
    assert weak["lip_leak"] < 0.05
    assert abs(weak["gain_s"]) < 0.02


def test_systems_are_ranked_as_they_deserve(clips: list[SyntheticClip]) -> None:
    rng = np.random.default_rng(9)
    others = [draw_clip(SEED + 1, int(n), SECONDS).articulation for n in rng.permutation(CLIPS)]
    place = {clip.name: i for i, clip in enumerate(clips)}
    waves: dict[Setup, Callable[[SyntheticClip, SyntheticClip], np.ndarray]] = {
        "AM": lambda c, d: c.wave,
        "XM": lambda c, d: d.wave,
        "SI": lambda c, d: np.zeros_like(c.wave),
    }
    says: dict[str, Says] = {
        "right": lambda c, d, s: articulated(c, d, s),
        "average": lambda c, d, s: by_loudness(waves[s](c, d), len(c)),
        "random": lambda c, d, s: others[place[c.name]],
        "copy": lambda c, d, s: c.articulation,
    }
    found = {name: judged(clips, one)[0] for name, one in says.items()}
    sync = {name: one["XM"] for name, one in found.items()}
    assert sync["right"] > 0.99 > sync["average"] > 0.4
    assert max(abs(sync["random"]), abs(sync["copy"])) < 0.2
    assert found["copy"]["sync_s"] > 0.99
    assert max(abs(found[name]["sync_s"]) for name in ("right", "average", "random")) < 0.2
    # LipLeak sees motion of any cause; only the sync with the source's voice tells whose it is.
    assert found["random"]["lip_leak"] > 0.9
    assert max(found["right"]["lip_leak"], found["average"]["lip_leak"]) < 0.05
    assert found["copy"]["lsd"] > 0.8 > 0.3 > found["random"]["lsd"]


def test_the_reader_sees_what_is_painted() -> None:
    """Pixels instead of truths; the reader takes a mouth that is hardly open for more closed than it is."""
    reader, clip, other = MouthReader.load(), draw_clip(SEED, 1, 1.2), draw_clip(SEED, 2, 1.2)
    truth = truth_of(clip, list(clip.pictures()))
    found: dict[float, dict[str, float]] = {}
    for leak in (0.0, 0.5):
        meter = WorldMeter(reader, truth, truth, len(clip))
        for picture in painted(clip, articulated(clip, other, "SI", leak)):
            meter.update(Moment(picture.pixels))
        found[leak] = {name: x for name, x in meter.result().items() if isinstance(x, float)}
    assert 0.4 < found[0.5]["gain"] < 0.55
    assert abs(found[0.0]["gain"]) < 0.02
    assert found[0.5]["sync"] > 0.97
    assert found[0.5]["mar_std"] > 5 * found[0.0]["mar_std"]
