"""Batches: a function of seed and step, on any number of processes and workers."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.data.arrayrecord import RecordReader
from keysync_jax.data.records import UNGROUPED, Dataset, decode_record
from keysync_jax.errors import UserError
from keysync_jax.train.batch import Batch
from keysync_jax.train.config import LossConfig, PixelLoss, TrainConfig
from keysync_jax.train.data import Samples, latent_masks, make_loader, mirrored, starts
from keysync_jax.train.fits import check_fits
from tests.prepared import LATENT, SETTINGS, SIZE, train_config, write_dataset

# The third clip has a face in two stretches, the fourth is too short for keyframes.
PATCHY = np.array([True] * 18 + [False] * 4 + [True] * 30)
CLIPS = [40, 21, PATCHY, 15, np.arange(40) % 5 != 2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", CLIPS)


def take(config: TrainConfig, datasets: list[Dataset], count: int, **place: Any) -> list[Batch]:
    loader = make_loader(config, datasets, **place)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def assert_same(found: Batch, expected: Batch) -> None:
    for name, a, b in zip(Batch._fields, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def identity(latents: np.ndarray) -> np.ndarray:
    """Clip * 100 + frame that each latent tells."""
    return latents[..., 0, -1, 0].astype(int)


def test_shapes_and_types(dataset: Dataset) -> None:
    for kind, references in (("keyframe", 1), ("interpolation", 0)):
        batch = take(train_config(kind), [dataset], 1)[0]
        described = {name: (x.shape, str(x.dtype)) for name, x in batch._asdict().items()}
        latent = (LATENT, LATENT, 4)
        assert described == {
            "mean": ((8, 4, *latent), "float16"),
            "logvar": ((8, 4, *latent), "float16"),
            "reference_mean": ((8, references, *latent), "float16"),
            "reference_logvar": ((8, references, *latent), "float16"),
            "audio": ((8, 4, 2, 6), "float32"),
            "mask": ((8, 4, LATENT, LATENT, 1), "uint8"),
            "frame": ((8, SIZE, SIZE, 3), "uint8"),
            "frame_index": ((8,), "int32"),
        }


@pytest.mark.parametrize("processes", [2, 3])
def test_the_global_batch_does_not_depend_on_processes(dataset: Dataset, processes: int) -> None:
    config = train_config(data={"flip": 0.5, "audio_noise": 0.1})
    whole = take(config, [dataset], 3)
    # Rows of a process need not lie together, and another one may read them as well.
    rows = [[*range(i, 8, processes), (i + 1) % 8] for i in range(processes)]
    for own in rows:
        for found, expected in zip(take(config, [dataset], 3, rows=own), whole, strict=True):
            assert_same(found, Batch(*(array[own] for array in expected)))


def test_a_resumed_run_reads_the_same_batches(dataset: Dataset) -> None:
    config = train_config()
    whole = take(config, [dataset], 6)
    for found, expected in zip(take(config, [dataset], 2, start_step=4), whole[4:], strict=True):
        assert_same(found, expected)
    assert not np.array_equal(whole[0].mean, whole[1].mean)


def test_the_batches_end_with_the_run(dataset: Dataset) -> None:
    assert sum(1 for _ in make_loader(train_config(), [dataset], start_step=17)) == 3


def test_workers_read_the_same_batches(dataset: Dataset) -> None:
    config = train_config()
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    for found, expected in zip(take(workers, [dataset], 4), take(config, [dataset], 4), strict=True):
        assert_same(found, expected)


def test_another_seed_gives_other_batches(dataset: Dataset) -> None:
    first, second = (take(train_config(seed=seed), [dataset], 1)[0] for seed in (0, 1))
    assert not np.array_equal(first.mean, second.mean)


@pytest.mark.parametrize(("kind", "stride"), [("keyframe", 5), ("interpolation", 1)])
def test_frames_of_a_sample(dataset: Dataset, kind: str, stride: int) -> None:
    """Evenly spaced frames of one clip, all with a face; everything tells the same frames."""
    samples = Samples(train_config(kind), [dataset])
    seen, references = set(), set()
    for number in range(150):
        sample = samples(number)
        clips, frames = np.divmod(identity(sample.mean), 100)
        assert set(clips.tolist()) == {samples.clip(number)[1]}
        assert set(np.diff(frames).tolist()) == {stride}
        present = dataset.clips[clips[0]].present
        assert present[frames].all()
        np.testing.assert_array_equal(sample.audio[:, 0, 0], 1000 * clips + frames)
        np.testing.assert_allclose(sample.logvar, -3 - clips[0])
        assert np.abs(int(sample.frame[0, -1, 0]) - frames[sample.frame_index]) <= 2
        seen.add((int(clips[0]), int(frames[0])))
        if kind == "keyframe":
            clip, frame = divmod(int(identity(sample.reference_mean)[0]), 100)
            assert clip == clips[0]
            assert present[frame]
            references.add((clip, frame))
    possible = {
        (clip, int(start))
        for clip in range(len(CLIPS))
        for start in starts(dataset.clips[clip].present, 4, stride)
    }
    assert seen <= possible
    assert len(seen) > 0.6 * len(possible) if kind == "keyframe" else len(seen) > 60
    assert kind == "interpolation" or len(references) > 40


def test_starts_are_the_stretches_with_a_face() -> None:
    present = np.array([True, True, False, True, True, True, True])
    assert starts(present, 3, 1).tolist() == [3, 4]
    assert starts(present, 3, 2).tolist() == [1]
    assert starts(present, 4, 1).tolist() == [3]
    assert starts(present, 3, 5).tolist() == []


def test_every_clip_comes_once_before_one_comes_again(dataset: Dataset) -> None:
    samples = Samples(train_config("interpolation"), [dataset])
    drawn = [samples.clip(number)[1] for number in range(5 * 4)]
    for start in range(0, len(drawn), 5):
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(drawn[start : start + 5]) for start in range(0, len(drawn), 5)}) > 1


def test_clips_that_cannot_be_used_are_counted(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    usable = Samples(train_config(), [dataset]).usable
    assert (usable.too_short, usable.without_face) == (1, 0)
    assert [clip for _, clip in usable.clips] == [0, 1, 2, 4]
    wide = Samples(train_config(data={"keyframe_stride": 12}), [dataset]).usable
    assert (wide.too_short, wide.without_face) == (2, 1)
    with caplog.at_level("INFO"):
        make_loader(train_config(), [dataset])
    assert "4 clips to train on; left out: 1 too short, 0 with a face missing" in caplog.text


def test_no_usable_clip_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "short", [3, 15])
    message = r"short: none of its 2 clips can be used; a sample of this config needs 16 frames"
    with pytest.raises(UserError, match=message):
        make_loader(train_config(), [dataset, short])
    with pytest.raises(UserError, match=r"data.paths is empty"):
        make_loader(train_config(), [])


def test_datasets_come_by_their_weights(dataset: Dataset, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [30], number=7)
    data = {"paths": ("a", "b"), "weights": (1.0, 3.0)}
    samples = Samples(train_config(data=data), [dataset, other])
    drawn = [samples.clip(number)[0] for number in range(400)]
    assert drawn.count(1) == 300
    assert {clip for which, clip in map(samples.clip, range(400)) if which == 0} == {0, 1, 2, 4}
    even = Samples(train_config(), [dataset, other])
    assert [even.clip(number)[0] for number in range(50)].count(1) == 10
    with pytest.raises(UserError, match="must be positive"):
        Samples(train_config(data=data | {"weights": (1.0, -3.0)}), [dataset, other])
    only = Samples(train_config(data=data | {"weights": (0.0, 1.0)}), [dataset, other])
    assert {only.clip(number)[0] for number in range(20)} == {1}


def test_a_flip_mirrors_the_whole_sample(dataset: Dataset) -> None:
    plain, flipped = (Samples(train_config(data={"flip": p}), [dataset])(11) for p in (0.0, 1.0))
    assert_same(flipped, mirrored(plain))
    assert plain.mean[0, 0, 0, 0] == plain.reference_mean[0, 0, 0, 0] == 0 == plain.frame[0, 0, 0]
    assert flipped.mean[0, 0, -1, 0] == flipped.reference_mean[0, 0, -1, 0] == 0 == flipped.frame[0, -1, 0]
    assert not np.array_equal(plain.mask, flipped.mask)
    np.testing.assert_array_equal(plain.mask[:, :, ::-1], flipped.mask)
    np.testing.assert_array_equal(plain.audio, flipped.audio)
    some = Samples(train_config(data={"flip": 0.3}), [dataset])
    assert 30 < sum(some(number).frame[0, -1, 0] == 0 for number in range(150)) < 60


def test_audio_noise_has_its_size(dataset: Dataset) -> None:
    plain = Samples(train_config(), [dataset])
    noisy = Samples(train_config(data={"audio_noise": 0.5}), [dataset])
    difference = np.stack([noisy(n).audio - plain(n).audio for n in range(40)])
    assert noisy(0).audio.dtype == np.float32
    assert difference.std() == pytest.approx(0.5, rel=0.1)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset with two shifted voices beside the plain one."""
    settings = dataclasses.replace(SETTINGS, pitch=(-2.0, 3.5))
    return write_dataset(tmp_path_factory.mktemp("voices") / "dataset", CLIPS, settings)


