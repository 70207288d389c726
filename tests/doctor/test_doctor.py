"""What `keysync doctor` says of a machine and of a clip."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.doctor import clip as clip_module
from keysync_jax.doctor import installation as installation_module
from keysync_jax.doctor.clip import EVERY, clip_findings, cost_findings, frames_of_dub
from keysync_jax.doctor.finding import Finding
from keysync_jax.doctor.installation import installation
from keysync_jax.errors import UserError
from keysync_jax.media.video import count_frames
from keysync_jax.media.writer import VideoWriter
from keysync_jax.model import DEFAULT, open_model
from keysync_jax.pipeline.dub import DubSettings
from tests.clips import write_voice


def said(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    return {finding.about: (finding.state, finding.said) for finding in findings}


class Blind:
    """A detector that sees a face in the first pictures alone."""

    def __init__(self, faces: int) -> None:
        self.left, self.closed = faces, False

    def detect(self, frame: np.ndarray) -> np.ndarray | None:
        self.left -= 1
        return None if self.left < 0 else np.zeros((68, 2), np.float32)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Two seconds in two scenes."""
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 60, (64, 96, 3)), rng.integers(180, 256, (64, 96, 3))
    with VideoWriter(tmp_path / "video.mp4", 96, 64) as writer:
        for t in range(50):
            writer.write(scenes[t >= 30].astype(np.uint8))
    return tmp_path / "video.mp4"


def test_a_clip_is_told_before_it_is_dubbed(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Blind(faces=3)
    monkeypatch.setattr(clip_module, "make_detector", lambda *_: detector)
    voice = write_voice(tmp_path / "voice.wav", 3.1)
    found = said(clip_findings(video, voice, DubSettings(longer_voice="loop")))
    assert found["picture"] == ("ok", "96 x 64, 2.00 s, 50 frames at 25 a second of 50 in the file")
    assert found["voice"] == ("ok", "3.10 s at 22050 Hz, mono: 78 frames")
    assert found["longer voice"] == ("note", "by 1.12 s: the video begins anew")
    assert found["cuts"] == ("note", "1 (1.2 s): one crop follows the face over them")
    looked = -(-50 // EVERY)
    assert found["face"][0] == "note"
    assert found["face"][1].startswith(f"none in {1 - 3 / looked:.0%} of {looked} frames")
    assert f"({3 * EVERY / 25:.1f} s" in found["face"][1]
    assert detector.closed
    assert "rate" not in found
    assert frames_of_dub(video, voice, DubSettings()) == 78
    assert frames_of_dub(video, voice, DubSettings(longer_voice="stop")) == 50
    assert frames_of_dub(video, None, DubSettings()) == count_frames(video)


def test_what_is_missing_for_a_dub_is_a_line_and_exit_code_1(
    video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: Any) -> None:
        raise UserError("its model file is missing: get it there")

    monkeypatch.setattr(clip_module, "make_detector", absent)
    assert main(["doctor", str(video)]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines()[:-1] if line.split()[1] == "face"]
    assert line.split(maxsplit=2) == ["missing", "face", "its model file is missing: get it there"]
    assert printed.endswith("missing: face\n")
    assert main(["doctor", str(video), "--landmarks", "none"]) == 0
    assert "looked at" not in capsys.readouterr().out
    monkeypatch.setattr(clip_module, "make_detector", lambda *_: Blind(0))
    assert said(clip_findings(video, None))["face"][0] == "missing"


def test_the_networks_are_counted_for_this_model_and_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model: 10 steps of the table with 11 levels, three branches, no speech network."""
    flop = {"unet": 1e9, "vae encode": 1e8, "vae decode": 2e8}
    monkeypatch.setattr(clip_module, "flop_of", lambda workload: flop[workload.name])
    monkeypatch.setattr(clip_module, "_rate", lambda dtype: 1e12)
    model = open_model(DEFAULT, only=())
    found = said(cost_findings(model, 100, DubSettings(dtype="fp32", devices=1)))
    # 8 windows between 9 keyframes, which are one call; 11 calls of three branches each.
    total = (9 * 11 * 3 * 1e9 + 100 * 3e8) / 1e12
    assert found["networks"][1].startswith(f"{total:.3g} TFLOP (keyframe 0.033, interpolation 0.264,")
    assert found["networks"][1].endswith("fp32, 1 x cpu")
    assert found["time"][1].startswith("about 1 s for the networks at 50% of the 1 TFLOP/s")


def test_an_installation_names_what_lacks_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "program").write_bytes(bytes(2**20))
    monkeypatch.setenv("KEYSYNC_CACHE", str(tmp_path))
    found = said(installation())
    assert found["codecs"] == ("ok", "libx264 and aac")
    assert "compiled 0.00" in found["cache"][1]
    assert found["mediapipe"][0] == "missing"  # Its model file is not in this cache.
    assert "--allow-download" in found["mediapipe"][1]
    monkeypatch.setattr(installation_module, "find_spec", lambda name: None)
    bare = said(installation())
    assert bare["to train"][1].endswith("pip install 'keysync_jax[train]'")
    assert bare["face_alignment"] == ("missing", "not installed: pip install 'keysync_jax[face-alignment]'")
    monkeypatch.setattr(installation_module, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(installation_module, "resolve_asset", lambda name: tmp_path / name)
    assert said(installation())["mediapipe"][0] == "ok"


def test_a_machine_takes_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "models/keysync"]) == 2
    assert "--model goes with a VIDEO" in capsys.readouterr().err
    assert main(["doctor", "--dtype", "bf16"]) == 2
    assert "--dtype goes with --model" in capsys.readouterr().err
    assert main(["doctor", "--allow-download"]) == 2
    assert "go with a VIDEO" in capsys.readouterr().err


def test_who_stops_reading_is_shown_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "keysync_jax.cli", "doctor"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
