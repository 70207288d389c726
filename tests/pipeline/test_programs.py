"""The programs of a dub are compiled once each, in threads, before their inputs are there."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.model import open_model
from keysync_jax.pipeline import warm as warm_module
from keysync_jax.pipeline.dub import DubSettings, dub
from keysync_jax.pipeline.programs import Compiling
from keysync_jax.pipeline.warm import warm
from tests.clips import face_landmarks, write_video, write_voice

NETWORKS = {
    "_encode": 1,
    "sample_windows": 2,
    "_decode_pixels": 1,
    **dict.fromkeys(("_first_moments", "_front", "_positions", "_distance_bias"), 1),
    **dict.fromkeys(("_keys_values", "_queries", "_attend", "_finish"), 1),
}
"""Programs that the networks of a dub are, with one speech encoder."""


@contextmanager
def compiled() -> Iterator[list[tuple[str, bool]]]:
    """Programs that are compiled, or found on disk, in the block: (function, whether ahead, in a thread)."""
    made: list[tuple[str, bool]] = []
    active = True

    def listen(event: str, duration_secs: float, **named: Any) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            name = str(named["fun_name"]).removeprefix("jit(").removesuffix(")")
            made.append((name, threading.current_thread().name.startswith("compile")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield made
    active = False


def test_a_dub_compiles_each_network_once_and_ahead_of_its_call(tiny_model: Path, tmp_path: Path) -> None:
    write_voice(tmp_path / "voice.wav", 0.6)
    write_video(tmp_path / "video.mp4", 16)
    np.save(tmp_path / "landmarks.npy", face_landmarks(16))
    model = open_model(tiny_model)
    encoders = {model.config.keyframe.audio_encoder, model.config.interpolation.audio_encoder}
    expected = {n: k * (len(encoders) if k == 1 and n not in ("_encode", "_decode_pixels") else 1)
                for n, k in NETWORKS.items()}  # fmt: skip
    inputs = (tmp_path / "video.mp4", tmp_path / "voice.wav", tmp_path / "out.mp4", model)
    jax.clear_caches()
    with compiled() as made:
        report = dub(*inputs, DubSettings(landmarks=str(tmp_path / "landmarks.npy")))
    assert Counter(name for name, _ in made if name in NETWORKS) == expected
    assert not [name for name, ahead in made if name in NETWORKS and not ahead]
    # Parameters are put onto the device without a program for each of their shapes.
    assert len(made) < sum(expected.values()) + 10
    assert report.frames == 15
    with compiled() as again:
        warm(model)
    assert not again


class Program:
    """Stands in for a lowered program; a fault is what compiling it raises."""

    def __init__(self, seconds: float = 0, fault: BaseException | None = None):
        self.seconds, self.fault, self.done = seconds, fault, False

    def __call__(self) -> "Program":
        return self

    def compile(self) -> None:
        time.sleep(self.seconds)
        if self.fault is not None:
            raise self.fault
        self.done = True


def test_phases_wait_for_their_own_programs_and_faults_come_where_they_are_needed() -> None:
    quick, slow, broken = Program(), Program(0.4), Program(fault=RuntimeError("RESOURCE_EXHAUSTED"))
    phases: Any = {"one": [quick], "two": [slow], "three": [broken], "four": [Program()]}
    start = time.perf_counter()
    with Compiling(phases, "fp32", {"four"}) as compiling:
        compiling.wait("one")
        assert quick.done
        assert time.perf_counter() - start < 0.3
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            compiling.wait("three")
        compiling.wait("two")
        assert slow.done
        compiling.wait("four")
        assert not phases["four"][0].done


def test_what_has_not_begun_is_left_out_when_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    phases: Any = {"all": [Program(0.2) for _ in range(50)]}
    with suppress(KeyboardInterrupt), Compiling(phases, "fp32"):
        time.sleep(0.05)
        raise KeyboardInterrupt
    assert sum(program.done for program in phases["all"]) == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("compile")]


def test_warm_compiles_for_the_settings_that_programs_depend_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []

    def programs(config: Any, dtype: str, sampling: Any, frames_per_call: int, plan: Any, **_: Any) -> Any:
        made.append((dtype, len(sampling.sigmas), sampling.in_turn, frames_per_call, len(plan.windows)))
        made.append({"all": [Program(), Program()]})
        return made[-1]

    monkeypatch.setattr(warm_module, "programs", programs)
    options = ["--memory", "small", "--steps", "11", "--dtype", "bf16", "--seconds", "5"]
    assert main(["warm", str(tiny_model), *options]) == 0
    assert made[0] == ("bf16", 12, True, 1, 10)
    assert all(program.done for program in made[1]["all"])
    assert "compiled 0 programs" in capsys.readouterr().out
    for wrong, sentence in (("--seconds=0", "more than 0 seconds"), ("--steps=3", "at least 10 steps")):
        assert main(["warm", str(tiny_model), wrong]) == 2
        assert sentence in capsys.readouterr().err
