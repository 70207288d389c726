"""What the machine does wrong costs no clip: the run ends, and the same command goes on to make them all."""

import builtins
import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.data import faces as faces_module
from keysync_jax.data import from_precomputed, from_videos
from keysync_jax.data.faces import Task, cut_all
from keysync_jax.data.prepare import PrepareSettings, prepare
from keysync_jax.data.sources import Clip, find_clips
from keysync_jax.errors import UserError
from keysync_jax.media import container as container_module
from tests.clips import face_landmarks, write_video, write_voice
from tests.data.preparing import contents, write_good
from tests.data.test_prepare_sources import write_reference_layout

CROPS = PrepareSettings(crop=16)

NUMBERS = [
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EROFS,
    errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT,
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good") / "clips")


@pytest.fixture(scope="module")
def prepared(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the dataset that undisturbed runs make."""
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(good, folder, settings=CROPS)
    return contents(folder)


class Faulty:
    """`open`, which fails once: the time of that `number` at which a file of the clip a10 is opened."""

    def __init__(self, error: OSError, number: int = 0):
        self.error, self.left = error, number + 1

    def __call__(self, file: Any, *arguments: Any, **named: Any) -> Any:
        if Path(str(file)).stem == "a10":
            self.left -= 1
            if self.left == 0:
                raise self.error
        return OPEN(file, *arguments, **named)

    def put(self, patch: pytest.MonkeyPatch) -> None:
        for module in (builtins, io):
            patch.setattr(module, "open", self)


OPEN = open


def fails_and_goes_on(
    good: Path, output: Path, faulty: Faulty, prepared: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether a run ends at the fault; if so, it has lost nothing and goes on."""
    with monkeypatch.context() as patch:
        faulty.put(patch)
        try:
            prepare(good, output, settings=CROPS)
        except OSError as error:
            found = error.errno, str(error.filename)[-13:-3]
        else:
            return False
    assert found == (faulty.error.errno, "clips/a10.")
    assert not (output / "manifest.json").exists()
    assert len(list((output / ".work/parts").glob("*.arrayrecord"))) == 1
    report = prepare(good, output, settings=CROPS)
    assert (report.done, report.skipped) == (3, ())
    assert contents(output) == prepared
    return True


@pytest.mark.parametrize("number", NUMBERS)
def test_an_error_of_the_machine_loses_no_clip(
    good: Path, prepared: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    error = OSError(number, os.strerror(number), str(good / "a10.mp4"))
    assert fails_and_goes_on(good, tmp_path / "dataset", Faulty(error), prepared, monkeypatch)


def test_it_may_come_up_anywhere(
    good: Path, prepared: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file of the clip is being opened: for the picture, the sound, the landmarks, the hash."""
    for number in range(30):
        error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        output = tmp_path / str(number)
        if not fails_and_goes_on(good, output, Faulty(error, number), prepared, monkeypatch):
            break
    assert 6 <= number < 29
    assert contents(output) == prepared


@pytest.mark.parametrize("name", ["encode_frame", "write_part"])
def test_a_disk_that_cannot_be_written_loses_no_clip(
    good: Path, prepared: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "part")

    with monkeypatch.context() as patch:
        patch.setattr(from_videos, name, fail)
        with pytest.raises(OSError, match="quota"):
            prepare(good, tmp_path / "dataset", settings=CROPS)
    prepare(good, tmp_path / "dataset", settings=CROPS)
    assert contents(tmp_path / "dataset") == prepared


def test_the_command_says_what_failed_and_that_it_goes_on(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", str(good), "-o", str(tmp_path / "dataset"), "--crop", "16"]
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with monkeypatch.context() as patch:
        Faulty(stale).put(patch)
        assert main(command) == 2
    said = capsys.readouterr().err
    goes_on = "the same command goes on where this one was"
    assert f"keysync: {good / 'a10.mp4'}: Stale file handle; {goes_on}\n" in said
    assert "Traceback" not in said

    def fail(*_: object) -> None:
        raise MemoryError("9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(from_videos, "encode_frame", fail)
        assert main(command) == 2
    assert f"the machine: Cannot allocate memory (9 bytes); {goes_on}\n" in capsys.readouterr().err
    assert main(command) == 0
    assert "3 prepared, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), av.error.err_check],
)
def test_a_detectors_lack_of_memory_is_not_the_clips_fault(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    class Full:
        def detect(self, _: np.ndarray) -> None:
            if callable(error):
                error(-errno.EMFILE)
            raise error

        def close(self) -> None:
            pass

    shutil.copy(good / "a2.mp4", tmp_path / "a2.mp4")
    for module in (faces_module, from_videos):
        monkeypatch.setattr(module, "make_detector", lambda *_: Full())
    monkeypatch.setattr(from_videos, "detector_identity", lambda *_: {})
    with pytest.raises(OSError, match=r"memory|Too many open files"):
        prepare(tmp_path / "a2.mp4", tmp_path / "dataset", settings=CROPS)


def test_a_detector_that_cannot_be_made_is_not_the_clips_fault(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the run began; in a worker it is not."""
    shutil.copy(good / "a2.mp4", tmp_path / "a2.mp4")
    monkeypatch.setattr(from_videos, "_try_detector", lambda *_: None)
    monkeypatch.setenv("KEYSYNC_CACHE", str(tmp_path / "cache"))
    for workers in (0, 1):
        with pytest.raises(UserError, match="Face Landmarker is missing"):
            prepare(
                tmp_path / "a2.mp4", tmp_path / "dataset", settings=PrepareSettings(crop=16, workers=workers)
            )


# Linux's /proc/self/mem opens, and cannot be read where nothing is mapped.
UNREADABLE = Path("/proc/self/mem")


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_ends_a_workers_run_too(good: Path, tmp_path: Path, workers: int) -> None:
    """FFmpeg takes the error for one of the file; reading the file tells."""
    clips = [find_clips(good / "a2.mp4")[0], Clip("x", UNREADABLE, "x.mp4")]
    results = cut_all(
        [Task(clip, tmp_path / clip.name, 16, 14, "mediapipe", None) for clip in clips], workers
    )
    assert not isinstance(next(results)[1], str)
    with pytest.raises(OSError, match="/proc/self/mem") as error:
        next(results)
    assert error.value.errno == errno.EIO


def truncated(folder: Path) -> Path:
    """A video cut off where FFmpeg says "Input/output error"."""
    whole, path = folder / "whole.mkv", folder / "truncated.mkv"
    write_video(whole, 20, voice=write_voice(folder / "voice.wav", 1.0))
    data = whole.read_bytes()
    for size in range(100, 1000, 50):
        path.write_bytes(data[:size])
        try:
            av.open(str(path)).close()
        except av.error.FFmpegError as error:
            if error.errno == errno.EIO:
                whole.unlink()
                return path
    raise AssertionError("FFmpeg says something else now")


def test_a_damaged_file_is_skipped_whatever_ffmpeg_says(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(good, folder)
    np.save(truncated(folder).with_suffix(".npy"), face_landmarks(20))
    report = prepare(folder, tmp_path / "dataset", settings=CROPS)
    assert report.done == 3
    assert [source for source, _ in report.skipped] == ["truncated.mkv"]
    assert "Input/output error" in report.skipped[0][1]


@pytest.mark.parametrize("number", [errno.EIO, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("lasting", [False, True])
def test_what_ffmpeg_says_once_is_not_believed(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, lasting: bool
) -> None:
    tries = []

    def open_(source: Any, *arguments: Any, **named: Any) -> Any:
        if "a10" in source.name:
            tries.append(source)
            if lasting or len(tries) == 1:
                av.error.err_check(-number, source.name)
        return opened(source, *arguments, **named)

    opened = av.open
    monkeypatch.setattr(container_module.av, "open", open_)
    report = prepare(good, tmp_path / "dataset", settings=CROPS)
    assert (report.done, len(report.skipped)) == ((2, 1) if lasting else (3, 0))
    if lasting:
        assert len(tries) == 2
        assert os.strerror(number) in report.skipped[0][1]


def test_a_lack_of_memory_that_ffmpeg_reports_is_asked_after(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(source: Any, *_: Any, **__: Any) -> Any:
        av.error.err_check(-errno.ENOMEM, source.name)

    monkeypatch.setattr(container_module.av, "open", open_)
    monkeypatch.setattr(faces_module, "_PROBED_BYTES", 2**62)
    with pytest.raises(OSError, match="Cannot allocate memory") as error:
        prepare(good, tmp_path / "dataset", settings=CROPS)
    assert error.value.errno == errno.ENOMEM


@pytest.mark.parametrize("everything", [False, True])
def test_a_clip_that_vanishes_is_skipped_and_a_disk_that_vanishes_ends_the_run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    folder, kept = tmp_path / "clips", tmp_path / "kept"
    shutil.copytree(good, folder)
    cut = faces_module._cut

    def vanish(task: Task) -> Any:
        if task.clip.name == "a10" and not kept.exists():
            kept.mkdir()
            for path in [folder / "a10.mp4"] if not everything else list(folder.iterdir()):
                shutil.move(path, kept)
        return cut(task)

    monkeypatch.setattr(faces_module, "_cut", vanish)
    if not everything:
        report = prepare(folder, tmp_path / "dataset", settings=CROPS)
        assert [source for source, _ in report.skipped] == ["a10.mp4"]
        assert "No such file" in report.skipped[0][1]
        return
    with pytest.raises(OSError, match=r"gone with all of its folder.*a10\.mp4"):
        prepare(folder, tmp_path / "dataset", settings=CROPS)
    for path in kept.iterdir():
        shutil.move(path, folder)
    assert prepare(folder, tmp_path / "dataset", settings=CROPS).done == 3


def test_a_clip_that_changes_while_it_is_read_is_not_taken(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(good, folder)

    def touch(path: Path, *_: object) -> Any:
        os.utime(path)
        return probe(path)

    probe = faces_module.probe_video
    monkeypatch.setattr(faces_module, "probe_video", touch)
    with pytest.raises(UserError, match=r"a2\.mp4: was changed while it was read"):
        prepare(folder / "a2.mp4", tmp_path / "dataset", settings=CROPS)


@pytest.mark.parametrize("name", ["read_precomputed", "write_part"])
def test_precomputed_clips_are_not_lost_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, output = tmp_path / "reference", tmp_path / "dataset"
    write_reference_layout(folder, {"a1": 20, "a10": 20})
    function = getattr(from_precomputed, name)

    def fail(*arguments: Any) -> Any:
        if "a10" in str(arguments):
            try:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            except OSError:
                raise UserError("cannot be read (Stale file handle)") from None
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(from_precomputed, name, fail)
        with pytest.raises(OSError, match=r"Stale.*a10_video_512_latent"):
            prepare(folder, output)
    assert prepare(folder, output).done == 2


def test_a_folder_that_cannot_be_read_is_not_left_out(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith("/sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PermissionError, match="/sub"):
        prepare(good, tmp_path / "dataset", settings=CROPS)


def test_a_device_without_memory_is_not_the_clips_fault(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(from_videos, "encode_frame", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        prepare(good, tmp_path / "dataset", settings=CROPS)
