"""The whole path from a video and a voice to the dubbed file, with a tiny model."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import jax
import jax.monitoring
import numpy as np
import pytest

from keysync_jax.backend import computing
from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.media import video as video_module
from keysync_jax.media.composite import paste, pasted_region
from keysync_jax.media.playback import pingpong_frames, played_frames
from keysync_jax.media.timeline import source_index
from keysync_jax.media.video import probe_video, read_frames
from keysync_jax.media.writer import VideoWriter
from keysync_jax.model import Model, open_model
from keysync_jax.pipeline import dub as dub_module
from keysync_jax.pipeline import encoding, generate, latents
from keysync_jax.pipeline.devices import Devices
from keysync_jax.pipeline.dub import DubReport, DubSettings, dub
from keysync_jax.pipeline.flow import Clock
from keysync_jax.pipeline.generate import Features, check_features
from keysync_jax.pipeline.identity import Identity
from keysync_jax.pipeline.latents import decode_latents
from keysync_jax.pipeline.phases import Phases
from keysync_jax.pipeline.sampling import sample_windows
from keysync_jax.pipeline.source import probe_source
from keysync_jax.pipeline.windows import merge_windows
from keysync_jax.pipeline.workspace import Workspace
from tests.clips import face_landmarks, write_video, write_voice

FRAMES = 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video, its landmarks and a voice of 1.1 s, which is 28 frames."""
    folder = tmp_path_factory.mktemp("clip")
    write_voice(folder / "voice.wav", 1.1)
    write_voice(folder / "longer.wav", 1.9)
    write_video(folder / "video.mp4", FRAMES)
    np.save(folder / "landmarks.npy", face_landmarks(FRAMES))
    return folder


def settings(clip: Path, **changes: Any) -> DubSettings:
    return DubSettings(**{"landmarks": str(clip / "landmarks.npy"), **changes})