def shift_of(sample: Batch) -> float:
    """Semitones that the features of a sample tell; they are the same in all its frames."""
    shifts = (sample.audio - np.rint(sample.audio)) * 100
    np.testing.assert_allclose(shifts, shifts.flat[0], atol=0.1)
    return round(float(shifts.flat[0]), 1)


def test_pitch_takes_the_shifted_voices(voices: Dataset) -> None:
    plain = Samples(train_config(), [voices])
    samples = Samples(train_config(data={"pitch": 0.6}), [voices])
    shifts = [shift_of(samples(number)) for number in range(300)]
    share = {shift: shifts.count(shift) / 300 for shift in set(shifts)}
    assert share == {
        0.0: pytest.approx(0.4, abs=0.1),
        -2.0: pytest.approx(0.3, abs=0.1),
        3.5: pytest.approx(0.3, abs=0.1),
    }
    for number in range(10):
        expected, found = plain(number), samples(number)
        assert shift_of(expected) == 0
        np.testing.assert_array_equal(np.rint(found.audio), expected.audio)
        assert_same(found._replace(audio=expected.audio), expected)


def test_pitch_is_a_function_of_seed_and_step(voices: Dataset) -> None:
    config = train_config(data={"pitch": 0.5, "flip": 0.5, "audio_noise": 0.001})
    whole = take(config, [voices], 4)
    for found, expected in zip(take(config, [voices], 2, start_step=2), whole[2:], strict=True):
        assert_same(found, expected)
    for rows in (range(4), range(4, 8)):
        for found, expected in zip(take(config, [voices], 4, rows=rows), whole, strict=True):
            assert_same(found, Batch(*(array[list(rows)] for array in expected)))


