"""The state of a run on disk: its effective config, and Orbax checkpoints of the training state.

    WORKDIR/config.json            what the run was started with
    WORKDIR/inputs.json            what it reads, by content (see `inputs`)
    WORKDIR/checkpoints/STEP/      one checkpoint, complete or not there

A batch is a function of (seed, step), so the step is all that resuming the data needs.
"""

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from keysync_jax.config import to_dict
from keysync_jax.errors import UserError
from keysync_jax.files import is_remote, write_json
from keysync_jax.train.config import AnyTrainConfig, CheckpointConfig, train_config_from
from keysync_jax.train.hosts import HostsLostError, decided, is_loss
from keysync_jax.train.inputs import PLACES, Inputs, check_inputs, read_inputs
from keysync_jax.train.step import TrainState

FORMAT = "keysync-run-1"

MAY_CHANGE = (
    "steps",
    "log",
    "watch",
    "profile",
    "checkpoint",
    "mesh",
    "guidance",
    "data.workers",
    "init.kind",
    "init.path",
    "distill.windows_per_call",
)
"""Settings that an interrupted run may go on with in another value; none changes what a step computes."""

_PARTIAL_SUFFIX = ".orbax-checkpoint-tmp"

_MARKER = "commit_success.txt"
"""What Orbax writes last into a checkpoint, in every mode since 0.12.3."""

_CHUNK_BYTES = 16 << 20
"""Pieces in which arrays are stored. Another mesh reads pieces of a shard; large ones hold too much else."""

