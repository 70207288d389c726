"""Preparing with interruptions: killed runs go on, two do not mix, and a failing machine is no bad clip."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from keysync_jax.data import from_videos
from keysync_jax.data import parts as parts_module
from keysync_jax.data import prepare as prepare_module
from keysync_jax.data.faces import Task, cut_all
from keysync_jax.data.prepare import PrepareSettings, check, prepare
from keysync_jax.data.records import Dataset, Settings
from keysync_jax.data.sources import Clip, find_clips
from keysync_jax.errors import UserError
from keysync_jax.model import Model
from tests.data.preparing import add_clip, contents, kept_model, raise_interrupt, write_good


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return kept_model(tiny_model)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good") / "clips")


@pytest.fixture(scope="module")
def prepared_good(good: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared_good") / "dataset"
    prepare(good, folder, model)
    return folder


def test_a_clip_that_kills_its_worker_is_reported(good: Path, tmp_path: Path) -> None:
    clips = find_clips(good)
    tasks = [Task(clip, tmp_path / str(i), 16, 14, "mediapipe", None) for i, clip in enumerate(clips)]
    tasks.insert(1, Task(Deadly("x", good / "x.mp4", "x.mp4"), tmp_path / "x", 16, 14, "mediapipe", None))
    results = list(cut_all(tasks, 1))
    assert [task.clip.name for task, _ in results] == ["a2", "x", "a10", "sub/b"]
    assert [isinstance(found, str) for _, found in results] == [False, True, False, False]
    assert "ended its process" in str(results[1][1])


class Deadly(Clip):
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


KILLED = """
import os, signal, sys
from keysync_jax.data import parts
from keysync_jax.data.prepare import PrepareSettings, prepare
finish = parts.Work.finish
def finish_and_die(work, clip, part):
    finish(work, clip, part)
    if clip.name == "a10":
        os.kill(os.getpid(), signal.SIGKILL)
parts.Work.finish = finish_and_die
prepare(sys.argv[1], sys.argv[2], sys.argv[3])
"""


def test_a_killed_run_goes_on_behind_the_clips_that_are_done(
    good: Path, prepared_good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "dataset"
    command = [sys.executable, "-c", KILLED, str(good), str(output), str(model.folder)]
    assert subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="not a prepared dataset"):
        Dataset(output)
    made = []

    def counting(tasks: Sequence[Task], workers: int) -> Any:
        made.extend(task.clip.name for task in tasks)
        return cut_all(tasks, workers)

    monkeypatch.setattr(from_videos, "cut_all", counting)
    assert prepare(good, output, model).done == 3
    assert made == ["sub/b"]
    assert contents(output) == contents(prepared_good)


def test_a_run_killed_between_shards_goes_on(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "MIB", 1)
    prepare(good, tmp_path / "whole", model)
    write = parts_module.Work._shard

    def stop_at_the_second(work: Any, number: int, group: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return write(work, number, group)

    monkeypatch.setattr(parts_module.Work, "_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(good, tmp_path / "dataset", model)
    assert len(list((tmp_path / "dataset/.work/parts").glob("*.arrayrecord"))) == 2
    with pytest.raises(UserError, match="already being put together from other clips"):
        prepare(good / "sub", tmp_path / "dataset", model)
    monkeypatch.setattr(parts_module.Work, "_shard", write)
    prepare(good, tmp_path / "dataset", model)
    assert contents(tmp_path / "dataset") == contents(tmp_path / "whole")
    dataset = check(tmp_path / "dataset")
    assert [(clip.shard, clip.first) for clip in dataset.clips] == [(0, 0), (1, 0), (2, 0)]


def test_a_clip_that_changed_is_done_again(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(good, folder)
    monkeypatch.setattr(parts_module.Work, "decide", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "dataset", model)
    monkeypatch.undo()
    add_clip(folder, "a2", 25)
    assert prepare(folder, tmp_path / "dataset", model).frames == 25 + 31 + 16


def test_other_settings_do_not_mix_with_what_is_there(
    good: Path, prepared_good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds a dataset of other clips or settings"):
        prepare(good, prepared_good, model, PrepareSettings(latents="sample"))
    with pytest.raises(UserError, match="holds a dataset of other clips or settings"):
        prepare(good / "sub", prepared_good, model)
    monkeypatch.setattr(parts_module.Work, "decide", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(good, tmp_path / "begun", model)
    with pytest.raises(UserError, match="was begun with another model or other settings"):
        prepare(good, tmp_path / "begun", model, PrepareSettings(encoders=("hubert",)))


def test_a_full_disk_is_not_a_bad_clip(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(from_videos, "write_part", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(good, tmp_path / "dataset", model)


def test_a_device_that_fails_is_not_a_bad_clip(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(from_videos, "audio_features", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        prepare(good / "a2.mp4", tmp_path / "dataset", model)
    assert not list((tmp_path / "dataset/.work/crops").iterdir())


def test_a_second_run_on_the_same_output_is_refused(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, refused = tmp_path / "dataset", []
    decide = parts_module.Work.decide

    def meet_a_second(work: Any, *decided: Any) -> None:
        with pytest.raises(UserError, match="another run is preparing this dataset") as second:
            prepare(good / "a2.mp4", output, model)
        refused.append(second)
        decide(work, *decided)

    monkeypatch.setattr(parts_module.Work, "decide", meet_a_second)
    assert prepare(good / "a2.mp4", output, model).done == 1
    assert len(refused) == 1
    assert [path.name for path in sorted(output.iterdir())] == [
        "manifest.json",
        "report.json",
        "shard-00000.arrayrecord",
        "sources.json",
    ]


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    settings = Settings(16, 8, "posterior", True, None, {}, "files")
    program = (
        "import fcntl, os, signal, sys\n"
        "lock = open(sys.argv[1], 'wb')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "signal.pause()"
    )
    lock = tmp_path / "dataset/.work/lock"
    lock.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        try:
            with pytest.raises(UserError, match="another run"):
                parts_module.open_work(tmp_path / "dataset", settings, 1).__enter__()
        finally:
            other.kill()
    with parts_module.open_work(tmp_path / "dataset", settings, 1) as work:
        assert work.crops.is_dir()


@pytest.mark.parametrize("operation", ["mkdir", "open"])
def test_an_output_that_cannot_be_written(
    good: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(parts_module.Path, operation, fail)
    with pytest.raises(UserError, match=r"out: cannot be written \(Permission denied\)"):
        prepare(good / "a2.mp4", tmp_path / "out", model)