def test_without_pitch_shifted_voices_change_nothing(dataset: Dataset, voices: Dataset) -> None:
    config = train_config(data={"flip": 0.5, "audio_noise": 0.1})
    for number in range(10):
        assert_same(Samples(config, [voices])(number), Samples(config, [dataset])(number))


def test_pitch_is_a_probability() -> None:
    with pytest.raises(UserError, match=r"data\.pitch is a probability, from 0 to 1, not 2"):
        train_config(data={"pitch": 2.0})


def test_pitch_needs_shifted_voices(dataset: Dataset, voices: Dataset) -> None:
    config = train_config(data={"pitch": 0.5})
    check_fits(voices, config)
    with pytest.raises(UserError, match=r"has no pitch-shifted voices, which data\.pitch needs"):
        check_fits(dataset, config)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of one clip with stored samples and without pixels."""
    settings = dataclasses.replace(SETTINGS, latents="sample", frames=False)
    return write_dataset(tmp_path_factory.mktemp("drawn") / "dataset", [30], settings)


WITHOUT_PIXELS = LossConfig(pixel="none")


def test_a_stored_sample_has_no_variance(drawn: Dataset) -> None:
    sample = Samples(train_config(loss=WITHOUT_PIXELS), [drawn])(0)
    assert sample.mean.dtype == sample.logvar.dtype == np.float32
    assert (sample.logvar == -30).all()
    assert (sample.reference_logvar == -30).all()


def test_a_batch_has_one_type_whatever_its_clips_are_of(dataset: Dataset, drawn: Dataset) -> None:
    samples = Samples(train_config(loss=WITHOUT_PIXELS), [dataset, drawn])
    assert {samples.clip(number)[0] for number in range(20)} == {0, 1}
    for number in range(20):
        sample = samples(number)
        for name in ("mean", "logvar", "reference_mean", "reference_logvar"):
            assert getattr(sample, name).dtype == np.float32


@pytest.mark.parametrize(("pixel", "pictures"), [("none", 0), ("l2", 1)])
@pytest.mark.parametrize(("kind", "references"), [("keyframe", 1), ("interpolation", 0)])
def test_a_sample_reads_what_it_needs_alone(
    voices: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    pixel: PixelLoss,
    pictures: int,
    kind: str,
    references: int,
) -> None:
    read: Counter[str] = Counter()
    plain = RecordReader.read

    def counting(reader: RecordReader, indices: Sequence[int]) -> list[bytes]:
        records = plain(reader, indices)
        read.update(name for record in records for name in decode_record(record))
        return records

    monkeypatch.setattr(RecordReader, "read", counting)
    sample = Samples(train_config(kind, loss=LossConfig(pixel=pixel)), [voices])(0)
    latents = dict.fromkeys(("mean", "logvar", "landmarks"), 4 + references)
    assert +read == Counter(latents | {"audio_hubert": 4, "frame": pictures})
    assert sample.frame.shape == ((SIZE, SIZE, 3) if pictures else (0, 0, 3))


def test_what_a_sample_draws_does_not_depend_on_the_pixel_loss(voices: Dataset) -> None:
    data = {"pitch": 0.5, "flip": 0.5, "audio_noise": 0.1}
    without = Samples(train_config(data=data, loss=WITHOUT_PIXELS), [voices])
    with_pixels = Samples(train_config(data=data), [voices])
    for number in range(10):
        found = without(number)
        assert_same(found, with_pixels(number)._replace(frame=found.frame))


@pytest.mark.parametrize("kind", ["keyframe", "interpolation"])
def test_whole_records_give_the_same_batches(voices: Dataset, tmp_path: Path, kind: str) -> None:
    before = write_dataset(tmp_path / "before", CLIPS, voices.settings, format=UNGROUPED)
    config = train_config(kind, data={"pitch": 0.5, "flip": 0.5, "audio_noise": 0.1})
    for found, expected in zip(take(config, [before], 3), take(config, [voices], 3), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["box", "full", "heart", "mouth"])
def test_masks_are_the_references(golden: Path, kind: Any) -> None:
    with np.load(golden / "dev.masks.npz") as file:
        landmarks, expected = file["landmarks_512"], file[f"{kind}_64"]
    np.testing.assert_array_equal(latent_masks(landmarks, 512, 64, kind), expected.reshape(-1, 64, 64))
    scaled = landmarks.astype(np.float32) / 32
    np.testing.assert_array_equal(latent_masks(scaled, 16, 64, kind), expected.reshape(-1, 64, 64))
