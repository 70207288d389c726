"""The training loop: begin or go on, step, tell, save, and stop in good order."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from keysync_jax.ahead.chips import device_peak
from keysync_jax.backend import computing
from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.model import Network, model_folder, open_model
from keysync_jax.nn.functional import Make, shapes
from keysync_jax.train.attempt import Attempt
from keysync_jax.train.autoencoder import FrameSamples, VAEStep, load_teacher, make_vae
from keysync_jax.train.checkpoint import Checkpoints, settle_config
from keysync_jax.train.config import AnyTrainConfig, TrainConfig, VAETrainConfig
from keysync_jax.train.data import Samples, load
from keysync_jax.train.distill import DistillStep, TrajectorySamples
from keysync_jax.train.fits import check_alike, check_fits
from keysync_jax.train.flops import distill_step_flops, step_flops, vae_step_flops
from keysync_jax.train.hosts import decided
from keysync_jax.train.inputs import DatasetInput, Inputs, digest, inputs_of
from keysync_jax.train.logs import Logs
from keysync_jax.train.mesh import mesh_of, rows_of
from keysync_jax.train.places import Mirror, logs_folder, run_folder
from keysync_jax.train.preview import Preview
from keysync_jax.train.scatter import state_from_slices
from keysync_jax.train.sharding import (
    AnyStep,
    Run,
    jit_step,
    place_batch,
    shardings,
    state_from,
)
from keysync_jax.train.start import Weights, first_weights, load_perceptual, load_vae, random_weights
from keysync_jax.train.step import Metrics, TrainState, init_state, make_stage, make_step
from keysync_jax.train.trajectories import trajectories
from keysync_jax.typing import Params

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      step: steps done, all of them saved.
      signal: what stopped the run before its last step; None where it is complete.
    """

    step: int
    signal: int | None = None


@dataclass(frozen=True)
class Start:
    """How a run's processes came together.

    Attributes:
      began, joined: when this process began and when all had met, seconds since 1970.
      hosts: names of the processes' hosts, in their order.
    """

    began: float
    joined: float
    hosts: tuple[str, ...]


def train(
    config: AnyTrainConfig, workdir: str | Path, show: bool = True, start: Start | None = None
) -> Outcome:
    """Trains one stage, a student or a VAE, from the beginning or from the last checkpoint in `workdir`.

    A batch and all noise are functions of (seed, step), and the state is restored bit for bit, so an
    interrupted run goes through the same losses as one that was not. SIGTERM and SIGINT let the step under
    way finish and save it. On several hosts every process calls this; SIGTERM to one stops them all at the
    same step. A process that makes no step for too long (`config.watch`) ends itself with code 42.

    Args:
      workdir: folder of the run; made where it is not there. Behind a URL (`gs://...`) are its checkpoints
      and
        config; the logs are local, and copied there.
      show: draw a progress bar on stderr (process 0 alone).
      start: for the run's events.

    Raises:
      UserError: something that the config names cannot be used, does not fit the run in `workdir`, a loss
        is not finite, or a checkpoint cannot be saved or restored.
    """
    workdir = run_folder(workdir)
    start = start or Start(time.time(), time.time(), ())
    first_process = jax.process_index() == 0
    mesh = mesh_of(config)
    job = _job(config, workdir, show)
    decided(lambda: settle_config(workdir, config, job.inputs))
    mirror = Mirror(workdir, first_process)
    with ExitStack() as stack:
        stack.callback(mirror.up)
        stack.enter_context(computing(config.dtype))
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.checkpoint))
        done = checkpoints.latest or 0
        if done >= config.steps:
            return Outcome(done)
        logs_to = logs_folder(workdir)
        attempt = stack.enter_context(Attempt(config, logs_to, start.hosts))
        attempt.events.add(
            "start",
            at=start.began,
            processes=jax.process_count(),
            devices=jax.device_count(),
            hosts=list(dict.fromkeys(start.hosts)),
        )
        attempt.events.add("joined", at=start.joined)
        loader = load(config, job.samples, rows_of(mesh, config.batch_size), done)
        batches = stack.enter_context(closing(loader))
        session = _Session(job, mesh, checkpoints)
        state = session.first_state()
        attempt.events.add("ready", step=done)
        logs = stack.enter_context(Logs(logs_to, config, done, first_process, show))
        signals = stack.enter_context(StopSignals())
        return session.steps(state, done, batches, logs, signals, attempt, mirror)


