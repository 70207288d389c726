"""Batches of training samples from prepared datasets, through Grain.

Sample n of a run is a function of (seed, n) alone: the clips in the order of their epoch, datasets mixed
by weight, say which clip, and a generator seeded with (seed, n) draws the rest. Row r of the batch of step
s is sample s * batch_size + r, whichever processes and workers read it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import grain
import numpy as np
from absl import flags

from keysync_jax.config import MaskKind
from keysync_jax.data.records import SAMPLE_LOGVAR, Dataset, Record, audio_name, decode_frame
from keysync_jax.errors import UserError
from keysync_jax.media.masks import make_mask, scale_landmarks, to_latent
from keysync_jax.train.batch import Batch
from keysync_jax.train.config import AnyTrainConfig, TrainConfig

log = logging.getLogger(__name__)

B = TypeVar("B")

BATCHES_AHEAD = 2
"""Batches that a process reads ahead; one of 32 clips at full size holds 61 MB, 36 without a pixel loss."""


@dataclass(frozen=True)
class Usable:
    """Clips that samples can be drawn from, and how many were left out.

    Attributes:
      clips: (dataset, clip) by number.
      too_short: clips with fewer frames than a sample spans.
      without_face: clips that are long enough, but where every sample would hold a frame without a face.
    """

    clips: tuple[tuple[int, int], ...]
    too_short: int
    without_face: int

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.clips)} clips to train on; left out: {self.too_short} too short, "
            f"{self.without_face} with a face missing in every stretch"
        )


def stride_of(config: TrainConfig) -> int:
    """Frames from one frame of a sample to the next."""
    return config.data.keyframe_stride if config.stage.kind == "keyframe" else 1


def starts(present: np.ndarray, frames: int, stride: int) -> np.ndarray:
    """First frames of the samples of a clip whose every frame has a face; int `[n]`.

    Args:
      present: whether each frame has a face, bool `[T]`.
      frames, stride: of a sample.
    """
    count = len(present) - (frames - 1) * stride
    whole = np.ones(max(count, 0), bool)
    for offset in range(0, frames * stride, stride):
        whole &= present[offset : offset + len(whole)]
    return np.flatnonzero(whole)


def usable_clips(config: TrainConfig, datasets: Sequence[Dataset]) -> Usable:
    """Sorts out the clips that no sample of this config fits in.

    Raises:
      UserError: a dataset has no clip left.
    """
    frames, stride = config.stage.frames, stride_of(config)
    clips: list[tuple[int, int]] = []
    left_out = Counter[str]()
    for number, dataset in enumerate(datasets):
        before = len(clips)
        for index, clip in enumerate(dataset.clips):
            if clip.frames <= (frames - 1) * stride:
                left_out["short"] += 1
            elif len(starts(clip.present, frames, stride)) == 0:
                left_out["face"] += 1
            else:
                clips.append((number, index))
        if len(clips) == before:
            raise UserError(
                f"{dataset.folder}: none of its {len(dataset.clips)} clips can be used; a sample of this "
                f"config needs {(frames - 1) * stride + 1} frames with a face"
            )
    return Usable(tuple(clips), left_out["short"], left_out["face"])


class Samples:
    """Sample n of a run, for every n; picklable, so that Grain's workers can have it.

    Raises:
      UserError: no dataset, or one without a usable clip.
    """

    def __init__(self, config: TrainConfig, datasets: Sequence[Dataset]):
        if not datasets:
            raise UserError("data.paths is empty; give the folder of a prepared dataset")
        self.config, self.datasets = config, tuple(datasets)
        self.usable = usable_clips(config, datasets)
        self._order = _clip_order(config, self.usable)
        # The type of a batch must not change with the datasets that its clips are of.
        stored = {dataset.settings.latents for dataset in datasets}
        self._latents = np.float16 if stored == {"posterior"} else np.float32

    def clip(self, number: int) -> tuple[int, int]:
        """(dataset, clip) of sample `number`."""
        return self.usable.clips[self._order[number]]

    def __call__(self, number: int) -> Batch:
        """Sample `number`: a Batch without its first axis."""
        which, clip = self.clip(number)
        dataset, config = self.datasets[which], self.config
        rng = np.random.default_rng([config.seed, number])
        frames, reference = self._choose(rng, dataset, clip)
        shown = int(rng.integers(len(frames)))
        flipped = bool(rng.random() < config.data.flip)
        audio = audio_name(config.audio_encoder, self._shift(rng, dataset))
        latents = _latent_names(dataset)
        records = dataset.read(clip, frames, [*latents, "landmarks", audio])
        mean, logvar = self._posterior(records)
        reference_mean, reference_logvar = mean[:0], logvar[:0]
        if reference:
            reference_mean, reference_logvar = self._posterior(dataset.read(clip, reference, latents))
        points = np.stack([record["landmarks"] for record in records])
        mask = latent_masks(
            points, dataset.settings.crop_size, dataset.settings.latent_size, config.data.mask
        )
        features = np.stack([record[audio] for record in records])
        if config.data.audio_noise:
            features = features + rng.normal(0, config.data.audio_noise, features.shape).astype(np.float32)
        sample = Batch(
            mean,
            logvar,
            reference_mean,
            reference_logvar,
            features,
            mask[..., None],
            self._pixels(dataset, clip, frames[shown]),
            np.asarray(shown, np.int32),
        )
        return mirrored(sample) if flipped else sample

    def _posterior(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and log-variance of frames, `[T, h, w, 4]` each."""
        mean = np.stack([record["mean"] for record in records]).astype(self._latents)
        if "logvar" not in records[0]:
            return mean, np.full_like(mean, SAMPLE_LOGVAR)
        return mean, np.stack([record["logvar"] for record in records]).astype(self._latents)

    def _pixels(self, dataset: Dataset, clip: int, frame: int) -> np.ndarray:
        """The crop of one frame, uint8 `[S, S, 3]`; `[0, 0, 3]` where no loss looks at it."""
        if self.config.loss.pixel == "none":
            return np.zeros((0, 0, 3), np.uint8)
        return decode_frame(dataset.read(clip, [frame], ["frame"])[0]["frame"])

    def _shift(self, rng: np.random.Generator, dataset: Dataset) -> float:
        """Semitones by which the voice of the sample is shifted; 0: it is not."""
        # Nothing is drawn where it is off: the other draws of a run without it stay what they were.
        if not self.config.data.pitch or rng.random() >= self.config.data.pitch:
            return 0.0
        return float(rng.choice(dataset.settings.pitch))

    def _choose(self, rng: np.random.Generator, dataset: Dataset, clip: int) -> tuple[list[int], list[int]]:
        """Frames of the sample, and of its reference (none for the interpolation stage)."""
        present = dataset.clips[clip].present
        stride, count = stride_of(self.config), self.config.stage.frames
        first = int(rng.choice(starts(present, count, stride)))
        identity = int(rng.choice(np.flatnonzero(present)))
        keyframe = self.config.stage.kind == "keyframe"
        return [first + i * stride for i in range(count)], [identity] if keyframe else []


