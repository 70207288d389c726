"""What a guided teacher does on prepared clips, kept for a student to learn from.

A stretch of a clip is dubbed with its own voice as `keysync dub` plans it: keyframes first, then the windows
between them. Of every window of the stage that is distilled one record is kept:

| name | dtype | shape | what |
|---|---|---|---|
| states | fp16 | `[K, T, h, w, C]` | x at each of `distill.levels`, over sqrt(1 + sigma^2) |
| end | fp16 | `[T, h, w, C]` | where the sampler arrives, scaled latents |
| gt | fp16 | `[T, h, w, C]` | the clip's own, kept outside the mask |
| reference | fp16 | `[1 or 2, h, w, C]` | raw latents of the identity, or of the two keyframes |
| audio | fp32 | `[T, 2, D]` | |
| mask | uint8 | `[T, h, w, 1]` | 1 = generate |
| shown | uint8 | `[1]` | place of one frame that the stage generates |
| landmarks | fp32 | `[68, 2]` | of that frame |
| frame | uint8 | `[bytes]` | its pixels as JPEG, where the datasets have them |

A folder holds `settings.json`, shards of `PART` stretches each, which are a function of the settings and
their number alone (but for rounding, where calls have another size), and at last `manifest.json`. An
interrupted job goes on with the shards that are missing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.config import GuidanceConfig, StageKind, from_dict, to_dict
from keysync_jax.data.arrayrecord import RecordReader, RecordWriter
from keysync_jax.data.records import Dataset, Record, ShardInfo, audio_name, decode_record, encode_record
from keysync_jax.errors import UserError
from keysync_jax.files import settle, sha256_of, write_json
from keysync_jax.model import DTYPES, Model, Network, open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.pipeline.devices import local_devices
from keysync_jax.pipeline.generate import (
    Clip,
    Features,
    Sampling,
    interpolation_inputs,
    keyframe_inputs,
    keyframes,
)
from keysync_jax.pipeline.phases import Phases
from keysync_jax.pipeline.sampling import Windows, guidance_of, sample_states, sigmas_of
from keysync_jax.pipeline.windows import FRAMES, HOP, make_plan
from keysync_jax.train.checkpoint import Checkpoints, read_config
from keysync_jax.train.config import DistillConfig, TrainConfig
from keysync_jax.train.data import Epochs, latent_masks, starts
from keysync_jax.train.fits import prepared_with
from keysync_jax.train.hosts import decided
from keysync_jax.train.inputs import digest
from keysync_jax.train.step import make_stage

FORMAT = "keysync-trajectories-1"
SETTINGS, MANIFEST = "settings.json", "manifest.json"

PART = 8
"""Stretches of a shard; what an interrupted job does again at most."""

MOST_WINDOWS = 12
"""Of a stretch: one call of the keyframe stage makes their 13 keyframes."""


@dataclass(frozen=True)
class TrajectorySettings:
    """All that a folder of trajectories depends on.

    Attributes:
      teacher: its fingerprint.
      student: SHA-256 of the weights of the keyframe stage's student; empty without one.
      data: SHA-256 of the datasets' manifests.
      prepared_with: SHA-256 by file name of the VAE and the encoder that the datasets were made with.
    """

    kind: StageKind
    teacher: str
    student: str
    data: tuple[str, ...]
    prepared_with: dict[str, str]
    levels: tuple[float, ...]
    clips: int
    mask: str
    dtype: str
    seed: int


class Trajectories:
    """Random access to a complete folder of trajectories; picklable.

    Raises:
      UserError: it is not complete, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder}: holds no complete trajectories (it has no {MANIFEST})") from None
        except ValueError as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{self.path}: not trajectories in the format {FORMAT}")
        self.settings = from_dict(TrajectorySettings, content["settings"], str(self.path))
        self.shards = from_dict(_Shards, {"shards": content["shards"]}, str(self.path)).shards
        for shard in self.shards:
            file = folder / shard.file
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise UserError(f"{file}: this shard of the trajectories is missing or truncated")
        self._readers = [RecordReader(folder / shard.file) for shard in self.shards]
        self._firsts = np.cumsum([0, *(shard.records for shard in self.shards)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def sha256(self) -> str:
        """Of the manifest, which has that of every shard: of all of it."""
        return sha256_of(self.path)

    def read(self, number: int) -> Record:
        """The arrays of a record, read-only views of its bytes."""
        shard = int(np.searchsorted(self._firsts, number, side="right")) - 1
        (data,) = self._readers[shard].read([number - int(self._firsts[shard])])
        return decode_record(data)


@dataclass(frozen=True)
class _Shards:
    shards: tuple[ShardInfo, ...]


def trajectories(
    config: TrainConfig, datasets: Sequence[Dataset], folder: Path, show: bool = True
) -> Trajectories:
    """The trajectories of a distillation, made where they are not there; several processes share the work.

    Args:
      config: with `distill`.
      datasets: none where the folder is complete and is only to be read.

    Raises:
      UserError: the folder holds others, or the teacher, the student or a dataset cannot be used.
    """
    if not datasets and (folder / MANIFEST).is_file():
        return Trajectories(folder)
    with computing(config.dtype):
        job = _Job(config, datasets)
        decided(lambda: settle(folder / SETTINGS, to_dict(job.settings), "trajectories"))
        missing = [n for n in range(job.parts) if not _shard(folder, n).is_file()]
        mine = [n for n in missing if n % jax.process_count() == jax.process_index()]
        if mine:
            job.load()
        phases = Phases(show=show and bool(mine) and jax.process_index() == 0)
        done = job.parts - len(missing)
        with phases.phase("trajectories", done + len(mine), "parts", done) as advance:
            for number in mine:
                job.write(_shard(folder, number), number)
                advance(1)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("trajectories")
    decided(lambda: _complete(folder, job))
    return Trajectories(folder)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.arrayrecord"


def _complete(folder: Path, job: "_Job") -> None:
    """Writes the manifest where there is none yet."""
    if (folder / MANIFEST).is_file():
        return
    shards = []
    for number in range(job.parts):
        path = _shard(folder, number)
        records = len(RecordReader(path))
        shards.append(ShardInfo(path.name, records, path.stat().st_size, sha256_of(path)))
    content = {"settings": to_dict(job.settings), **to_dict(_Shards(tuple(shards)))}
    write_json(folder / MANIFEST, {"format": FORMAT, **content})


def student_of(run: str | Path) -> tuple[TrainConfig, DistillConfig, dict[str, np.ndarray]]:
    """Settings and weights (their moving average where there is one) of a keyframe stage's distillation.

    Raises:
      UserError: the folder is not that of such a run, or has no checkpoint.
    """
    config = read_config(Path(run))
    distill = config.distill if isinstance(config, TrainConfig) else None
    if not isinstance(config, TrainConfig) or distill is None or config.stage.kind != "keyframe":
        raise UserError(f"{run}: is not the folder of a keyframe stage's distillation")
    with Checkpoints(Path(run) / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        _, weights = checkpoints.restore_weights(average=config.optimizer.ema > 0)
    return config, distill, weights


@dataclass(frozen=True)
class _Stretch:
    """Frames of a clip that are dubbed.

    Attributes:
      identity: frame that shows who it is.
      seed: of the noise.
    """

    dataset: Dataset
    clip: int
    frames: range
    identity: int
    seed: int


class _Job:
    """Makes shards."""

    def __init__(self, config: TrainConfig, datasets: Sequence[Dataset]):
        assert config.distill is not None
        self.config, self.distill, self.datasets = config, config.distill, tuple(datasets)
        if not datasets:
            raise UserError("data.paths is empty: give --config.data.paths=DATASET, made by keysync prepare")
        if not config.init.path:
            raise UserError("init.path is empty: give the teacher, --teacher MODEL_DIR")
        stages = ["keyframe", "interpolation"] if config.stage.kind == "interpolation" else ["keyframe"]
        self.teacher: Model = open_model(config.init.path, only=stages)
        if self.teacher.config.stage(config.stage.kind) != config.stage:
            raise UserError(
                f"{config.init.path}: its {config.stage.kind} stage is not the one that the config describes "
                "(stage.*); a student has its teacher's sizes and audio encoder"
            )
        if self.teacher.config.mask != config.data.mask:
            raise UserError(
                f"{config.init.path}: is for masks of the kind {self.teacher.config.mask}, data.mask is "
                f"{config.data.mask}"
            )
        self.sigmas = sigmas_of(self.teacher.config)
        self.kept = self._steps()
        self.student = student_of(self.distill.student) if self.distill.student else None
        if self.student is not None and self.student[0].stage != self.teacher.config.keyframe:
            raise UserError(f"{self.distill.student}: is not the run of a student of {config.init.path}")
        self.parts = -(-self.distill.clips // PART)
        clips = [(d, c) for d, dataset in enumerate(datasets) for c in range(len(dataset.clips))]
        self.clips = [
            (d, c) for d, c in clips if len(starts(self.datasets[d].clips[c].present, FRAMES, 1)) > 0
        ]
        if not self.clips:
            raise UserError(f"{datasets[0].folder}: no clip has {FRAMES} frames in a row with a face")
        self._order = Epochs(tuple(range(len(self.clips))), config.seed, self.parts * PART)

    def _steps(self) -> np.ndarray:
        """Numbers of the teacher's steps that begin at the kept levels."""
        table = self.sigmas[:-1].tolist()
        for sigma in self.distill.levels:
            if sigma not in table:
                known = ", ".join(f"{level:g}" for level in table)
                raise UserError(f"distill.levels: {sigma:g} is none of the teacher's noise levels: {known}")
        return np.array([table.index(sigma) for sigma in self.distill.levels])

    @property
    def settings(self) -> TrajectorySettings:
        prepared: dict[str, str] = {}
        for dataset in self.datasets:
            prepared |= prepared_with(dataset, self.config.audio_encoder)
        return TrajectorySettings(
            kind=self.config.stage.kind,
            teacher=self.teacher.fingerprint,
            student="" if self.student is None else digest(self.student[2]),
            data=tuple(dataset.sha256 for dataset in self.datasets),
            prepared_with=prepared,
            levels=self.distill.levels,
            clips=self.distill.clips,
            mask=self.config.data.mask,
            dtype=self.config.dtype,
            seed=self.config.seed,
        )

    def load(self) -> None:
        """Networks onto the devices."""
        dtype, model, sigmas = self.config.dtype, self.teacher, self.sigmas
        self.devices = local_devices()
        guidance = guidance_of(model.config.guidance, sigmas)
        self.given = self.devices.copy((guidance, np.asarray(sigmas, np.float32), self.kept))
        self.network = self.devices.network(model.load(self.config.stage.kind, dtype))
        self.sampling = Sampling(
            guidance, sigmas, scale_factor=model.config.vae.scale_factor, devices=self.devices
        )
        self.keyframers: list[tuple[Network, Sampling]] = []
        if self.config.stage.kind == "interpolation":
            self.keyframers.append((model.load("keyframe", dtype), self.sampling))
        if self.student is not None:
            config, distill, weights = self.student
            graphdef, _ = shapes(make_stage(replace(config, dtype=dtype)))
            held = {n: x.astype(DTYPES[dtype]) if x.ndim > 1 else x for n, x in weights.items()}
            own = np.append(np.array(distill.grid), 0.0)
            guidance = guidance_of(GuidanceConfig("none"), own)
            sampling = replace(self.sampling, guidance=guidance, sigmas=own)
            self.keyframers.append((Network(graphdef, jax.device_put(held)), sampling))

    def write(self, path: Path, part: int) -> None:
        """Makes a shard."""
        numbers = range(part * PART, min((part + 1) * PART, self.distill.clips))
        size = self.distill.windows_per_call * len(self.devices)
        rows = (row for number in numbers for row in self._rows(number))
        with RecordWriter(path) as writer:
            while group := list(islice(rows, size)):
                made = self._made([windows for windows, _ in group], size)
                for (windows, extra), states in zip(group, made, strict=False):
                    writer.write(encode_record(_record(windows, states, extra)))

    def _made(self, rows: Sequence[Windows], size: int) -> np.ndarray:
        """States and ends of a call's windows, fp16."""
        filled = [*rows, *[rows[-1]] * (size - len(rows))]
        noise, *others = zip(*filled, strict=True)
        batch = self.devices.split(Windows(jnp.stack(noise), *map(np.stack, others)))
        return np.asarray(self.devices.run(sample_states, self.network, batch, *self.given))

    def _stretch(self, number: int) -> _Stretch:
        """Stretch `number`: the longest that its clip has, somewhere in it."""
        rng = np.random.default_rng([self.config.seed, number])
        which, clip = self.clips[self._order[number]]
        present = self.datasets[which].clips[clip].present
        for windows in range(MOST_WINDOWS, 0, -1):
            first = starts(present, windows * HOP + 1, 1)
            if len(first):
                break
        begin = int(rng.choice(first))
        identity, seed = int(rng.choice(np.flatnonzero(present))), int(rng.integers(2**31))
        frames = range(begin, begin + windows * HOP + 1)
        return _Stretch(self.datasets[which], clip, frames, identity, seed)

    def _rows(self, number: int) -> Iterator[tuple[Windows, Record]]:
        """Inputs of a stretch's windows, and what is kept beside them."""
        stretch, stage = self._stretch(number), self.config.stage
        rng = np.random.default_rng([self.config.seed, number, 1])
        dataset, model = stretch.dataset, self.teacher.config
        voices = sorted({audio_name(s.audio_encoder) for s in (model.keyframe, stage)})
        records = dataset.read(stretch.clip, stretch.frames, ["mean", "landmarks", *voices])
        clip = self._clip(stretch, records)
        plan = make_plan(len(stretch.frames))
        sampling = replace(self.sampling, seed=stretch.seed)

        def heard(kind: StageKind) -> Features:
            encoder = model.stage(kind).audio_encoder
            return Features(encoder, np.stack([record[audio_name(encoder)] for record in records]))

        if stage.kind == "keyframe":
            call = plan.keyframe_calls[0]
            shown = int(rng.choice(call.kept))
            extra = self._extra(stretch, records, shown, call.source[shown])
            yield keyframe_inputs(clip, plan, heard("keyframe"), sampling, 0), extra
            return
        network, keyframing = self.keyframers[number % len(self.keyframers)]
        made = keyframes(network, clip, plan, heard("keyframe"), replace(keyframing, seed=stretch.seed))
        latents, features = np.concatenate(list(made)), heard("interpolation")
        for window, (begin, _) in enumerate(plan.windows):
            shown = int(rng.integers(1, FRAMES - 1))
            extra = self._extra(stretch, records, shown, begin + shown)
            yield interpolation_inputs(clip, plan, features, latents, sampling, window), extra

    def _clip(self, stretch: _Stretch, records: Sequence[Record]) -> Clip:
        """The stretch as a dub takes it."""
        settings, scale = stretch.dataset.settings, np.float32(self.sampling.scale_factor)
        (identity,) = stretch.dataset.read(stretch.clip, [stretch.identity], ["mean"])
        points = np.stack([record["landmarks"] for record in records])
        return Clip(
            latents=np.stack([record["mean"] for record in records]).astype(np.float32) * scale,
            masks=latent_masks(points, settings.crop_size, settings.latent_size, self.config.data.mask),
            source=np.arange(len(records)),
            identity=identity["mean"].astype(np.float32) * scale,
        )

    @staticmethod
    def _extra(stretch: _Stretch, records: Sequence[Record], shown: int, frame: int) -> Record:
        """What is kept of one frame.

        Args:
          shown: its place in the window.
          frame: its number in the stretch.
        """
        extra = {"shown": np.array([shown], np.uint8), "landmarks": records[frame]["landmarks"]}
        if stretch.dataset.settings.frames:
            (pixels,) = stretch.dataset.read(stretch.clip, [stretch.frames[frame]], ["frame"])
            extra["frame"] = pixels["frame"]
        return extra


def _record(windows: Windows, states: np.ndarray, extra: Record) -> Record:
    """The arrays that are kept of a window."""
    return {
        "states": states[:-1],
        "end": states[-1],
        "gt": np.asarray(windows.gt, np.float16),
        "reference": np.asarray(windows.reference, np.float16),
        "audio": np.asarray(windows.audio, np.float32),
        "mask": np.asarray(windows.mask, np.uint8),
        **extra,
    }