class _Job(Protocol):
    """What kinds of runs differ in.

    Attributes:
      samples: number -> sample.
      make: builds the network.
      inputs: what it reads, by content.
      preview: of the stages, where one is asked for.
    """

    samples: Callable[[int], Any]
    make: Make
    inputs: Inputs
    preview: Preview | None

    @property
    def config(self) -> AnyTrainConfig: ...

    def step(self, graphdef: nnx.GraphDef, wanted: Params) -> tuple[AnyStep, int]:
        """The step of a network with parameters of these shapes, and its operations."""
        ...

    def first_weights(self) -> Weights:
        """Parameters before the first step."""
        ...


def _job(config: AnyTrainConfig, workdir: Path, show: bool) -> _Job:
    if not isinstance(config, TrainConfig):
        return _VAEJob(config)
    return _StageJob(config) if config.distill is None else _DistillJob(config, workdir, show)


class _StageJob:
    """A run that trains a stage."""

    def __init__(self, config: TrainConfig):
        self.config, self.make = config, make_stage(config)
        datasets = open_datasets(config)
        self.vae = load_vae(config) if config.loss.pixel != "none" or config.log.preview_every else None
        self.perceptual = load_perceptual(config)
        judges = {"VAE": self.vae if config.loss.pixel != "none" else None, "LPIPS": self.perceptual}
        self.inputs = inputs_of(datasets, config.audio_encoder, judges)
        self.preview: Preview | None = None
        if config.log.preview_every and self.vae is not None:
            self.preview = Preview(config, _preview_dataset(config, datasets), self.vae)
        samples = Samples(config, datasets)
        log.info("%s", samples.usable.summary())
        self.samples: Callable[[int], Any] = samples

    def step(self, graphdef: nnx.GraphDef, wanted: Params) -> tuple[AnyStep, int]:
        flops = step_flops(self.config, graphdef, wanted, self.vae, self.perceptual)
        return make_step(self.config, graphdef, self.vae, self.perceptual), flops

    def first_weights(self) -> Weights:
        return first_weights(self.config)


class _DistillJob:
    """A run that trains a student of a stage, on what its teacher does; that is made first."""

    def __init__(self, config: TrainConfig, workdir: Path, show: bool):
        assert config.distill is not None
        self.config, self.make = config, make_stage(config)
        self.preview: Preview | None = None
        folder = Path(config.distill.trajectories or workdir / "trajectories")
        made = trajectories(config, open_datasets(config) if config.data.paths else (), folder, show)
        log.info("%d samples of the teacher", len(made))
        self.samples: Callable[[int], Any] = TrajectorySamples(config, made)
        self.vae = load_vae(config) if config.distill.decodes else None
        known = made.settings
        networks = {"teacher": known.teacher, "trajectories": made.sha256}
        if self.vae is not None:
            networks["VAE"] = digest(self.vae.params)
        self.inputs = Inputs(tuple(DatasetInput(s, known.prepared_with) for s in known.data), networks)

    def step(self, graphdef: nnx.GraphDef, wanted: Params) -> tuple[AnyStep, int]:
        flops = distill_step_flops(self.config, graphdef, wanted, self.vae)
        return DistillStep(self.config, graphdef, self.vae), flops

    def first_weights(self) -> Weights:
        return first_weights(self.config)


