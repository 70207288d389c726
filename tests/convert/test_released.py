"""`keysync convert --released` and inputs on the hub, against a stand-in of it that has a tiny release."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.convert import checkpoint, released
from keysync_jax.convert.checkpoint import AudioSource, Checkpoints, convert
from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.export import export_torch
from keysync_jax.convert.sources import gather
from keysync_jax.errors import UserError
from keysync_jax.hub import File
from keysync_jax.model import components, open_model
from keysync_jax.tensorfile import write_tensors
from tests.convert.checkpoints import save_bare
from tests.hub import StandIn, cached_files, drop_after, garble, refuse, truncate
from tests.tiny_model import HEAD_DIM, same, tensors

CONVERT = ["convert", "--released", "--head-size", str(HEAD_DIM)]
NAMES = ("KEYFRAME", "INTERPOLATION", "WAVLM", "HUBERT_SIZES", "HUBERT", "VAE")


@pytest.fixture(scope="session")
def release(
    checkpoints: Checkpoints, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Name in the table -> bytes of a tiny file in the layout of the release's."""
    folder = tmp_path_factory.mktemp("release")
    export_torch(tiny_model, folder / "torch", "diffusers")
    half = {k: x.astype(np.float16) for k, x in open_tensors(folder / "torch/vae").items()}
    write_tensors(folder / "vae.safetensors", half)
    hubert = Path(checkpoints.audio["keyframe"].path)
    save_bare(folder / "pytorch_model.bin", dict(open_tensors(hubert)))
    files = {
        "KEYFRAME": Path(checkpoints.keyframe),
        "INTERPOLATION": Path(checkpoints.interpolation),
        "WAVLM": Path(checkpoints.audio["interpolation"].path),
        "HUBERT_SIZES": hubert / "config.json",
        "HUBERT": folder / "pytorch_model.bin",
        "VAE": folder / "vae.safetensors",
    }
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.fixture
def on_hub(hub: StandIn, release: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The hub with the tiny release, and the table pinned to it as it is to the real one."""
    table: dict[str, File] = {name: getattr(released, name) for name in NAMES}
    repos: dict[str, dict[str, bytes]] = {}
    for name, file in table.items():
        repos.setdefault(file.address.repo, {})[file.address.file] = release[name]
    # What inference does not need.
    repos[released.KEYFRAME.address.repo]["checkpoints/svd_no_emb.safetensors"] = b"x"
    repos[released.VAE.address.repo]["vae/diffusion_pytorch_model.safetensors"] = b"x"
    commits = {repo: hub.put(repo, files) for repo, files in repos.items()}
    for name, file in table.items():
        at = file.address
        here = dataclasses.replace(at, revision=commits[at.repo] if at.pinned else at.revision)
        sha256 = None if file.sha256 is None else hashlib.sha256(release[name]).hexdigest()
        table[name] = dataclasses.replace(file, address=here, sha256=sha256)
        monkeypatch.setattr(released, name, table[name])
    monkeypatch.setattr(released, "FILES", tuple(table.values()))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    return hub


def test_the_table_pins_what_is_known() -> None:
    assert [getattr(released, name) for name in NAMES] == list(released.FILES)
    for file in released.FILES:
        assert file.address.pinned is (file.address.repo != "toninio19/keysync")
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    stages = (released.KEYFRAME, released.INTERPOLATION)
    assert [file.address.file.rpartition("/")[2] for file in stages] == list(checkpoint.RELEASED)
    named = Checkpoints.released()
    assert [source.kind for source in named.audio.values()] == list(checkpoint.RELEASED.values())
    assert released.listed(released.VAE.address) == released.VAE
    elsewhere = dataclasses.replace(released.VAE.address, revision="main")
    assert released.listed(elsewhere) == File(elsewhere)


def test_the_release_in_one_command(
    on_hub: StandIn,
    release: dict[str, bytes],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "model"
    assert main([*CONVERT, "-o", str(output), "--allow-download"]) == 0
    said = capsys.readouterr().out
    model = open_model(output)
    assert (model.config.keyframe.audio_encoder, model.config.interpolation.audio_encoder) == (
        "hubert",
        "wavlm",
    )
    for component in set(components(model.config)) - {"vae"}:
        assert same(tensors(output, component), tensors(tiny_model, component)), component
    asked = {path.rpartition("/")[2] for path in on_hub.fetched}
    assert asked == {getattr(released, name).address.file.rpartition("/")[2] for name in NAMES}
    commit = on_hub.repos["toninio19/keysync"].branches["main"]
    digest = hashlib.sha256(release["KEYFRAME"]).hexdigest()
    origin = f"hub:toninio19/keysync@{commit}/checkpoints/keyframe_dub.pt sha256:{digest}"
    assert model.config.provenance["keyframe"] == origin
    assert f"keyframe_dub.pt: taken as it is in commit {commit}, whose bytes nothing" in said
    assert "(licence: stable-video-diffusion-community)" in said
    # The stages hold the fp32 decoder that the VAE's file is rounded from; the release decodes with it.
    assert "decoder: the interpolation stage's, as in the release" in said
    assert "the VAE's before rounding to float16" in model.config.provenance["vae"]
    ours, original = tensors(output, "vae"), tensors(tiny_model, "vae")
    for path, x in original.items():
        decoder = path.startswith("decoder.")
        np.testing.assert_array_equal(ours[path], x if decoder else x.astype(np.float16))


def gathered(allow_download: bool) -> dict[str, str]:
    """Component -> provenance."""
    sources = gather(Checkpoints.released().inputs(), allow_download)
    return {component: source.provenance() for component, source in sources.items()}


def test_a_second_time_fetches_nothing(on_hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gathered(True)
    on_hub.seen.clear()
    assert gathered(True) == first
    assert on_hub.fetched == []
    assert {seen.path.split("/")[1] for seen in on_hub.seen} == {"toninio19"}  # What main is today, no more.
    on_hub.seen.clear()
    assert gathered(False) == first
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert gathered(True) == first
    assert on_hub.seen == []


def test_without_leave_it_lists_and_fetches_nothing(
    on_hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CONVERT, "-o", str(tmp_path / "model")]) == 2
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == [
        str(getattr(released, name).address)
        for name in ("KEYFRAME", "INTERPOLATION", "VAE", "HUBERT", "WAVLM", "HUBERT_SIZES")
    ]
    assert "about 6.36 GB  keyframe stage, trained on HuBERT" in said.out
    assert said.err.startswith("keysync: 6 files of the hub (about 13.7 GB) are not in the hub's cache")
    assert "--allow-download" in said.err
    assert on_hub.seen == []
    assert not (tmp_path / "model").exists()


GATED = ("stabilityai/stable-video-diffusion-img2vid", 403, "GatedRepo")


@pytest.mark.parametrize(
    ("faults", "closed", "sentence"),
    [
        ({"keyframe_dub.pt": truncate(1000)}, None, "but has size 1000"),
        ({"keyframe_dub.pt": garble}, None, "keyframe_dub.pt: what arrived is not what the hub names"),
        ({"WavLM-Base+.pt": refuse(503)}, None, "WavLM-Base+.pt: the hub answers 503"),
        ({"interpolation_dub.pt": drop_after(150_000)}, None, "100 kB are here, the same command goes on"),
        ({}, GATED, "stabilityai/stable-video-diffusion-img2vid is gated: log in and accept its terms"),
        ({}, ("facebook/hubert-base-ls960", 401, ""), "hubert-base-ls960: there is no such repository"),
        ({}, ("toninio19/keysync", 404, "RepoNotFound"), "toninio19/keysync: there is no such repository"),
    ],
)  # fmt: skip
def test_whatever_goes_wrong_is_a_sentence_and_nothing_is_half_done(
    on_hub: StandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    faults: dict[str, Callable[..., None]],
    closed: tuple[str, int, str] | None,
    sentence: str,
) -> None:
    on_hub.faults = {name: [fault, *[drop_after(0)] * 20] for name, fault in faults.items()}
    if closed is not None:
        repo, on_hub.repos[closed[0]].status, on_hub.repos[closed[0]].code = closed
    assert main([*CONVERT, "-o", str(tmp_path / "model"), "--allow-download"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("keysync: ")]
    assert sentence in line
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cache", "token")] == []
    if closed is not None:
        assert on_hub.fetched == []  # The hub is asked for every file before the first is fetched.
    whole = [name for name in cached_files(tmp_path / "cache") if name in faults]
    assert whole == []
    on_hub.faults = {}
    if closed is not None:
        on_hub.repos[repo].status = 200
    assert set(gathered(True)) == {"keyframe", "interpolation", "vae", "audio_hubert", "audio_wavlm"}


def test_a_file_that_is_not_the_pinned_one_is_refused(
    on_hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(released.WAVLM, sha256="0" * 64)
    monkeypatch.setattr(released, "FILES", (released.KEYFRAME, other))
    assert main([*CONVERT, "-o", str(tmp_path / "model"), "--allow-download"]) == 2
    assert "WavLM-Base+.pt: is not the known file" in capsys.readouterr().err
    assert on_hub.fetched == []


def test_one_part_may_come_from_elsewhere(
    on_hub: StandIn, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.put("me/stages", {"sub/mine.pt": Path(checkpoints.keyframe).read_bytes()}, "v1")
    options = ["--vae", str(checkpoints.vae), "--keyframe", "hub:me/stages@v1/sub/mine.pt"]
    assert main([*CONVERT, *options, "-o", str(tmp_path / "model"), "--allow-download"]) == 0
    provenance = open_model(tmp_path / "model").config.provenance
    commit = on_hub.repos["me/stages"].branches["v1"]
    assert provenance["keyframe"].startswith(f"hub:me/stages@{commit}/sub/mine.pt sha256:")
    assert provenance["vae"].startswith("vae.pt sha256:")
    assert "diffusion_pytorch_model.fp16.safetensors" not in cached_files(tmp_path / "cache")


def test_an_encoder_on_the_hub_brings_its_sizes(on_hub: StandIn, checkpoints: Checkpoints) -> None:
    folder = Path(checkpoints.audio["keyframe"].path)
    on_hub.put("me/hubert", {f"small/{path.name}": path.read_bytes() for path in folder.iterdir()})
    hubert = AudioSource.parse("hubert=hub:me/hubert/small/model.safetensors")
    named = dataclasses.replace(checkpoints, audio={**checkpoints.audio, "keyframe": hubert})
    source = gather(named.inputs(), allow_download=True)["audio_hubert"]
    assert open_tensors(source.path).config == json.loads((folder / "config.json").read_text())


def refused(match: str, inputs: Checkpoints, folder: Path) -> None:
    with pytest.raises(UserError, match=match):
        convert(inputs, folder / "model", HEAD_DIM, allow_download=True)
    assert not (folder / "model").exists()


def test_what_cannot_be_is_refused_before_anything_is_fetched(
    on_hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Checkpoints.released()
    wavlm = named.audio["interpolation"]
    both = {"keyframe": wavlm, "interpolation": wavlm}
    refused("were trained on hubert features, not wavlm", dataclasses.replace(named, audio=both), tmp_path)
    refused("name one file of the repository", dataclasses.replace(named, vae="hub:a/b@v1"), tmp_path)
    refused("an address of the hub is", dataclasses.replace(named, vae="hub:a"), tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(r"keyframe_dub.pt: reading it needs torch", named, tmp_path)
    assert on_hub.seen == []


def test_convert_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--vae", "x", "--audio-keyframe", "hubert=x", "-o", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert said == (
        "keysync: convert needs --keyframe, --interpolation, --audio-interpolation, "
        "or --released for the release's own\n"
    )