_GROUP_BYTES = 256 << 20
"""Of arrays that are read together where not all are needed in memory."""


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, which numpy reads (`np.asarray`) each time it needs the numbers.

    Attributes:
      read: reads them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def astype(self, dtype: Any) -> "StoredArray":
        """The array in another dtype, as lazy as this one."""
        return StoredArray(self.shape, np.dtype(dtype), lambda: self.read().astype(dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


class _Reader:
    """Reads arrays of a checkpoint in groups, as each call of Orbax takes 40 ms, and keeps the last group.

    Args:
      load: reads those that are wanted (part -> path -> empty array).
    """

    def __init__(self, load: Callable[[dict[str, Any]], dict[str, Any]]):
        self._load = load
        self._groups: list[list[tuple[str, str, Any]]] = []
        self._bytes = _GROUP_BYTES
        self._kept: tuple[int, dict[str, Any]] | None = None

    def array(self, part: str, path: str, leaf: Any) -> StoredArray:
        """One of the arrays; it joins the group of the one before while that has room."""
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if self._bytes + size > _GROUP_BYTES:
            self._groups.append([])
            self._bytes = 0
        self._bytes += size
        group = len(self._groups) - 1
        self._groups[group].append((part, path, leaf))
        return StoredArray(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: self._read(group, part, path))

    def _read(self, group: int, part: str, path: str) -> np.ndarray:
        if self._kept is None or self._kept[0] != group:
            self._kept = None  # Before the next one takes room.
            wanted: dict[str, Any] = {}
            for of, name, leaf in self._groups[group]:
                wanted.setdefault(of, {})[name] = np.empty(leaf.shape, leaf.dtype)
            self._kept = group, self._load(wanted)
        return np.asarray(self._kept[1][part][path])


class Checkpoints:
    """The checkpoints of a run. A context manager: leaving it waits for the save under way.

    Saving is asynchronous: the arrays are copied, training goes on, and the folder appears under its step
    when all of it is on disk. Older ones are removed only then. On several hosts every process makes the
    same calls; which checkpoints there are at the beginning is what process 0 sees.

    Args:
      folder: of the checkpoints; made where it is not there.
      config: how many are kept.
      read_only: nothing will be saved. What looks like the rest of an interrupted save is left alone, it may
        be a save under way in another process.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, read_only: bool = False):
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        # Its tracebacks come a second time as exceptions, which are told in a sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder if is_remote(folder) else Path(folder).absolute()
        self._read_only = read_only
        self._remove_partial()
        try:
            with _context():
                self._checkpointer = ocp.training.Checkpointer(
                    self.folder,
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                )
        except OSError as error:
            raise UserError(f"{folder}: cannot be used ({error.strerror or error})") from error
        self._saving: tuple[int, Any, Callable[[int, float], object]] | None = None
        self._latest: int | None = decided(lambda: max(saved_steps(self.folder), default=None))

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint, the same in every process."""
        return self._latest

    def save(
        self, state: TrainState, step: int, saved: Callable[[int, float], object] = lambda step, at: None
    ) -> None:
        """Starts saving a checkpoint; a step that is there already is left as it is.

        Args:
          saved: is called with the step, and when it was complete (seconds since 1970), by `wait`.

        Raises:
          UserError: this save or the one before it failed; the last complete checkpoint stays.
        """
        self.wait()
        if step == self._latest:
            return
        try:
            with _context():
                response = self._checkpointer.save_async(step, _as_tree(state), force=True)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._saving = (step, response, saved)

    def wait(self) -> None:
        """Waits until the save under way is complete.

        Raises:
          UserError: it failed.
        """
        if self._saving is None:
            return
        (step, response, saved), self._saving = self._saving, None
        try:
            response.result()
        # tensorstore reports a full disk as ValueError, Orbax some failures as RuntimeError.
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error
        self._latest = step
        try:
            at = float((self.folder / str(step) / _MARKER).stat().st_mtime)
        except (OSError, AttributeError):  # Removed already; objects have no such times.
            at = time.time()
        saved(step, at)

    def restore(self, abstract: TrainState) -> TrainState:
        """The last checkpoint, bit for bit.

        Args:
          abstract: `jax.ShapeDtypeStruct`s with the shardings to restore to, on whatever mesh.

        Raises:
          UserError: there is none, or it is damaged.
        """
        return TrainState(**self._load(_as_tree(abstract), some=False))

    def restore_weights(self, average: bool) -> tuple[int, dict[str, np.ndarray]]:
        """Step and parameters (trained and frozen, path -> fp32 array) of the last checkpoint.

        Args:
          average: take the exponential moving average of the trained ones.

        Raises:
          UserError: there is no checkpoint, it is damaged, or it holds no average.
        """
        step = self._latest_or_raise()
        stored = self._stored(step)
        trained = "ema" if average else "params"
        if not stored.get(trained):
            raise UserError(f"{self.folder / str(step)}: the run kept no moving average (optimizer.ema is 0)")
        # An array as target means: read it into host memory. Memory that is never written costs nothing.
        wanted = {
            name: {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in stored[name].items()}
            for name in (trained, "frozen")
            if stored.get(name)
        }
        loaded = self._load(wanted, some=True)
        return step, {**loaded[trained], **loaded.get("frozen", {})}

    def stored_weights(self, average: bool) -> tuple[int, dict[str, "StoredArray"]]:
        """As `restore_weights`, but arrays are read when their numbers are asked for, some at a time.

        Raises:
          UserError: as that; or later, where an array is damaged.
        """
        step = self._latest_or_raise()
        stored = self._stored(step)
        trained = "ema" if average else "params"
        if not stored.get(trained):
            raise UserError(f"{self.folder / str(step)}: the run kept no moving average (optimizer.ema is 0)")
        reader = _Reader(lambda wanted: self._load(wanted, some=True))
        return step, {
            path: reader.array(part, path, leaf)
            for part in (trained, "frozen")
            for path, leaf in (stored.get(part) or {}).items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Orbax would wait for processes that are gone.
        lost = is_loss(error)
        try:
            if error is None:
                self.wait()
        finally:
            if not lost:
                self._close()

    def _close(self) -> None:
        """Ends Orbax's threads; they report a failed save once more, which has been told already."""
        try:
            self._checkpointer.close()
        except (OSError, ValueError, RuntimeError) as error:
            logging.getLogger(__name__).debug("while closing %s: %s", self.folder, error)
            self._remove_partial()

    def _remove_partial(self) -> None:
        """Gives back the room of a save that did not end; one whose writers are still busy goes next time."""
        if jax.process_index() == 0 and not self._read_only and not is_remote(self.folder):
            for left in self.folder.glob(f"*{_PARTIAL_SUFFIX}"):
                shutil.rmtree(left, ignore_errors=True)

    def _latest_or_raise(self) -> int:
        step = self.latest
        if step is None:
            raise UserError(f"{self.folder}: there is no checkpoint in it")
        return step

    def _stored(self, step: int) -> dict[str, Any]:
        """The saved tree, with shapes and dtypes for leaves."""
        try:
            return dict(self._checkpointer.metadata(step).metadata)
        except Exception as error:
            raise self._damaged(step, error) from error

    def _load(self, wanted: dict[str, Any], some: bool) -> dict[str, Any]:
        step = self._latest_or_raise()
        context = ocp.Context()
        context.pytree.loading.partial_load = some
        try:
            with context:
                return dict(ocp.load(self.folder / str(step), wanted))
        # A damaged file surfaces as whatever its reader stumbles over.
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        others = [s for s in saved_steps(self.folder) if s != step]
        instead = f"go on from step {max(others)}" if others else "start anew"
        return UserError(
            f"{self.folder / str(step)}: this checkpoint is damaged or of another network "
            f"({_reason(error)}); remove this folder to {instead}"
        )

    def _failed(self, step: int, error: Exception) -> Exception:
        if is_loss(error):
            return HostsLostError(
                f"step {step} could not be saved, as hosts do not answer ({_reason(error)})"
            )
        last = "no checkpoint" if self.latest is None else f"the checkpoint of step {self.latest}"
        return UserError(
            f"{self.folder}: step {step} could not be saved ({_reason(error)}); {last} is complete, "
            "and the same command goes on from there once there is room"
        )


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints on disk; Orbax's own list runs ahead of a failed save."""
    if not folder.is_dir():
        return []
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_complete(p)]


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was committed.

    Its name does not tell: on object stores, and on mounts of them, it is written under the name it will
    have.
    """
    if (checkpoint / _MARKER).exists():
        return True
    # Of Orbax before 0.12.3, which renamed complete folders.
    try:
        written = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_bytes())
        return bool(written["commit_timestamp_nsecs"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


def settle_config(workdir: Path, config: AnyTrainConfig, inputs: Inputs | None = None) -> None:
    """Stores the effective config with the run; a run that has a checkpoint must go on with the same one.

    On several hosts process 0 does it for all (`hosts.decided`).

    Args:
      inputs: what the config's paths hold now. They are stored and compared likewise, and the paths of inputs
        that are known may change. None: they are not known.

    Raises:
      UserError: a setting that changes what a step computes is another one than the run was started with, or
        so is an input, or the `config.json` in the folder is not that of a run.
    """
    path = workdir / "config.json"
    if path.exists():
        started = read_config(workdir)
        if saved_steps(workdir / "checkpoints"):
            known = inputs is not None and read_inputs(workdir) is not None
            _check_equal(workdir, started, config, MAY_CHANGE + PLACES if known else MAY_CHANGE)
            if inputs is not None:
                check_inputs(workdir, inputs, config.data.paths)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, **to_dict(config)}, indent=2)
            if inputs is not None:
                inputs.save(workdir)
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written ({error.strerror or error})") from error


def read_config(workdir: Path) -> AnyTrainConfig:
    """The effective config of a run.

    Raises:
      UserError: the folder is not that of a run, or its config cannot be read.
    """
    path = workdir / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{workdir}: not the folder of a training run (it has no config.json)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not the config of a training run in the format {FORMAT}")
    stage, loss = content.get("stage"), content.get("loss")
    if isinstance(stage, dict) and isinstance(loss, dict) and stage.get("kind") == "keyframe":
        loss.setdefault("drop_reference_by", "clip")  # Runs from before there was this setting did so.
    return train_config_from(content, str(path))


def _check_equal(
    workdir: Path, started: AnyTrainConfig, config: AnyTrainConfig, may_change: Sequence[str]
) -> None:
    if type(started) is not type(config):
        raise UserError(f"{workdir}: holds a run of another kind; give another --workdir")
    before, now = _flat(to_dict(started)), _flat(to_dict(config))
    # A section that only one of them has is None in the other.
    for key in {**now, **before}:
        value = now.get(key)
        if before.get(key) != value and not any(f"{key}.".startswith(f"{free}.") for free in may_change):
            raise UserError(
                f"{workdir}: this run was started with {key} = {before.get(key)!r}, not {value!r}; "
                "go on with that, or give another --workdir"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _as_tree(state: TrainState) -> dict[str, Any]:
    """The state as a dictionary, so that its parts can be read one by one."""
    return {name: getattr(state, name) for name in ("step", "params", "frozen", "opt_state", "ema")}


def _reason(error: Exception) -> str:
    """What the system said, where tensorstore's message has its number; else the message's beginning."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
