"""An evaluation's memory: what is kept of a pair that was measured."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keysync_jax.evaluation import pairs as pairs_module
from keysync_jax.evaluation.pairs import Pair
from keysync_jax.evaluation.synth_eval import measure
from keysync_jax.metrics.mouth import MouthReader

SEED, SECONDS = 4_000_003, 1.2


def kept(pair: Pair) -> set[str]:
    """Names of what a pair holds that it could make again."""
    return {name for name in vars(pair) if isinstance(vars(Pair).get(name), cached_property)}


def test_a_pair_forgets_what_it_can_make_again(tmp_path: Path) -> None:
    pair = Pair(tmp_path, SEED, 0, SECONDS)
    assert not kept(pair)
    frames, name = pair.original, pair.source.name
    assert kept(pair) == {"original", "source"}
    pair.forget()
    assert not any(isinstance(value, np.ndarray) for value in vars(pair).values())
    assert not kept(pair)
    np.testing.assert_array_equal(pair.original, frames)
    assert pair.source.name == name


def test_memory_does_not_grow_with_the_number_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames are held of one pair at a time, and each truth is rendered once."""
    pairs = [Pair(tmp_path, SEED, number, SECONDS) for number in range(3)]
    rendered: Counter[str] = Counter()
    truth_of = pairs_module._truth

    def counted(clip: Any, speech: Any) -> Any:
        rendered[clip.name] += 1
        return truth_of(clip, speech)

    def copied(pair: Pair, *_: object, **__: object) -> np.ndarray:
        assert not any(kept(other) for other in pairs if other is not pair)
        return pair.original

    monkeypatch.setattr(pairs_module, "_truth", counted)
    monkeypatch.setattr(Pair, "dubbed", copied)
    model: Any = SimpleNamespace(config=SimpleNamespace(crop_size=64))
    scores = measure(model, pairs, tmp_path / "dubs", MouthReader.load(), lambda _: None)
    assert not any(kept(pair) for pair in pairs)
    # What the voice would look like, and the source itself.
    assert set(rendered.values()) == {2}
    assert scores.clips == 3
    assert scores.values["source"] > 0.9