class _VAEJob:
    """A run that trains a VAE, or a small decoder for one."""

    def __init__(self, config: VAETrainConfig):
        self.config, self.make = config, make_vae(config)
        self.preview: Preview | None = None
        datasets = [Dataset(path) for path in config.data.paths]
        self.samples: Callable[[int], Any] = FrameSamples(config, datasets)
        self.inputs = inputs_of(datasets, None, {})
        self.vae: Network | None = None
        if config.decoder is not None:
            self.vae, sha256 = load_teacher(config)
            self.inputs = replace(self.inputs, networks={"VAE": sha256})

    def step(self, graphdef: nnx.GraphDef, wanted: Params) -> tuple[AnyStep, int]:
        flops = vae_step_flops(self.config, graphdef, wanted, self.vae)
        return VAEStep(self.config, graphdef, self.vae), flops

    def first_weights(self) -> Weights:
        return random_weights(shapes(self.make)[1], self.config.seed)


def open_datasets(config: TrainConfig) -> list[Dataset]:
    """The run's datasets, checked to fit the config, the model that the run starts from, and each other."""
    if not config.data.paths:
        raise UserError("data.paths is empty: give --config.data.paths=DATASET, made by keysync prepare")
    hashes = _model_hashes(config)
    datasets = [Dataset(path) for path in config.data.paths]
    for dataset in datasets:
        check_fits(dataset, config, hashes)
    check_alike(datasets, config.audio_encoder)
    return datasets


def _model_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 by file name of the encoders and the VAE that the run starts from, where they are known.

    The VAE is that of `init.vae`; the encoders are those of the stage's model, else of the VAE's.
    """
    hashes: dict[str, str] = {}
    vae = model_folder(config.init.vae)
    if config.init.vae and (vae / "vae.safetensors").is_file():
        hashes |= open_model(vae, only=()).hashes
    if config.init.kind == "keysync" and config.init.path:
        stage = open_model(config.init.path, only=()).hashes
        hashes |= {file: sha256 for file, sha256 in stage.items() if file != "vae.safetensors"}
    return hashes


def _preview_dataset(config: TrainConfig, datasets: list[Dataset]) -> Dataset:
    if not config.log.preview_data:
        return datasets[0]
    dataset = Dataset(config.log.preview_data)
    check_fits(dataset, config, _model_hashes(config))
    return dataset


class _Session:
    """One run on one mesh: the compiled step, and what happens after each."""

    def __init__(self, job: _Job, mesh: Mesh, checkpoints: Checkpoints):
        self.job, self.config, self.preview = job, job.config, job.preview
        self.mesh, self.checkpoints = mesh, checkpoints
        self.graphdef, wanted = shapes(job.make)
        self.abstract = abstract_state(self.config, mesh, wanted)
        step, self.flops = job.step(self.graphdef, wanted)
        self.run: Run = jit_step(mesh, step, self.abstract)

    def first_state(self) -> TrainState:
        """The last checkpoint's state, else the one before the first step."""
        if self.checkpoints.latest is not None:
            return self.checkpoints.restore(self.abstract)
        begin = state_from if jax.process_count() == 1 else state_from_slices
        return begin(self.mesh, self.config, self.job.first_weights())

    def steps(
        self,
        state: TrainState,
        start: int,
        batches: Iterator[Any],
        logs: Logs,
        signals: "StopSignals",
        attempt: Attempt,
        mirror: Mirror,
    ) -> Outcome:
        """Steps until the last one or a signal; what was done last is saved."""
        config, meter = self.config, Meter(self.config, self.flops)
        for done in range(start + 1, config.steps + 1):
            attempt.begins(done)
            with attempt.spending("data"):
                rows = next(batches)
            with attempt.spending("place"):
                batch = place_batch(self.mesh, rows)
            with attempt.spending("dispatch"):
                state, metrics = self.run(state, batch)
            self._check(meter.add(done, metrics))
            if done == start + 1:
                self._check(meter.finish())
                attempt.first_step(done)
            else:
                attempt.step(done)
            stopped = signals.received(done)
            last, due = stopped is not None or done == config.steps, False
            logs.advance()
            if last or done % config.log.every == 0:
                self._check(meter.finish())
                waited, due = attempt.line(done)
                logs.metrics(done, meter.line() | waited)
            if self.preview is not None and done % config.log.preview_every == 0:
                with attempt.spending("preview"), attempt.watchdog.resting():
                    self._show(self.preview, state, done, logs)
            if last or due or done % config.checkpoint.every == 0:
                self._check(meter.finish())
                with attempt.saving(done):
                    self.checkpoints.save(
                        state, done, lambda step, at: attempt.events.add("save_end", at, step=step)
                    )
                mirror.up()
            if stopped is not None:
                attempt.stopped(signal.Signals(stopped).name)
                break
        with attempt.watchdog.resting():
            self.checkpoints.wait()
        return Outcome(done, stopped)

    def _show(self, preview: Preview, state: TrainState, step: int, logs: Logs) -> None:
        latents = preview.latents(self.mesh, self.graphdef, state)
        if jax.process_index() == 0:
            logs.preview(step, preview.picture(latents))

    def _check(self, broken: "Broken | None") -> None:
        if broken is None:
            return
        self.checkpoints.wait()
        kept = self.checkpoints.latest
        good = "there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is good"
        raise UserError(
            f"step {broken.step}: {broken.name} is {broken.value}, so training stopped; {good} "
            "(a lower optimizer.learning_rate, or dtype fp32, may help)"
        )