class Captured:
    """The frames given to the encoder and the geometry they were pasted with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.frames: list[np.ndarray] = []
        self.geometry: Any = None
        begin, write, composed = VideoWriter.__init__, VideoWriter.write, dub_module.composed

        def keep_frame(writer: VideoWriter, frame: np.ndarray) -> None:
            self.frames.append(frame.copy())
            write(writer, frame)

        def keep_geometry(originals: Any, generated: Any, geometry: Any, *rest: Any) -> Iterator[np.ndarray]:
            self.geometry = geometry
            return composed(originals, generated, geometry, *rest)

        # What is given to the encoder does not depend on how hard it works.
        monkeypatch.setattr(VideoWriter, "__init__", partialmethod(begin, preset="ultrafast"))
        monkeypatch.setattr(VideoWriter, "write", keep_frame)
        monkeypatch.setattr(dub_module, "composed", keep_geometry)


def described(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        samples = sum(f.samples for f in container.decode(audio))
        container.seek(0)
        return {
            "size": (video.width, video.height),
            "fps": video.average_rate,
            "frames": sum(1 for _ in container.decode(video)),
            "rate": audio.rate,
            "samples": samples,
        }


def assert_untouched_outside(captured: Captured, video: Path, count: int, source_frames: int) -> None:
    """Bit-identical to the source outside the pasted region, changed inside it."""
    originals = pingpong_frames(video, count)
    for i, (frame, original) in enumerate(zip(captured.frames, originals, strict=True)):
        at = source_index(i, source_frames)
        geometry = captured.geometry
        region = pasted_region(geometry.masks[at], geometry.boxes[at], frame.shape)
        assert 0 < region.mean() < 0.9
        differs = cv2.absdiff(frame, original) > 0
        assert not differs[~region].any()
        # Nothing differs elsewhere, so all that does lies in the region.
        assert np.count_nonzero(differs) > 0.5 * 3 * np.count_nonzero(region)


def test_dub_covers_the_voice_and_leaves_the_rest_alone(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = Captured(monkeypatch)
    output = tmp_path / "out.mp4"
    report = dub(clip / "video.mp4", clip / "voice.wav", output, tiny_model, settings(clip))
    assert report.frames == 28
    assert report.frames_without_face == 0
    # Frames 0 and 25: what random weights paint has another colour than the source around it.
    assert report.border is not None
    assert report.border > 1
    found = described(output)
    assert found | {"samples": 0} == {
        "size": (96, 80), "fps": Fraction(25), "frames": 28, "rate": 22_050, "samples": 0,
    }  # fmt: skip
    assert found["samples"] >= round(1.1 * 22_050)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert_untouched_outside(captured, clip / "video.mp4", 28, FRAMES)


def test_what_lies_before_the_face_is_left_alone(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = Captured(monkeypatch)
    call = (clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model)
    dub(*call, settings(clip))
    plain = captured.geometry.masks
    occluder = np.zeros((FRAMES, 80, 96), np.uint8)
    occluder[5:, :, :48] = 1  # from frame 5 on, everything left of the middle
    np.save(tmp_path / "occluder.npy", occluder)
    captured.frames.clear()
    dub(*call, settings(clip, occluder=tmp_path / "occluder.npy"))
    masks, boxes = captured.geometry.masks, captured.geometry.boxes
    np.testing.assert_array_equal(masks[:5], plain[:5])
    size = masks.shape[-1]
    for mask, before, (x0, _, x1, _) in zip(masks[5:], plain[5:], boxes[5:], strict=True):
        free = x0 + np.arange(size) * (x1 - x0) / size >= 48
        np.testing.assert_array_equal(mask, before * free)
        assert mask.any()
    assert_untouched_outside(captured, clip / "video.mp4", 28, FRAMES)


class Finder:
    """A detector that finds a face in every frame, or in none; counts how often it was made."""

    def __init__(self, patch: pytest.MonkeyPatch, face: bool = True, rows: np.ndarray | None = None):
        self.made, self.face = 0, face
        self.rows = face_landmarks(FRAMES) if rows is None else rows
        patch.setattr(dub_module, "make_detector", self._make)

    def _make(self, *_: object) -> "Finder":
        self.made, self._landmarks = self.made + 1, iter(self.rows)
        return self

    def detect(self, frame: np.ndarray) -> np.ndarray | None:
        row = next(self._landmarks)
        return row if self.face and np.isfinite(row).all() else None

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("gap", "held", "passes"), [(10, 2**28, 4), (10, 1, 5)])
def test_one_pass_over_the_video_finds_the_landmarks_and_encodes(
    clip: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gap: int,
    held: int,
    passes: int,
) -> None:
    """The others: its first frame, its timeline, the dub. Only a gap too long to hold costs one more."""
    landmarks = face_landmarks(FRAMES)
    landmarks[4 : 4 + gap] = np.nan
    np.save(tmp_path / "landmarks.npy", landmarks)
    opened: list[Path] = []
    made: list[np.ndarray] = []
    open_video = video_module.open_video
    for chosen in (DubSettings(landmarks=str(tmp_path / "landmarks.npy")), DubSettings()):
        with monkeypatch.context() as patch:
            patch.setattr(video_module, "open_video", lambda path: opened.append(path) or open_video(path))
            Finder(patch, rows=landmarks)
            patch.setattr(encoding, "HELD_BYTES", held)
            captured = Captured(patch)
            opened.clear()
            dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model, chosen)
        made.append(np.stack(captured.frames))
    assert len(opened) == passes
    np.testing.assert_array_equal(*made)


def test_no_more_of_a_long_video_is_read_than_the_voice_needs(clip: Path, tmp_path: Path) -> None:
    voice = write_voice(tmp_path / "voice.wav", 0.6)
    whole = probe_source(clip / "video.mp4", voice)
    part = probe_source(clip / "video.mp4", voice, whole=False)
    assert (len(whole.timeline), len(part.timeline)) == (FRAMES, 27)
    np.testing.assert_array_equal(part.timeline.index, whole.timeline.index[:27])
    np.testing.assert_array_equal(part.shown, whole.shown)
    assert part.used == whole.used == 27


def test_bad_masks_cost_no_landmarks(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**changes: Any) -> None:
        dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", model, DubSettings(**changes))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model, finder = open_model(tiny_model), Finder(monkeypatch)
    kept = tmp_path / ".out.mp4.work/landmarks.npy"
    monkeypatch.setattr(dub_module, "audio_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert kept.is_file()
    np.save(tmp_path / "short.npy", np.zeros((FRAMES - 1, 80, 96), np.uint8))
    with pytest.raises(UserError, match=r"short.npy: holds uint8 \[29, 80, 96\], the video's masks"):
        run(occluder=tmp_path / "short.npy")
    assert kept.is_file()
    assert finder.made == 1
    with pytest.raises(KeyboardInterrupt):
        run()
    assert finder.made == 1
    # Of a .npz it shows only while it is read that a frame is damaged.
    masks = tmp_path / "damaged.npz"
    np.savez(masks, occluder=np.full((FRAMES, 80, 96), 1, np.uint8))
    masks.write_bytes(masks.read_bytes().replace(bytes([1] * 80), bytes([1] * 79 + [2]), 1))
    with pytest.raises(UserError, match="Bad CRC-32"):
        run(occluder=masks)
    assert finder.made == 2
    assert kept.is_file()


def test_a_run_without_a_face_leaves_nothing(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = Finder(monkeypatch, face=False)
    with pytest.raises(UserError, match="no face was found"):
        dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model)
    assert finder.made == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(16, 11)], ids=str)
def test_anamorphic_video_keeps_its_pixels(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aspect: Fraction
) -> None:
    """The crop shows a square of the scene; the output has the source's size, aspect and other pixels."""
    video, output = tmp_path / "video.mp4", tmp_path / "out.mp4"
    with VideoWriter(video, 96, 80, aspect=aspect) as writer:
        for frame in pingpong_frames(clip / "video.mp4", FRAMES):
            writer.write(frame)
    captured = Captured(monkeypatch)
    dub(video, clip / "voice.wav", output, tiny_model, settings(clip))
    width, height = (captured.geometry.boxes[:, 2:] - captured.geometry.boxes[:, :2]).T
    assert (np.abs(width * float(aspect) - height) <= float(aspect)).all()
    assert (width < height).all()
    assert_untouched_outside(captured, video, 28, FRAMES)
    info = probe_video(output)
    assert (info.width, info.height, info.aspect) == (96, 80, aspect)


