"""The embedded model on people and phrases that it never saw: the regression test of the whole system."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.config import GuidanceConfig
from keysync_jax.data.prepare import prepare
from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.evaluation.demo import demo, side_by_side
from keysync_jax.evaluation.pairs import Pair
from keysync_jax.evaluation.synth_eval import (
    MEASURES,
    Bar,
    EvalSettings,
    Scores,
    evaluate,
    guided,
    measure,
    report,
)
from keysync_jax.media.video import read_frames
from keysync_jax.metrics.mouth import MouthReader
from keysync_jax.metrics.quality import psnr
from keysync_jax.model import DEFAULT, Model, open_model
from keysync_jax.synthetic.write import SynthSettings, synth

SEED, SECONDS = 3_000_003, 2.0
LARGEST = 30_000_000

pytestmark = pytest.mark.skipif(not DEFAULT.is_dir(), reason="the embedded model is not in this checkout")


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(DEFAULT)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return [Pair(folder, SEED, number, SECONDS) for number in range(2)]


@pytest.fixture(scope="module")
def dubs(model: Model, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pairs' dubs."""
    output = tmp_path_factory.mktemp("dubs")
    for pair in pairs:
        pair.dubbed(model, output / f"{pair.number:05d}.mp4")
    return output


@pytest.fixture(scope="module")
def scores(model: Model, pairs: list[Pair], dubs: Path) -> Scores:
    return measure(model, pairs, dubs, MouthReader.load(), lambda _: None, silence=False)


def test_it_is_small_whole_and_hears_without_weights(model: Model) -> None:
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) <= LARGEST
    assert model.config.keyframe.audio_encoder == model.config.interpolation.audio_encoder == "logmel"
    assert model.config.crop_size >= 128


def test_its_vae_alone_keeps_a_face(model: Model, pairs: list[Pair]) -> None:
    size = model.config.crop_size
    for pair in pairs:
        crops = pair.crops(pair.original, size)
        assert psnr(pair.reconstructed(model), crops, pair.face(size)) >= 30


def test_the_dubbed_mouth_follows_the_new_voice(scores: Scores) -> None:
    assert scores.values["sync"] >= 0.7
    assert abs(scores.values["lag"]) <= 1


def test_it_does_not_follow_the_voice_of_another_clip(scores: Scores) -> None:
    assert scores.values["shuffled"] <= 0.3


def test_without_its_audio_it_does_not_pass(model: Model, pairs: list[Pair], tmp_path: Path) -> None:
    """The control: a model that is deaf must not look as if it were in sync."""
    deaf = guided(model, GuidanceConfig("separated", audio=0.0, identity=1.0))
    found = measure(deaf, pairs[:1], tmp_path, MouthReader.load(), lambda _: None, silence=False)
    assert found.values["sync"] < 0.5


def test_dubs_that_are_there_are_taken(model: Model, pairs: list[Pair], dubs: Path, scores: Scores) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in dubs.glob("*.mp4")}
    again = measure(model, pairs, dubs, MouthReader.load(), lambda _: None, silence=False)
    assert again.values == scores.values
    assert {path: path.stat().st_mtime_ns for path in dubs.glob("*.mp4")} == stamps


def test_the_truth_itself_meets_the_bars(pairs: list[Pair], tmp_path: Path, model: Model) -> None:
    """What a perfect dub would get, by the same reader: the bars can be met."""
    from keysync_jax.media.writer import VideoWriter

    for pair in pairs:
        for name, truth in (("", pair.spoken), ("-silent", pair.silent)):
            with VideoWriter(tmp_path / f"{pair.number:05d}{name}.mp4", 256, 256) as writer:
                for frame in truth.frames:
                    writer.write(frame)
    found = measure(model, pairs, tmp_path, MouthReader.load(), lambda _: None).values
    assert found["sync"] > 0.98
    assert found["lip_leak"] < 0.1
    assert found["psnr_truth"] > 35
    assert found["flicker"] == pytest.approx(1, abs=0.1)


def test_the_source_undubbed_does_not(pairs: list[Pair], tmp_path: Path, model: Model) -> None:
    """What copying the source would get: the bars can fail."""
    for pair in pairs:
        for name in ("", "-silent"):
            (tmp_path / f"{pair.number:05d}{name}.mp4").write_bytes(pair.video.read_bytes())
    found = measure(model, pairs, tmp_path, MouthReader.load(), lambda _: None)
    assert {"sync", "lip_leak", "source"} <= set(found.missed)