def abstract_state(config: AnyTrainConfig, mesh: Mesh, params: dict[str, jax.ShapeDtypeStruct]) -> TrainState:
    """Shapes and shardings of a run's state.

    Args:
      params: path -> shape of every parameter of the stage.
    """
    state = jax.eval_shape(lambda params: init_state(config, params), params)
    placed = shardings(mesh, config.mesh, state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


@dataclass(frozen=True)
class Broken:
    """A number that is not finite."""

    step: int
    name: str
    value: float


class Meter:
    """Collects the metrics of steps and the time they take, one step behind the device.

    A step's numbers are fetched when the next one is under way, so that looking at them waits for nothing.
    """

    def __init__(self, config: AnyTrainConfig, flops: int):
        self._config, self._flops = config, flops
        self._pending: tuple[int, Metrics] | None = None
        self._rows: list[dict[str, float]] = []
        self._since: tuple[int, float] | None = None
        self._done = 0

    def add(self, step: int, metrics: Metrics) -> Broken | None:
        """Takes a step that was started; the first number of the one before it that is not finite."""
        broken = self.finish()
        self._pending = (step, metrics)
        return broken

    def finish(self) -> Broken | None:
        """Waits for the step under way; its first number that is not finite."""
        if self._pending is None:
            return None
        (step, metrics), self._pending = self._pending, None
        row = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._rows.append(row)
        self._done = step
        if self._since is None:
            # The first step compiles, and says nothing of the speed.
            self._since = (step, time.perf_counter())
        # The parts first: the sum of them would only say that one is broken.
        names = sorted(row, key=lambda name: (not name.startswith("loss_"), name != "loss"))
        return next((Broken(step, n, row[n]) for n in names if not math.isfinite(row[n])), None)

    def line(self) -> dict[str, float]:
        """Means of the metrics since the last line, the present learning rate, and the speed."""
        rows, self._rows = self._rows, []
        line = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        line["learning_rate"] = rows[-1]["learning_rate"]
        return line | self._speed()

    def _speed(self) -> dict[str, float]:
        if self._since is None or self._since[0] == self._done:
            return {}
        now, (step, then) = time.perf_counter(), self._since
        seconds = (now - then) / (self._done - step)
        self._since = (self._done, now)
        per_device = self._flops / seconds / jax.device_count()
        peak = device_peak(jax.devices()[0].device_kind)
        speed = {
            "seconds_per_step": seconds,
            "samples_per_second": self._config.batch_size / seconds,
            "tflops_per_device": per_device / 1e12,
        }
        return speed | ({"share_of_peak": per_device / peak} if peak else {})


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once.

    Outside the main thread, where Ray runs a loop, Python lets nobody handle signals, and nothing is noted.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def received(self, step: int) -> int | None:
        """The signal to stop for after this step, the same in every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def __enter__(self) -> Self:
        # Several processes must agree on the step; JAX's own handler of SIGTERM sees to that.
        ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if ours else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = number