def make_loader(
    config: TrainConfig,
    datasets: Sequence[Dataset],
    rows: Sequence[int] | None = None,
    start_step: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Batches of this process from step `start_step` on, up to `config.steps`; arrays are numpy's.

    The same (seed, step) gives the same rows on any number of processes and workers, and after a resume.
    Close the iterator where `config.data.workers` is not 0.

    Args:
      rows: numbers of the rows of a global batch that are read (`mesh.rows_of`); all where None.

    Raises:
      UserError: no usable clip.
    """
    samples = Samples(config, datasets)
    log.info("%s", samples.usable.summary())
    return load(config, samples, rows, start_step)


def load(
    config: AnyTrainConfig,
    samples: Callable[[int], B],
    rows: Sequence[int] | None = None,
    start_step: int = 0,
) -> grain.DatasetIterator[B]:
    """Batches of samples that are functions of their number; see `make_loader`.

    Args:
      samples: number -> a named tuple of arrays, which a batch stacks; picklable.
    """
    rows = range(config.batch_size) if rows is None else rows
    numbers = (
        grain.MapDataset.range(start_step, config.steps)
        .map(_Rows(config.batch_size, tuple(rows)))
        .map(_BatchOf(samples))
    )
    ahead = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
    batches = numbers.to_iter_dataset(ahead)
    if config.data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's own command-line flags, which are not this program's.
        options = grain.MultiprocessingOptions(num_workers=config.data.workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options)
    return iter(batches)


@dataclass(frozen=True)
class _Rows:
    """Numbers of the samples of some rows of a step."""

    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, step: int) -> list[int]:
        return [step * self.batch_size + row for row in self.rows]


@dataclass(frozen=True)
class _BatchOf:
    """Samples by their numbers, stacked."""

    samples: Callable[[int], Any]

    def __call__(self, numbers: Sequence[int]) -> Any:
        rows = [self.samples(number) for number in numbers]
        return type(rows[0])(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


@dataclass(frozen=True)
class Epochs:
    """Numbers in random order, each once before one comes again, `length` in all; a source for Grain.

    Grain's own shuffle takes 12 ms an index where there are few.
    """

    numbers: tuple[int, ...]
    seed: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, len(self.numbers))
        return self.numbers[_permutation(self.seed, epoch, len(self.numbers))[place]]


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, count]).permutation(count)


def _clip_order(config: TrainConfig, usable: Usable) -> grain.MapDataset[int]:
    """Numbers into `usable.clips`, one for each sample of the run, datasets by weight."""
    length = config.steps * config.batch_size
    if not config.data.weights:
        return grain.MapDataset.source(Epochs(tuple(range(len(usable.clips))), config.seed, length))
    weights = config.data.weights
    if min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"data.weights {list(weights)} must be positive")
    parts = [
        grain.MapDataset.source(
            Epochs(tuple(i for i, (of, _) in enumerate(usable.clips) if of == number), config.seed, length)
        )
        for number in range(len(weights))
    ]
    used = [number for number, weight in enumerate(weights) if weight > 0]
    return grain.MapDataset.mix([parts[i] for i in used], [weights[i] for i in used])


def latent_masks(landmarks: np.ndarray, crop_size: int, latent_size: int, kind: MaskKind) -> np.ndarray:
    """Masks at the latent resolution: landmarks `[T, 68, 2]` in crop pixels -> uint8 `[T, h, w]`.

    Drawn at 512 x 512, whatever the crop's size, as `dub` draws them (paper, algorithm 1).
    """
    return to_latent(make_mask(scale_landmarks(landmarks, crop_size, crop_size), kind), latent_size)


def _latent_names(dataset: Dataset) -> list[str]:
    """Names of the arrays that tell a frame's latents."""
    return ["mean", "logvar"] if dataset.settings.latents == "posterior" else ["mean"]


def mirrored(sample: Batch) -> Batch:
    """A sample with left and right exchanged: latents, mask and pixels; the sound stays.

    The reference mirrors latents too, though the VAE commutes with a mirror only nearly: a mirrored
    latent is not quite the latent of the mirrored frame.
    """
    columns = ("mean", "logvar", "reference_mean", "reference_logvar", "mask", "frame")
    return sample._replace(**{name: getattr(sample, name)[..., ::-1, :] for name in columns})
