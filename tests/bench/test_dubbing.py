"""Whole dubs that are measured: the clips and models that are made for it, and the rows."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.bench import dubbing
from keysync_jax.bench.dubbing import Dubbed, dub_table, measure_dub, random_model, synthetic
from keysync_jax.bench.measure import Timing
from keysync_jax.bench.sizes import Size, size_of
from keysync_jax.cli import main
from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.diffusion.schedule import STUDENTS
from keysync_jax.errors import UserError
from keysync_jax.media.landmarks import load_landmarks
from keysync_jax.media.video import read_frames
from keysync_jax.model import open_model
from keysync_jax.pipeline.dub import DubSettings, dub
from keysync_jax.pipeline.phases import PARTS
from tests.train.smallest_config import UNET

SPEECH = replace(size_of("tiny").speech, num_hidden_layers=1, intermediate_size=32, conv_dim=(8,) * 7)
SMALLEST = Size(
    StageConfig("interpolation", "hubert", replace(UNET, in_channels=9), SPEECH.hidden_size, latent_size=8),
    VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4),
    SPEECH,
)


def test_a_clip_of_any_size_has_its_face_in_the_middle() -> None:
    with synthetic(192, 96, 2.4) as work:
        frames = list(read_frames(work.video))
        points = load_landmarks(Path(work.landmarks), len(frames))
        assert [frame.shape for frame in frames] == [(96, 192, 3)] * 60
        assert work.note == "synthetic, 60 frames of 192 x 96"
        # What is drawn for two seconds begins anew.
        np.testing.assert_array_equal(points[50], points[0])
        middle = points.mean((0, 1))
        assert np.abs(middle - [96, 48]).max() < 24
        assert points[..., 0].min() > 48
        assert points[..., 0].max() < 144
        # Beside the face there is its edge.
        np.testing.assert_allclose(frames[0][48, 2].astype(int), frames[0][48, 40].astype(int), atol=6)
    assert not work.video.exists()


def test_a_random_model_dubs_in_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dubbing, "fresh_store", nullcontext)
    folder = random_model(tmp_path / "model", SMALLEST, "bf16")
    config = open_model(folder).config
    assert (config.keyframe.unet.in_channels, config.interpolation.unet.in_channels) == (8, 9)
    (tmp_path / "dubs").mkdir()
    with synthetic(96, 96, 1.0) as work:
        rows = measure_dub(work, folder, DubSettings(dtype="fp32", devices=1), 1, tmp_path / "dubs")
    *phases, whole = rows
    assert whole.name == "dub"
    assert len({row.name for row in phases}) == len(phases) > 3
    assert all(row.name.startswith("dub ") for row in phases)
    assert (whole.frames, whole.timing.calls) == (25, 1)
    assert {part for row in phases for part in row.busy} == set(PARTS)
    for row in phases:
        assert row.timing.median <= whole.timing.median
        assert all(0 <= busy <= row.timing.highest for busy in row.busy.values())
    assert [path.name for path in (tmp_path / "dubs").iterdir()] == ["compiled"]


def test_a_student_with_its_small_decoder_dubs_like_any_model(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", SMALLEST, "bf16", student=2)
    model = open_model(folder)
    assert model.config.sigmas == STUDENTS[2]
    with synthetic(96, 96, 1.0) as work:
        settings = DubSettings(landmarks=work.landmarks, dtype="fp32", devices=1, decoder="small")
        inputs = (work.video, work.voice, tmp_path / "out.mp4", model)
        with pytest.raises(UserError, match="distilled for 2 steps"):
            dub(*inputs, replace(settings, steps=10))
        with pytest.raises(UserError, match="not guided"):
            dub(*inputs, replace(settings, audio_interval=(1.5, 8)))
        assert dub(*inputs, settings).frames == 25
    assert (tmp_path / "out.mp4").is_file()


def test_the_table_tells_busy_and_waiting_time() -> None:
    timing = Timing(2.0, 1.5, 3.0, 3)
    rows = [
        Dubbed("dub compose", "a clip", 1.25, timing, 50, {"device": 0.5, "encoder": 1.75}),
        Dubbed("dub", "a clip", 2.5, timing, 50, {}, 2**30),
    ]
    lines = dub_table(rows, {"dub": 4.0}).splitlines()
    assert lines[1].split() == [
        *("dub", "compose", "1.2", "2.00", "1.50-3.00", "25.0", "0.00"),
        *("0.50", "/", "1.50", "1.75", "/", "0.25", "-", "-"),
    ]
    assert lines[2].split()[-2:] == ["4.0000", "0.50"]
    assert lines[3] == "dub: a clip"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["unet", "--frame", "64x64"], "--frame goes with bench dub"),
        (["dub", "--frame", "64"], "write width and height as 1920x1080"),
        (["dub", "--frame", "65x64"], "both sides are even, and 64 or more"),
        (["dub", "--seconds", "0.5"], "has 1 second or more, not 0.5"),
        (["dub", "--voice", "a.wav"], "--video and --voice go together"),
        (
            ["dub", "--voice", "a.wav", "--video", "a.mp4", "--seconds", "3"],
            "--seconds is of the synthetic clip",
        ),
        (["dub", "--landmarks", "a.npy"], "--landmarks goes with --video"),
        (["dub", "--against", "torch"], "--against torch is for the networks, not for dub"),
        (["dub", "--aot", "v5e:2x2"], "it cannot dub"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    assert sentence in capsys.readouterr().err
