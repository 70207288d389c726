"""A model on the hub: the folder that is uploaded, and every place that takes a model directory takes it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.convert.released import FILES
from keysync_jax.data.prepare import PrepareSettings, prepare
from keysync_jax.errors import UserError
from keysync_jax.evaluation.synth_eval import EvalSettings, Scores, identity
from keysync_jax.files import write_json
from keysync_jax.model import DEFAULT, Model, model_folder, open_model
from keysync_jax.pipeline.dub import DubSettings, dub
from keysync_jax.publish import model_card, publish, read_metrics
from keysync_jax.train.start import first_weights, load_vae
from tests.clips import write_video, write_voice
from tests.hub import StandIn, cached_files, garble
from tests.tiny_model import same, tensors
from tests.train.test_start import train_config

HERE = "hub:me/model"
PARTS = ["config.json", "interpolation.safetensors", "keyframe.safetensors", "vae.safetensors"]


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(DEFAULT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as it is exported for the hub."""
    output = tmp_path_factory.mktemp("hub") / "folder"
    assert main(["export", "--to", "hub-folder", str(DEFAULT), "-o", str(output), "--licence", "mit"]) == 0
    return output


@pytest.fixture
def uploaded(hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The hub with that folder."""
    hub.put("me/model", {path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1_000_000)
    return hub


def header(card: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    _, text, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(text))


def scores(folder: Path, model: Model, **values: float) -> Path:
    """A `scores.json` as synth-eval leaves it, with what tells whose it is."""
    folder.mkdir(exist_ok=True)
    settings = EvalSettings()
    world = {"world": 1, "seconds": settings.seconds, "seed": settings.seed}
    write_json(folder / "eval.json", identity(model) | world)
    row = Scores(20, values)
    write_json(folder / "scores.json", {"model": {"clips": row.clips, "values": row.values}})
    return folder / "scores.json"


def test_the_folder_holds_the_model_and_its_card(folder: Path, model: Model) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", *PARTS])
    assert open_model(folder).hashes == model.hashes
    card = (folder / "README.md").read_text()
    top = header(card)
    assert (top["license"], top["library_name"], top["pipeline_tag"]) == (
        "mit",
        "keysync_jax",
        "video-to-video",
    )
    assert "lip-sync" in top["tags"]
    assert "| keyframe | logmel | 32, 64, 96 |" in card
    assert f"`{model.hashes['vae.safetensors']}`" in card
    assert model.config.provenance["keyframe"] in card
    assert "Measured" not in card


def test_the_hubs_own_client_reads_the_card(tmp_path: Path, model: Model) -> None:
    cards = pytest.importorskip("huggingface_hub")
    metrics = read_metrics(scores(tmp_path, model, sync=0.91, lip_leak=0.1), model)
    (tmp_path / "README.md").write_text(model_card(model, "apache-2.0", metrics))
    read = cards.ModelCard.load(tmp_path / "README.md").data
    assert {result.metric_type: result.metric_value for result in read.eval_results} == {
        "sync": 0.91,
        "lip_leak": 0.1,
    }
    assert "20 clips of 4 s, seed 1000003" in read.eval_results[0].dataset_name
    text = (tmp_path / "README.md").read_text()
    assert "| `sync` | 0.910 | >= 0.85 |" in text
    assert "Nothing here was measured on real faces." in text


def test_metrics_of_another_model_are_refused(tmp_path: Path, model: Model, tiny_model: Path) -> None:
    mine = scores(tmp_path, model, sync=0.9)
    with pytest.raises(UserError, match=r"scores.json: was measured on another model"):
        read_metrics(mine, open_model(tiny_model))
    (tmp_path / "eval.json").unlink()
    with pytest.raises(UserError, match="nothing tells whose the scores are"):
        read_metrics(mine, model)
    for content in ("x", "[]", '{"model": {"clips": 2, "values": {"sync": "much"}}}'):
        mine.write_text(content)
        with pytest.raises(UserError, match=r"is not a scores.json of keysync synth-eval"):
            read_metrics(mine, model)
    with pytest.raises(UserError, match="'beauty' is no measure"):
        read_metrics(scores(tmp_path, model, beauty=1.0), model)
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "none.json", model)


def test_a_licence_is_given_or_known_of_every_part(tmp_path: Path, model: Model) -> None:
    with pytest.raises(UserError, match="the licence of these weights is not known: give --licence"):
        publish(DEFAULT, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    keyframe, interpolation, *_, vae = FILES
    origins = {"keyframe": keyframe, "interpolation": interpolation, "vae": vae}
    provenance = {name: f"{file.address} sha256:00; decoder: x | y" for name, file in origins.items()}
    converted = dataclasses.replace(model, config=dataclasses.replace(model.config, provenance=provenance))
    card = model_card(converted)
    assert header(card)["license"] == "other"
    assert "| stable-video-diffusion-community |" in card
    assert card.count("| none stated; fine-tuned from SVD |") == 2
    assert "decoder: x \\| y |" in card


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "out")]
    for options, sentence in (
        (["--to", "reference", "--licence", "mit"], "--metrics and --licence go with --to hub-folder"),
        (["--to", "hub-folder", "--pickled"], "--pickled goes with --to reference"),
        (["--to", "hub-folder", "--average"], "no --base, --average or --dtype"),
    ):
        assert main(["export", str(DEFAULT), *out, *options]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_opened(uploaded: StandIn, model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hub:me/model@main/config.json is not in the hub's cache"):
        open_model(HERE)
    assert uploaded.seen == []
    opened = open_model(HERE, allow_download=True)
    assert opened.hashes == model.hashes
    assert cached_files(tmp_path / "cache") == PARTS  # And not its card.
    uploaded.seen.clear()
    assert open_model(HERE).folder == model_folder(Path(HERE)) == opened.folder
    assert uploaded.seen == []


def test_a_model_in_a_folder_of_a_revision(uploaded: StandIn, model: Model, tmp_path: Path) -> None:
    files = uploaded.repos["me/model"].commits[uploaded.repos["me/model"].branches["main"]]
    uploaded.put("me/many", {f"models/small/{name}": content for name, content in files.items()}, "v2")
    assert open_model("hub:me/many@v2/models/small", allow_download=True).hashes == model.hashes
    with pytest.raises(UserError, match=r"me/many has no file 'models/config.json' at v2"):
        open_model("hub:me/many@v2/models", allow_download=True)


def test_all_files_are_of_the_configs_commit(uploaded: StandIn, model: Model) -> None:
    """Another commit that appears in between is not mixed in."""
    files = uploaded.repos["me/model"].commits[uploaded.repos["me/model"].branches["main"]]

    def move(_: Any) -> None:
        uploaded.put("me/model", {**files, "vae.safetensors": b"another"})

    uploaded.faults["keyframe.safetensors"] = [move]
    assert open_model(HERE, allow_download=True).hashes == model.hashes


def test_a_model_whose_bytes_arrive_damaged(uploaded: StandIn, tmp_path: Path) -> None:
    uploaded.faults["vae.safetensors"] = [garble]
    with pytest.raises(UserError, match=r"vae.safetensors: what arrived is not what the hub names"):
        open_model(HERE, allow_download=True)
    assert "vae.safetensors" not in cached_files(tmp_path / "cache")


def test_a_repository_that_holds_no_model(hub: StandIn) -> None:
    hub.put("me/other", {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(UserError, match="not the config of a model in the format keysync-model-1"):
        open_model("hub:me/other", allow_download=True)
    config = json.loads((DEFAULT / "config.json").read_text())
    hub.put("me/part", {"config.json": json.dumps(config).encode()})
    with pytest.raises(UserError, match=r"me/part has no file 'keyframe.safetensors'"):
        open_model("hub:me/part", allow_download=True)


def test_a_dub_takes_it(uploaded: StandIn, tmp_path: Path) -> None:
    video, voice = write_video(tmp_path / "a.mp4", 20), write_voice(tmp_path / "a.wav", 0.5)
    np.save(tmp_path / "few.npy", np.zeros((3, 68, 2), np.float32))
    few = str(tmp_path / "few.npy")
    with pytest.raises(UserError, match="is not in the hub's cache"):
        dub(video, voice, tmp_path / "out.mp4", HERE, DubSettings(landmarks=few))
    with pytest.raises(UserError, match=r"few\.npy"):  # After the model was opened.
        dub(video, voice, tmp_path / "out.mp4", HERE, DubSettings(landmarks=few, allow_download=True))
    assert cached_files(tmp_path / "cache") == PARTS


def test_prepare_takes_it(uploaded: StandIn, tmp_path: Path) -> None:
    source, output = tmp_path / "clips", tmp_path / "data"
    source.mkdir()
    write_video(source / "a.mp4", 20)
    with pytest.raises(UserError, match="is not in the hub's cache"):
        prepare(source, output, HERE, PrepareSettings(encoders=("hubert",)))
    with pytest.raises(UserError, match="hubert"):  # Which the model, once it is opened, does not have.
        prepare(source, output, HERE, PrepareSettings(encoders=("hubert",), allow_download=True))
    assert cached_files(tmp_path / "cache") == PARTS


def test_training_starts_from_it(hub: StandIn, tiny_model: Path, golden: Path) -> None:
    hub.put("me/model", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    config = train_config(golden, "keyframe", kind="keysync", path=HERE, vae=HERE)
    with pytest.raises(UserError, match="is not in the hub's cache"):
        first_weights(config)
    open_model(HERE, allow_download=True)
    assert same(first_weights(config), tensors(tiny_model, "keyframe"))
    assert same(dict(load_vae(config).params), tensors(tiny_model, "vae"))


INIT = ["init", "--vae", "none", "--keyframe", "a.py", "--interpolation", "b.py", "-o", "m", "--stages", HERE]
TRAIN = ["train", "--workdir", "w", "--config.init.kind=keysync", f"--config.init.path={HERE}", "--config"]
TRAIN.append(str(Path(__file__).parents[1] / "configs" / "keyframe_tiny.py"))


@pytest.mark.parametrize(
    ("command", "then"),
    [
        (["export", "--to", "hub-folder", HERE, "-o", "out", "--licence", "mit"], ""),
        (["export", "nowhere", "--base", HERE, "-o", "out"], "nowhere"),
        (["synth-eval", "-o", "out", "-n", "2", "--compare", f"a={HERE}", "--model", "none"], "none"),
        (INIT, "a.py"),
        (TRAIN, "data.paths is empty"),
    ],
)
def test_commands_fetch_it_where_they_may(
    uploaded: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    then: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--allow-download"]) == (2 if then else 0)
    assert then in capsys.readouterr().err
    assert cached_files(tmp_path / "cache") == PARTS
