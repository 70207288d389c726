"""What an evaluation keeps: in memory nothing of a pair that was measured, on disk what is still right."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.config import GuidanceConfig
from keysync_jax.errors import UserError
from keysync_jax.evaluation import demo as demo_module
from keysync_jax.evaluation import pairs as pairs_module
from keysync_jax.evaluation import synth_eval as synth_eval_module
from keysync_jax.evaluation.demo import demo
from keysync_jax.evaluation.pairs import Pair
from keysync_jax.evaluation.synth_eval import GUIDED, EvalSettings, Scores, evaluate, measure
from keysync_jax.metrics.mouth import MouthReader
from keysync_jax.model import DEFAULT, Model, open_model
from keysync_jax.pipeline.dub import DubSettings
from tests.clips import write_video

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
    model: Any = SimpleNamespace(
        config=SimpleNamespace(crop_size=64, sigmas=(1.0,), guidance=GuidanceConfig())
    )
    scores = measure(model, pairs, tmp_path / "dubs", MouthReader.load(), lambda _: None)
    assert not any(kept(pair) for pair in pairs)
    # What the voice would look like, and the source itself.
    assert set(rendered.values()) == {2}
    assert scores.clips == 3
    assert scores.values["source"] > 0.9


class Dubs:
    """Dubs that are copies of the source and are not measured: which were made."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.made: list[Path] = []
        patch.setattr(pairs_module, "dub", self._dub)
        patch.setattr(pairs_module, "write_clip", self._clip)
        for module in (demo_module, synth_eval_module):
            patch.setattr(module, "measure", self._measure)
        patch.setattr(demo_module, "side_by_side", lambda pair, frames, model: iter(frames))

    def _clip(self, folder: Path, clip: Any) -> None:
        write_video(folder / f"{clip.name}.mp4", len(clip))

    def _dub(self, video: Path, voice: Path, output: Path, *_: object) -> None:
        self.made.append(output)
        shutil.copyfile(video, output)

    def _measure(self, model: Model, pairs: list[Pair], output: Path, *_: object, **__: object) -> Scores:
        for pair in pairs:
            pair.dubbed(model, output / f"{pair.number:05d}.mp4")
        return Scores(len(pairs), {})

    def of(self, call: Callable[[], object]) -> int:
        """How many a call makes."""
        before = len(self.made)
        call()
        return len(self.made) - before


def test_no_number_is_of_old_code_or_another_device(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dubs, model, settings = Dubs(monkeypatch), open_model(tiny_model), EvalSettings(clips=2, seconds=1.0)

    def made(model: Model = model) -> tuple[int, int]:
        evaluated = dubs.of(lambda: evaluate(model, tmp_path / "eval", settings, {"other": model}))
        return evaluated, dubs.of(lambda: demo(model, tmp_path / "demo", seconds=1.0))

    assert made() == (4, 1)
    assert made() == (0, 0)
    finer = replace(model.config, vae=replace(model.config.vae, scale_factor=0.2))
    assert made(replace(model, config=finer)) == (4, 1)
    for change in (
        ("keysync_jax.pipeline.environment.code_digest", lambda *_: "0" * 64),
        ("keysync_jax.pipeline.dub.DubSettings.compute_dtype", "bf16"),
        ("jax.__version__", "0"),
        ("jax.devices", lambda *_: [SimpleNamespace(device_kind="another")]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            assert made() == (4, 1)
            assert made() == (0, 0)
    assert made() == (0, 0)


def test_devices_are_counted_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count, sentence in {
        "999": "999 devices were asked for, but this host has",
        "0": "at least 1",
    }.items():
        assert main(["synth-eval", "-o", str(tmp_path / "eval"), "--devices", count]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_every_dub_is_told_how_many_devices_to_take(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int | None] = []

    def telling(video: Path, voice: Path, output: Path, model: Model, settings: DubSettings) -> None:
        told.append(settings.devices)
        shutil.copyfile(video, output)

    def dubbing(model: Model, pairs: list[Pair], output: Path, *_: object, **options: Any) -> Scores:
        for pair in pairs:
            pair.dubbed(model, output / f"{pair.number:05d}.mp4", devices=options["devices"])
        return Scores(len(pairs), {})

    Dubs(monkeypatch)
    monkeypatch.setattr(pairs_module, "dub", telling)
    monkeypatch.setattr(synth_eval_module, "measure", dubbing)
    model = open_model(tiny_model)
    evaluate(model, tmp_path / "eval", EvalSettings(clips=2, seconds=1.0, devices=1), {"other": model})
    assert told == [1] * 4


def test_the_sweep_measures_the_guidance_in_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is the same model with its own scales, in the row's intervals, with the decoder asked for."""
    measured: list[Any] = []

    def scored(model: Model, pairs: Any, output: Path, *_: object, decoder: str, **__: object) -> Scores:
        measured.append((model.config.guidance, output.name, decoder))
        return Scores(len(pairs), {"sync": 1.0})

    monkeypatch.setattr(synth_eval_module, "measure", scored)
    monkeypatch.setattr(synth_eval_module, "_pair", lambda *_: None)
    model = open_model(DEFAULT, only=())
    settings = EvalSettings(clips=2, ablation_clips=2, intervals=True, decoder="small")
    scores = evaluate(model, tmp_path, settings)
    own = model.config.guidance
    assert list(scores) == ["model", *GUIDED]
    assert [row[0] for row in measured] == [own, *(own.within(*each) for each in GUIDED.values())]
    assert len({row[1] for row in measured}) == 1 + len(GUIDED)
    assert {row[2] for row in measured} == {"small"}
    with pytest.raises(UserError, match="of another model or other clips"):
        evaluate(model, tmp_path, replace(settings, decoder="full"))
    with pytest.raises(UserError, match="is taken by a row"):
        evaluate(model, tmp_path, settings, {"guidance at 1.5-8": model})
