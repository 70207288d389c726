"""The decoder in a stage's checkpoint against the VAE's: compared, said, and taken as the release does."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.convert.checkpoint import Checkpoints, convert
from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.decoder import choose, difference
from keysync_jax.convert.vae import engine_vae_table, vae_config
from keysync_jax.errors import UserError
from keysync_jax.model import open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.vae import VAE
from tests.convert.checkpoints import save_deepspeed
from tests.tiny_model import HEAD_DIM, same, tensors

KEY = "first_stage_model.decoder.conv_out.bias"
PATH = "decoder.conv_out.bias"


class Parts:
    """The VAE of a set of checkpoints, and its stages with other decoders."""

    def __init__(self, checkpoints: Checkpoints, folder: Path):
        self.folder, self.checkpoints = folder, checkpoints
        read = open_tensors(checkpoints.vae)
        self.config = vae_config(read, "vae")
        wanted = {k: v.shape for k, v in shapes(lambda rngs: VAE(self.config, rngs=rngs))[1].items()}
        self.vae = engine_vae_table(self.config, wanted).to_jax(read, wanted)

    def stage(self, kind: str, **changes: np.ndarray | None) -> Path:
        """The stage's checkpoint with some tensors changed, or left out (None)."""
        stored = {**dict(open_tensors(getattr(self.checkpoints, kind))), **changes}
        return save_deepspeed(self.folder / f"{kind}.pt", {k: x for k, x in stored.items() if x is not None})

    def shifted(self, kind: str, by: float) -> Path:
        return self.stage(kind, **{KEY: self.vae[PATH] + np.float32(by)})

    def without(self, kind: str) -> Path:
        keys = [
            k for k in open_tensors(getattr(self.checkpoints, kind)) if k.startswith("first_stage_model.")
        ]
        return self.stage(kind, **dict.fromkeys(keys))

    def choose(self, keyframe: Path | None = None, interpolation: Path | None = None, choice: str = "stage"):
        paths = keyframe or self.checkpoints.keyframe, interpolation or self.checkpoints.interpolation
        return choose(self.config, self.vae, *(open_tensors(path) for path in paths), choice)


@pytest.fixture
def parts(checkpoints: Checkpoints, tmp_path: Path) -> Parts:
    return Parts(checkpoints, tmp_path)


def test_equal_ones_are_said_to_be_equal(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    chosen = parts.choose()
    assert not chosen.weights
    assert chosen.said == (
        "the VAE's; the keyframe stage's own is equal to the VAE's, "
        "the interpolation stage's own is equal to the VAE's"
    )
    assert not caplog.records


def test_the_interpolation_stages_own_is_taken_and_the_difference_said(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = parts.choose(interpolation=parts.shifted("interpolation", 0.25))
    np.testing.assert_array_equal(chosen.weights[PATH], parts.vae[PATH] + np.float32(0.25))
    assert chosen.weights.keys() == {path for path in parts.vae if path.startswith("decoder.")}
    assert chosen.said.startswith(
        "the interpolation stage's, as in the release; the keyframe stage's own is equal"
    )
    assert f"other than the VAE's (up to 2.5e-01, in {PATH})" in chosen.said
    assert "the model takes the interpolation stage's" in caplog.text


def test_the_vaes_can_be_asked_for(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    chosen = parts.choose(interpolation=parts.shifted("interpolation", 0.25), choice="vae")
    assert not chosen.weights
    assert chosen.said.startswith("the VAE's;")
    assert "(up to 2.5e-01" in chosen.said
    assert "the model takes the VAE's" in caplog.text


def test_the_keyframe_stages_own_is_compared_alone(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    # Frames that the keyframe stage decodes are never shown.
    chosen = parts.choose(keyframe=parts.shifted("keyframe", 0.25))
    assert not chosen.weights
    assert f"keyframe stage's own is other than the VAE's (up to 2.5e-01, in {PATH})" in chosen.said
    assert not caplog.records


def test_stages_without_a_decoder(parts: Parts) -> None:
    chosen = parts.choose(parts.without("keyframe"), parts.without("interpolation"))
    assert (dict(chosen.weights), chosen.said) == ({}, "")


def test_a_part_of_a_decoder_and_one_of_other_sizes_are_refused(parts: Parts) -> None:
    with pytest.raises(UserError, match=rf"interpolation.pt: tensor '{KEY}' is missing"):
        parts.choose(interpolation=parts.stage("interpolation", **{KEY: None}))
    with pytest.raises(UserError, match=rf"keyframe.pt: tensor '{KEY}' has shape \[4\]"):
        parts.choose(keyframe=parts.stage("keyframe", **{KEY: np.zeros(4, np.float32)}))


def test_rounding_is_told_from_other_numbers() -> None:
    own = {"decoder.a": np.float32([1.0001, 2.5]), "decoder.b": np.float32([3.0])}
    rounded = {path: x.astype(np.float16) for path, x in own.items()}
    found = difference(own, rounded | {"encoder.a": np.zeros(3)})
    assert str(found).startswith("the VAE's before rounding to float16 (up to 1.0e-04, in decoder.a)")
    rounded["decoder.a"][1] += 1
    assert str(difference(own, rounded)) == "other than the VAE's (up to 1.0e+00, in decoder.a)"
    finer = {path: x.astype(np.float64) for path, x in own.items()}
    assert difference(own, finer).equal
    own["decoder.b"] = np.float32([np.nan])
    assert difference(own, finer).where == "decoder.b"
    assert not difference(own, finer).equal


def test_a_model_holds_the_decoder_that_the_release_decodes_with(
    parts: Parts, checkpoints: Checkpoints, tiny_model: Path, tmp_path: Path
) -> None:
    changed = dataclasses.replace(checkpoints, interpolation=parts.shifted("interpolation", 0.25))
    lines: list[str] = []
    config = convert(changed, tmp_path / "model", HEAD_DIM, say=lines.append)
    ours, before = tensors(tmp_path / "model", "vae"), tensors(tiny_model, "vae")
    np.testing.assert_array_equal(ours.pop(PATH), before.pop(PATH) + np.float32(0.25))
    assert same(ours, before)
    assert open_model(tmp_path / "model").config.provenance == config.provenance
    (said,) = [line.removeprefix("decoder: ") for line in lines]
    origin = config.provenance["vae"]
    assert origin.startswith("vae.pt sha256:")
    assert origin.endswith(f"; decoder: {said}")