def test_a_longer_voice_compiles_nothing_new_and_plays_the_video_to_and_fro(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "a.mp4", tiny_model, settings(clip))
    captured = Captured(monkeypatch)
    made: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        # Announced for a program that is found on disk too, so a warm cache cannot hide a new shape.
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    second = dub(clip / "video.mp4", clip / "longer.wav", tmp_path / "b.mp4", tiny_model, settings(clip))
    assert second.frames == 48 > first.frames
    assert len(made) == 0
    jax.jit(lambda x: x * 5 - 2)(np.ones(3))  # the listener does hear a program that is new
    assert len(made) == 1
    assert_untouched_outside(captured, clip / "video.mp4", 48, FRAMES)
    table = second.phases.table()
    assert "compose" in table
    assert "GiB" in table


def test_the_same_call_gives_the_same_frames_and_another_seed_others(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frames(**changes: Any) -> np.ndarray:
        with monkeypatch.context() as patch:
            captured = Captured(patch)
            dub(
                clip / "video.mp4",
                clip / "voice.wav",
                tmp_path / "o.mp4",
                tiny_model,
                settings(clip, **changes),
            )
        return np.stack(captured.frames)

    once = frames()
    np.testing.assert_array_equal(frames(), once)
    assert (frames(seed=1) != once).any()


@pytest.mark.parametrize(("longer", "frames"), [("loop", 48), ("stop", FRAMES)])
def test_a_longer_voice_finds_the_video_as_it_is_told(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: Any, frames: int
) -> None:
    captured, output = Captured(monkeypatch), tmp_path / "out.mp4"
    how = settings(clip, longer_voice=longer, provenance=longer == "loop")
    assert dub(clip / "video.mp4", clip / "longer.wav", output, tiny_model, how).frames == frames
    forward = list(read_frames(clip / "video.mp4"))
    for i, frame in enumerate(captured.frames):
        at = source_index(i, FRAMES, longer)
        region = pasted_region(captured.geometry.masks[at], captured.geometry.boxes[at], frame.shape)
        np.testing.assert_array_equal(frame[~region], forward[at][~region])
    found = described(output)
    assert found["frames"] == len(captured.frames) == frames
    heard = frames / 25 if longer == "stop" else 1.9
    assert abs(found["samples"] / 22_050 - heard) < 0.1  # AAC's frames of 1,024 and its priming.
    with av.open(str(output)) as container:
        said = container.metadata.get("comment", "")
    assert ("mouth in this video is synthetic" in said) == (longer == "loop")
    assert (open_model(tiny_model, only=()).fingerprint[:16] in said) == (longer == "loop")


def test_frames_without_a_face_pass_through(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landmarks = face_landmarks(FRAMES)
    landmarks[3] = np.nan  # bridged
    landmarks[10:] = np.nan  # too long to bridge
    np.save(tmp_path / "gaps.npy", landmarks)
    captured = Captured(monkeypatch)
    gaps = settings(clip, landmarks=str(tmp_path / "gaps.npy"))
    report = dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model, gaps)
    assert report.frames_without_face == 18
    originals = list(pingpong_frames(clip / "video.mp4", 28))
    changed = [bool((a != b).any()) for a, b in zip(captured.frames, originals, strict=True)]
    assert changed == [True] * 10 + [False] * 18


def test_only_shown_faces_are_decoded_and_the_frames_are_those_of_whole_windows(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reference does it: every window decoded, the frames that two share averaged, then rounded."""
    landmarks = face_landmarks(FRAMES)
    landmarks[5:20] = np.nan
    np.save(tmp_path / "gaps.npy", landmarks)
    decoded: list[int] = []
    windows: list[np.ndarray] = []
    call, compose, captured = Devices.run, dub_module._Run._compose, Captured(monkeypatch)

    def counted(devices: Devices, function: Any, network: Any, rows: Any, *given: Any) -> Any:
        decoded.append(len(rows) if function is latents._decode_pixels else 0)
        return call(devices, function, network, rows, *given)

    def keep(run: Any, made: Iterator[np.ndarray], *given: Any) -> None:
        windows.append(np.stack(list(made)))
        compose(run, iter(windows[0]), *given)

    monkeypatch.setattr(Devices, "run", counted)
    monkeypatch.setattr(dub_module._Run, "_compose", keep)
    gaps = settings(clip, landmarks=str(tmp_path / "gaps.npy"))
    dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model, gaps)
    assert sum(decoded) == 14  # 13 of 28 frames, in calls of two; the three windows have 42
    geometry, vae = captured.geometry, open_model(tiny_model).load("vae")
    with computing("fp32"):
        faces = list(merge_windows(decode_latents(vae, window) for window in windows[0]))
    for i, original in enumerate(pingpong_frames(clip / "video.mp4", 28)):
        face = np.rint(np.clip(faces[i], 0, 255)).astype(np.uint8)
        pasted = paste(original, face, geometry.masks[i], geometry.boxes[i])
        np.testing.assert_array_equal(captured.frames[i], pasted if geometry.present[i] else original)


def test_the_video_is_read_while_the_dub_is_written(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write, play = threading.Event(), VideoWriter.write, played_frames
    seen: list[bool] = []

    def reading(*given: Any, **options: Any) -> Iterator[np.ndarray]:
        for i, frame in enumerate(play(*given, **options)):
            if i == 6:
                read.set()
            yield frame

    def writing(writer: VideoWriter, frame: np.ndarray) -> None:
        seen.append(read.wait(0 if seen else 20))
        write(writer, frame)

    monkeypatch.setattr(dub_module, "played_frames", reading)
    monkeypatch.setattr(VideoWriter, "write", writing)
    report = dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model, settings(clip))
    assert seen[0]
    phases = {phase.name: phase for phase in report.phases.done}
    parts = {
        "encode": {"device", "decoder"},
        "keyframes": {"device"},
        "compose": {"device", "decoder", "encoder"},
    }
    for name, used in parts.items():
        assert phases[name].busy.keys() == used
        assert all(0 < busy < phases[name].seconds for busy in phases[name].busy.values())


@pytest.mark.parametrize("memory", ["balanced", "small"])
def test_the_dub_is_written_while_windows_are_sampled(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Any
) -> None:
    """With little memory the windows come first, and the stage is gone when faces are decoded."""
    written, run, write = threading.Event(), Devices.run, VideoWriter.write
    seen: list[bool] = []

    def sample(devices: Devices, function: Any, network: Any, rows: Any, *given: Any) -> Any:
        if not function.__name__.startswith("sample_windows"):
            return run(devices, function, network, rows, *given)
        seen.append(written.wait(20 if memory == "balanced" and len(seen) == 4 else 0))
        return rows.noise

    def writing(writer: VideoWriter, frame: np.ndarray) -> None:
        write(writer, frame)
        written.set()

    monkeypatch.setattr(dub_module, "programs", lambda *_: {})
    monkeypatch.setattr(Devices, "run", sample)
    monkeypatch.setattr(VideoWriter, "write", writing)
    chosen = settings(clip, memory=memory)
    report = dub(clip / "video.mp4", clip / "longer.wav", tmp_path / "out.mp4", tiny_model, chosen)
    # One call of keyframes, four windows; the last is sampled once the first has been written.
    assert len(seen) == 5
    assert seen[-1] == (memory == "balanced")
    assert ("interpolation" in [phase.name for phase in report.phases.done]) == (memory == "small")


@pytest.mark.parametrize("stop_in", ["keyframes", "interpolation", "compose"])
def test_an_interrupted_dub_goes_on_where_it_was(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_in: str
) -> None:
    def run(output: str, patch: pytest.MonkeyPatch) -> tuple[DubReport, np.ndarray]:
        captured = Captured(patch)
        report = dub(clip / "video.mp4", clip / "longer.wav", tmp_path / output, tiny_model, settings(clip))
        return report, np.stack(captured.frames)

    with monkeypatch.context() as patch:
        _, whole = run("whole.mp4", patch)
    with monkeypatch.context() as patch:
        stop(patch, stop_in)
        with pytest.raises(KeyboardInterrupt):
            run("out.mp4", patch)
    assert not (tmp_path / "out.mp4").exists()
    assert (tmp_path / ".out.mp4.work").is_dir()
    calls: list[bool] = []
    with monkeypatch.context() as patch:
        run_call = Devices.run

        def counted(devices: Devices, function: Any, *given: Any) -> Any:
            calls.append(function is sample_windows)
            return run_call(devices, function, *given)

        patch.setattr(Devices, "run", counted)
        _report, frames = run("out.mp4", patch)
    np.testing.assert_array_equal(frames, whole)
    assert sum(calls) == {"keyframes": 1 + 4, "interpolation": 3, "compose": 0}[stop_in]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "whole.mp4"]


def stop(patch: pytest.MonkeyPatch, phase: str) -> None:
    """Ctrl-C in the keyframe call, after the first interpolation window, or when all are sampled."""
    run, calls = Devices.run, []

    def sample_and_stop(devices: Devices, function: Any, *given: Any) -> Any:
        calls.append(function is sample_windows)
        if calls[-1] and sum(calls) == {"keyframes": 1, "interpolation": 3}.get(phase):
            raise KeyboardInterrupt
        return run(devices, function, *given)

    write = VideoWriter.write

    def write_and_stop(writer: VideoWriter, frame: np.ndarray) -> None:
        if writer.frames == 40:  # of the fourth window, the last
            raise KeyboardInterrupt
        write(writer, frame)

    patch.setattr(Devices, "run", sample_and_stop)
    if phase == "compose":
        patch.setattr(VideoWriter, "write", write_and_stop)


def test_features_of_the_wrong_encoder_are_refused(tiny_model: Path) -> None:
    config = open_model(tiny_model).config.keyframe
    with pytest.raises(UserError, match="trained on hubert features, it was given wavlm features"):
        check_features(config, Features("wavlm", np.zeros((14, 2, 768), np.float32)), 14)
    with pytest.raises(UserError, match=r"shape \[14, 2, 768\], not \[13, 2, 768\]"):
        check_features(config, Features("hubert", np.zeros((13, 2, 768), np.float32)), 14)


def test_windows_per_call_do_not_change_the_result(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frames(n: int) -> np.ndarray:
        with monkeypatch.context() as patch:
            captured = Captured(patch)
            changed = settings(clip, windows_per_call=n)
            dub(clip / "video.mp4", clip / "longer.wav", tmp_path / "o.mp4", tiny_model, changed)
        return np.stack(captured.frames).astype(int)

    assert np.abs(frames(1) - frames(3)).max() <= 1


BAD = {
    "unreadable video": ({"video": "text.mp4"}, "text.mp4"),
    "script that leads to a video": ({"video": "script.mp4"}, "no media file"),
    "script that leads to a voice": ({"audio": "script.mp4"}, "no media file"),
    "missing video": ({"video": "nowhere.mp4"}, "nowhere.mp4"),
    "video without a picture": ({"video": "voice.wav"}, "no video stream"),
    "unreadable voice": ({"audio": "text.mp4"}, "text.mp4"),
    "voice without sound": ({"audio": "video.mp4"}, "no audio stream"),
    "empty voice": ({"audio": "empty.wav"}, "empty.wav"),
    "zero frames": ({"video": "empty.mp4"}, "empty.mp4"),
    "no face": ({"landmarks": "faceless.npy"}, "no face was found"),
    "short landmarks": ({"landmarks": "short.npy"}, "landmarks for 5 frames, but the video has 30"),
    "no landmarks": ({"landmarks": "nowhere.npy"}, "nowhere.npy does not exist"),
    "no model": ({"model": "nowhere"}, "not a model directory"),
    "output folder": ({"output": "nowhere/out.mp4"}, "nowhere does not exist"),
    "output is a folder": ({"output": "folder.mp4"}, "it is a folder"),
    "output suffix": ({"output": "out.txt"}, "must end in one of"),
    "steps": ({"--steps": "9"}, "at least 10 steps"),
    "zero steps": ({"--steps": "0"}, "at least 10 steps"),
    "quality": ({"--quality": "60"}, "0 (lossless) to 51"),
    "windows": ({"--windows-per-call": "0"}, "at least 1 window"),
    "no devices": ({"--devices": "0"}, "at least 1 device"),
    "more devices than there are": ({"--devices": "999"}, "999 devices were asked for, but this host has"),
}


def without_pictures(mp4: bytes) -> bytes:
    """The same file with zeros in place of its coded frames."""
    start = mp4.index(b"mdat") + 4
    stop = start - 8 + int.from_bytes(mp4[start - 8 : start - 4], "big")
    return mp4[:start] + bytes(stop - start) + mp4[stop:]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    clip: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    changes, sentence = BAD[case]
    folder = Path(shutil.copytree(clip, tmp_path / "inputs"))
    (folder / "text.mp4").write_text("not a video")
    (folder / "script.mp4").write_text("ffconcat version 1.0\nfile video.mp4\n")
    (folder / "folder.mp4").mkdir()
    write_voice(folder / "empty.wav", 0)
    (folder / "empty.mp4").write_bytes(without_pictures((folder / "video.mp4").read_bytes()))
    np.save(folder / "faceless.npy", np.full((FRAMES, 68, 2), np.nan, np.float32))
    np.save(folder / "short.npy", face_landmarks(5))
    before = sorted(folder.rglob("*"))
    options = {"video": "video.mp4", "audio": "voice.wav", "output": "out.mp4", "landmarks": "landmarks.npy"}
    files = {k: str(folder / v) for k, v in {**options, **changes}.items() if k in options}
    model = str(folder / changes["model"]) if "model" in changes else str(tiny_model)
    command = ["dub", files["video"], files["audio"], "-o", files["output"], "--model", model]
    command += ["--landmarks", files["landmarks"]]
    command += [x for k, v in changes.items() if k.startswith("--") for x in (k, v)]
    assert main(command) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("keysync: "), error
    assert sentence in last
    assert "Traceback" not in error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("landmarks", ["file", "mediapipe"])
def test_the_real_clip(
    real: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landmarks: str
) -> None:
    if landmarks == "mediapipe":
        pytest.importorskip("mediapipe")
        chosen = DubSettings(landmarks="mediapipe", landmark_model=real / "face_landmarker.task")
    else:
        chosen = DubSettings(landmarks=str(real / "demo1_landmarks.npy"))
    captured = Captured(monkeypatch)
    output = tmp_path / "out.mp4"
    report = dub(real / "demo1_video.mp4", real / "demo1_audio.wav", output, tiny_model, chosen)
    found = described(output)
    assert found["size"] == (1080, 1920)
    assert found["fps"] == 25
    assert found["frames"] == report.frames == 240
    assert found["rate"] == 16_000
    assert found["samples"] >= 153_600
    assert_untouched_outside(captured, real / "demo1_video.mp4", 240, 250)


def test_the_report_counts_time_programs_and_memory() -> None:
    import jax.numpy as jnp

    phases = Phases(show=False)
    with phases.phase("one", 2, "units") as advance:
        now = time.time()  # so that the program is in no store
        jax.jit(lambda x: x * 3 + now)(jnp.ones(7))
        advance(2)
    with phases.phase("two", 1, "units"):
        pass
    one, two = phases.done
    assert one.compiled >= 1
    assert one.seconds > one.compile_seconds > 0
    assert two.compiled == 0
    assert two.peak_bytes >= one.peak_bytes > 2**26
    assert "device" not in phases.table()
    with phases.phase("three", 1, "units", encoder=Clock(0.25), device=Clock(1000)):
        time.sleep(0.3)
    heading, first, *_, third, _total = phases.table().splitlines()
    assert heading.split()[-2:] == ["device", "encoder"]
    assert first.endswith("GiB")
    assert third.split()[-6:-2] == ["1000.0", "/", "0.0", "0.2"]  # busy / waiting seconds


def test_a_full_disk_is_noticed_before_anything_is_mapped(
    clip: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    command = ["dub", str(clip / "video.mp4"), str(clip / "voice.wav"), "-o", str(tmp_path / "out.mp4")]
    command += ["--model", str(tiny_model), "--landmarks", str(clip / "landmarks.npy")]
    assert main(command) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["video.mp4", "voice.wav"])
def test_an_input_is_not_overwritten(clip: Path, tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "inputs"))
    (folder / "voice.wav").rename(folder / "voice.mp4")
    output = folder / name.replace(".wav", ".mp4")
    before = output.read_bytes()
    with pytest.raises(UserError, match="it is an input"):
        dub(folder / "video.mp4", folder / "voice.mp4", output, tiny_model, settings(clip))
    assert output.read_bytes() == before


def test_two_runs_do_not_share_a_workspace(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out.mp4", {"seed": 1}) as first:
        with pytest.raises(UserError, match=r"out.mp4: another run is making it now"):
            Workspace(tmp_path / "out.mp4", {"seed": 1})
        first.array("rows", (3, 2)).append(np.ones((2, 2)))
    with Workspace(tmp_path / "out.mp4", {"seed": 1}) as again:
        assert again.resumed
        assert again.array("rows", (3, 2)).done == 2
        again.remove()
    assert not list(tmp_path.iterdir())
    with Workspace(tmp_path / "out.mp4", {"seed": 2}) as other:
        assert not other.resumed


def altered_model(model: Model, **changes: Any) -> Model:
    return replace(model, config=replace(model.config, **changes))


def test_what_is_kept_is_bound_to_everything_it_depends_on(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = open_model(tiny_model), tmp_path / "face.task"
    weights.write_bytes(b"one")
    chosen = DubSettings(landmark_model=weights, dtype="fp32")
    source: Any = SimpleNamespace(video=clip / "video.mp4", voice=clip / "voice.wav")
    sampling: Any = SimpleNamespace(sigmas=np.array([1.0, 0.0]))

    def kept(model: Model, chosen: DubSettings = chosen, identity: str = "first") -> str:
        who = Identity(identity, identity)
        return json.dumps(dub_module._fingerprint(source, model, chosen, sampling, who), sort_keys=True)

    first, config = kept(model), model.config
    assert kept(open_model(tiny_model)) == first
    unet = replace(config.keyframe.unet, head_dim=8)
    others = [
        kept(altered_model(model, vae=replace(config.vae, scale_factor=0.2))),
        kept(altered_model(model, keyframe=replace(config.keyframe, unet=unet))),
        kept(model, replace(chosen, dtype="bf16")),
        kept(model, replace(chosen, landmark_model=None)),
        kept(model, identity="current"),
    ]
    weights.write_bytes(b"two")
    others.append(kept(model))
    weights.write_bytes(b"one")
    assert kept(model) == first
    monkeypatch.setattr("keysync_jax.pipeline.environment.code_digest", lambda *_: "0" * 64)
    others.append(kept(model))
    assert len({first, *others}) == 8


def test_the_identity_frame_is_the_first_with_a_face(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landmarks = face_landmarks(FRAMES)
    landmarks[:14] = np.nan
    np.save(tmp_path / "late.npy", landmarks)
    seen = []
    run = generate.keyframes
    monkeypatch.setattr(
        dub_module, "keyframes", lambda net, clip, *a: seen.append(clip) or run(net, clip, *a)
    )
    late = settings(clip, landmarks=str(tmp_path / "late.npy"))
    dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "out.mp4", tiny_model, late)
    assert seen[0].identity == 14


def test_what_shows_who_it_is_can_be_chosen(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame, each frame itself, a picture: what the keyframe stage is given."""
    given: list[np.ndarray] = []

    def stopping(network: Any, inputs: Any, *rest: Any) -> Any:
        given.append(np.asarray(inputs(0).reference))
        raise InterruptedError

    monkeypatch.setattr(generate, "_sampled", stopping)
    picture = tmp_path / "face.png"
    cv2.imwrite(str(picture), np.full((64, 64, 3), 90, np.uint8))
    for number, identity in enumerate(("first", "current", "26", str(picture))):
        chosen = settings(clip, identity=identity)
        with pytest.raises(InterruptedError):
            dub(clip / "video.mp4", clip / "voice.wav", tmp_path / f"{number}.mp4", tiny_model, chosen)
    first, current, numbered, pictured = given
    assert [len(reference) for reference in given] == [1, 14, 1, 1]
    # The call's frames are an anchor, frame 0, and the keyframes 0, 13, 26 ...
    np.testing.assert_array_equal(current[0], first[0])
    np.testing.assert_array_equal(current[3], numbered[0])
    assert not np.array_equal(first, numbered)
    assert not np.array_equal(first, pictured)


def test_a_dub_whose_reference_is_the_current_frame_is_another(
    clip: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Captured(monkeypatch)
    for identity in ("first", "current"):
        out = tmp_path / f"{identity}.mp4"
        dub(clip / "video.mp4", clip / "voice.wav", out, tiny_model, settings(clip, identity=identity))
    half = len(kept.frames) // 2
    assert half == 28
    assert not np.array_equal(kept.frames[:half], kept.frames[half:])


@pytest.mark.parametrize(
    ("identity", "sentence"),
    [("30", "30 frames of the video, 0 to 29"), ("nobody", "neither first")],
)
def test_an_identity_that_is_not_there_is_refused(
    clip: Path, tiny_model: Path, tmp_path: Path, identity: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        dub(
            clip / "video.mp4",
            clip / "voice.wav",
            tmp_path / "out.mp4",
            tiny_model,
            settings(clip, identity=identity),
        )
    assert not list(tmp_path.iterdir())


def test_dissimilar_lips_are_the_farthest_from_all() -> None:
    landmarks = np.repeat(face_landmarks(1), 6, axis=0) + np.arange(6)[:, None, None]
    landmarks[4, 57] += (0, 9)
    present, chosen = np.ones(6, bool), Identity("dissimilar", "dissimilar")
    assert chosen.choose(landmarks, present, DubSettings(), 64) == 4
    present[4] = False
    landmarks[2, 57] += (0, 2)
    assert chosen.choose(landmarks, present, DubSettings(), 64) == 2
    drawn = {Identity("random", "").choose(landmarks, present, DubSettings(seed=s), 64) for s in range(40)}
    assert drawn == {0, 1, 2, 3, 5}