def test_a_demo_takes_no_dub_of_another_model(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dubs that are copies of the source: who made them does not matter here."""
    asked: list[Path] = []

    def copied(pair: Pair, model: Model, output: Path, *_: object, **__: object) -> np.ndarray:
        asked.append(output)
        output.write_bytes(pair.video.read_bytes())
        return pair.original

    monkeypatch.setattr(Pair, "dubbed", copied)
    unguided = guided(model, GuidanceConfig("none"))
    shorter = replace(model, config=replace(model.config, steps=12))
    folders = []
    for dubbing in (model, model, unguided, shorter):
        demo(dubbing, tmp_path, seconds=0.72)
        folders.append(asked[-1].parent)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_four_pictures_side_by_side(model: Model, pairs: list[Pair], dubs: Path) -> None:
    dubbed = np.stack(list(read_frames(dubs / "00000.mp4")))
    row = next(side_by_side(pairs[0], dubbed, model))[-256:]
    source, mask, dub, truth = np.split(row, 4, axis=1)
    np.testing.assert_array_equal(source, pairs[0].original[0])
    np.testing.assert_array_equal(dub, dubbed[0])
    np.testing.assert_array_equal(truth, pairs[0].spoken.frames[0])
    changed = (mask != source).any(axis=-1)
    assert 0.05 < changed.mean() < 0.5
    assert changed[128:].sum() > 5 * changed[:128].sum()


def test_a_report_says_what_was_missed() -> None:
    scores = Scores(2, {"sync": 0.9, "shuffled": 0.25, "lip_leak": 0.1})
    assert scores.missed == ["shuffled"]
    lines = report({"model": scores, "no guidance": scores}).splitlines()
    assert any(line.startswith("shuffled") and "MISSED" in line for line in lines)
    assert any(line.startswith("no guidance") for line in lines)
    spread = report({"model": scores, "other": Scores(2, {"sync": 0.9}, {"sync": 0.0125})}).splitlines()[-1]
    assert "0.900 +-0.013" in spread
    plain = scores.table(verdicts=False)
    assert "<= 0.2" in plain
    assert not {"ok", "MISSED"} & set(plain.split())
    assert all(bar is None or isinstance(bar, Bar) for _, bar in MEASURES.values())


def test_every_ablation_has_a_row(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dubs that are copies of the source: the real ones would take minutes."""

    def copied(pair: Pair, model: Model, output: Path, *_: object, **__: object) -> np.ndarray:
        output.parent.mkdir(parents=True, exist_ok=True)
        return pair.original

    monkeypatch.setattr(Pair, "dubbed", copied)
    settings = EvalSettings(clips=3, seconds=1.0, ablations=True, ablation_clips=2)
    scores = evaluate(model, tmp_path / "eval", settings, {"other": model})
    assert {"model", "no guidance", "mouth mask", "other", "occluded", "occluded, masked out"} <= set(scores)
    assert (scores["model"].clips, scores["model, same clips"].clips, scores["other"].clips) == (3, 2, 2)
    # Every dub is a copy of the source, so on the same clips they are all alike.
    assert scores["model, same clips"] == scores["other"] != scores["model"]
    assert "psnr_occluder" in scores["occluded"].values
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["other"]["clips"] == 2
    assert evaluate(model, tmp_path / "eval", settings, {"other": model}) == scores


def test_a_folder_of_other_dubs_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "eval.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(UserError, match="holds dubs of another model or other clips"):
        evaluate(model, tmp_path / "eval", EvalSettings(clips=2))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["synth-eval", "-o", "OUT", "-n", "1"], "2 are the fewest"),
        (["synth-eval", "-o", "OUT", "--compare", "models/x"], "NAME=MODEL_DIR"),
        (["synth-eval", "-o", "OUT", "--compare", f"no guidance={DEFAULT}"], "is taken"),
        (["synth-eval", "-o", "OUT", "--compare", f"a/b={DEFAULT}"], "no slash"),
        (["synth-eval", "-o", "OUT", "--compare", "a=x", "--compare", "a=y"], "one name twice"),
        (["synth-eval", "-o", "OUT", "--model", "OUT/no"], "not a model directory"),
        (["demo", "-o", "OUT", "--seconds", "0"], "--seconds from 1 to 60"),
    ],
)
def test_bad_calls_get_a_sentence(
    command: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    assert main([word.replace("OUT", output) for word in command]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path(output).exists()


def test_datasets_of_the_embedded_model_are_whole(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its latents have 8 channels, not SVD's 4."""
    synth(tmp_path / "clips", SynthSettings(clips=1, seconds=0.6, seed=SEED))
    assert prepare(tmp_path / "clips", tmp_path / "dataset", model).done == 1
    assert Dataset(tmp_path / "dataset").settings.latent_channels == model.config.vae.latent_channels == 8
    assert main(["prepare", "--check", str(tmp_path / "dataset")]) == 0
    assert "every shard and record is whole" in capsys.readouterr().out
