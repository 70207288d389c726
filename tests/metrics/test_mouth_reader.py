"""The shipped mouth reader on people that it was not trained on."""

from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.metrics.mouth import BATCH, PATCH, WEIGHTS, MouthReader, cut_patch, eye_distance
from keysync_jax.metrics.mouth_training import (
    draw_examples,
    draw_mouths,
    give_mouth,
    soften,
    targets_of,
    train,
    vary,
)
from keysync_jax.metrics.sync import correlation
from keysync_jax.synthetic.articulation import Articulation, at_rest
from keysync_jax.synthetic.face import Picture, render
from keysync_jax.synthetic.identity import draw_identity
from keysync_jax.synthetic.motion import draw_motion, still
from keysync_jax.synthetic.world import draw_clip
from keysync_jax.tensorfile import write_tensors

SEED = 31
"""Of a world that neither the reader's training nor its shipped figures have seen."""


@pytest.fixture(scope="module")
def reader() -> MouthReader:
    return MouthReader.load()


@pytest.fixture(scope="module")
def clips() -> list[list[Picture]]:
    return [list(draw_clip(SEED, number, 2.0).pictures()) for number in range(4)]


def landmarks_of(pictures: list[Picture]) -> np.ndarray:
    return np.stack([picture.landmarks for picture in pictures])


def read(reader: MouthReader, pictures: list[Picture]) -> np.ndarray:
    """(opening, width, MAR), `[T, 3]`."""
    mouths = reader.read((picture.pixels for picture in pictures), landmarks_of(pictures))
    return np.column_stack([mouths.opening, mouths.width, mouths.mar])


def test_it_reads_talking_mouths(reader: MouthReader, clips: list[list[Picture]]) -> None:
    for pictures in clips:
        found, true = read(reader, pictures), targets_of(pictures)
        assert correlation(found[:, 0], true[:, 0]) > 0.97
        assert correlation(found[:, 2], true[:, 2]) > 0.97
        opening, width, mar = np.abs(found - true).mean(axis=0)
        assert opening < 0.03
        assert width < 0.05
        assert mar < 0.05


def test_it_reads_what_a_generator_of_96_pixels_leaves(
    reader: MouthReader, clips: list[list[Picture]]
) -> None:
    for pictures in clips:
        soft = [picture._replace(pixels=soften(picture, blur=0.7)) for picture in pictures]
        found, true = read(reader, soft), targets_of(pictures)
        assert correlation(found[:, 0], true[:, 0]) > 0.96
        assert np.abs(found - true)[:, 0].mean() < 0.04


def test_it_reads_the_frame_and_not_the_landmarks_of_the_mouth(
    reader: MouthReader, clips: list[list[Picture]]
) -> None:
    pictures = clips[0]
    expected = read(reader, pictures)
    moved = [picture._replace(landmarks=picture.landmarks.copy()) for picture in pictures]
    for picture in moved:
        picture.landmarks[:27] = picture.landmarks[48:] = 5.0
    np.testing.assert_array_equal(read(reader, moved), expected)


def test_another_voice_gives_another_reading(reader: MouthReader, clips: list[list[Picture]]) -> None:
    """A reader that found the mouth by anything but the mouth could not tell these two apart."""
    clip, other = draw_clip(SEED, 0, 2.0), draw_clip(SEED, 1, 2.0)
    dub = list(clip.pictures(other.utterance))
    found = read(reader, dub)[:, 0]
    assert correlation(found, targets_of(dub)[:, 0]) > 0.97
    assert correlation(found, targets_of(clips[0])[:, 0]) < 0.6


def test_a_resting_mouth_reads_the_same_while_the_head_moves(reader: MouthReader) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(3):
        who = draw_identity(rng)
        found = read(reader, list(render(who, draw_motion(rng, 40), at_rest(40))))
        assert found[:, 0].max() < 0.06
        assert found[:, 0].std() < 0.01
        assert found[:, 2].std() < 0.01


def test_it_follows_each_direction_by_itself(reader: MouthReader) -> None:
    who = draw_identity(np.random.default_rng(SEED))
    steps, some = np.linspace(0, 1, 12, dtype=np.float32), np.full(12, 0.4, np.float32)
    no = np.zeros(12, np.float32)
    opening = read(reader, list(render(who, still(12), Articulation(steps, no, no, some))))
    width = read(reader, list(render(who, still(12), Articulation(some, 2 * steps - 1, no, some))))
    assert (np.diff(opening[:, 0]) > 0).all()
    assert (np.diff(width[:, 1]) > 0).all()
    assert np.ptp(width[:, 0]) < 0.25 * np.ptp(opening[:, 0])


@pytest.mark.parametrize(("scale", "degrees", "shift"), [(2.0, 0, 0), (1.5, 10, 40), (0.8, -15, 10)])
def test_size_place_and_tilt_of_the_head_do_not_matter(
    reader: MouthReader, clips: list[list[Picture]], scale: float, degrees: float, shift: float
) -> None:
    pictures = clips[1][::4]
    matrix = cv2.getRotationMatrix2D((127.5, 127.5), degrees, scale)
    matrix[:, 2] += (scale - 1) * 127.5 + shift
    side = int(256 * scale) + 80
    moved = [
        picture._replace(
            pixels=cv2.warpAffine(picture.pixels, matrix, (side, side), flags=cv2.INTER_LINEAR),
            landmarks=picture.landmarks @ matrix[:, :2].T + matrix[:, 2],
        )
        for picture in pictures
    ]
    difference = np.abs(read(reader, moved) - read(reader, pictures))
    assert difference.mean() < 0.015
    assert difference.max() < 0.06


def test_the_patch_has_the_eyes_scale_and_place() -> None:
    landmarks = np.zeros((68, 2))
    landmarks[[36, 39, 42, 45]] = [[40, 50], [60, 50], [80, 50], [100, 50]]
    # Eyes 40 apart, centred at (70, 50): the patch is 64 wide, from (38, 78) on.
    frame = np.zeros((200, 150, 3), np.uint8)
    frame[78:142, 38:102] = 200
    assert eye_distance(landmarks) == 40
    patch = cut_patch(frame, landmarks)
    assert patch.shape == (PATCH, PATCH, 3)
    assert (patch[1:-1, 1:-1] == 200).all()
    landmarks[[36, 39, 42, 45], 0] += 32
    assert (cut_patch(frame, landmarks)[1:-1, PATCH // 2 + 1 :] == 0).all()


def test_any_number_of_frames_reads_alike(reader: MouthReader) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (BATCH + 3, PATCH, PATCH, 3), np.uint8)
    whole, tail = reader.read_patches(patches), reader.read_patches(patches[BATCH:])
    assert all(len(track) == BATCH + 3 for track in whole)
    np.testing.assert_allclose(whole.opening[BATCH:], tail.opening, atol=1e-5)
    assert all(len(track) == 0 for track in reader.read([], np.zeros((0, 68, 2))))


def test_frames_and_landmarks_must_be_as_many(reader: MouthReader, clips: list[list[Picture]]) -> None:
    frames = [picture.pixels for picture in clips[0][:3]]
    with pytest.raises(ValueError, match="zip"):
        reader.read(frames, landmarks_of(clips[0][:2]))


def test_the_shipped_file_is_small_and_says_how_good_it_is(reader: MouthReader) -> None:
    assert WEIGHTS.stat().st_size < 600_000
    for condition in ("clean", "dub-like", "blurred"):
        assert reader.accuracy[f"{condition}/opening/clip_correlation"] > 0.97
        assert reader.accuracy[f"{condition}/opening/mae"] < 0.03


def test_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_tensors(other, {"x": np.zeros(3, np.float32)}, {"accuracy": "{}"})
    with pytest.raises(UserError, match="holds no mouth reader"):
        MouthReader.load(other)
    with pytest.raises(UserError, match="cannot be read"):
        MouthReader.load(tmp_path / "none.safetensors")


def test_training_mouths_cover_every_direction_independently() -> None:
    mouths = draw_mouths(np.random.default_rng(0), 4000)
    tracks = np.stack([mouths.opening, mouths.width, mouths.rounding, mouths.teeth])
    assert np.abs(np.corrcoef(tracks) - np.eye(4)).max() < 0.06
    assert (mouths.opening == 0).mean() > 0.05
    assert tracks.min(axis=1) == pytest.approx([0, -1, 0, 0], abs=0.01)
    assert tracks.max(axis=1) == pytest.approx([1, 1, 1, 1], abs=0.01)


def test_a_given_mouth_changes_the_mouth_alone() -> None:
    rng = np.random.default_rng(1)
    who, other = draw_identity(rng), draw_identity(rng)
    changed = {name for name, value in vars(give_mouth(who, other)).items() if value != vars(who)[name]}
    assert changed <= {"lip", "lip_fullness", "mouth_width", "mouth_curve", "mouth_gain"}
    assert {"lip_fullness", "mouth_width"} <= changed


def test_training_is_deterministic_and_its_weights_fit_the_reader(tmp_path: Path) -> None:
    examples = draw_examples(seed=5, heads=1, mouths=2, frames=3)
    assert examples.patches.shape == (12, PATCH, PATCH, 3)
    np.testing.assert_array_equal(examples.targets[::2], examples.targets[1::2])
    first, second = (train(examples, seed=5, steps=2) for _ in range(2))
    path = tmp_path / "reader.safetensors"
    write_tensors(path, first, {"accuracy": '{"clean/mar/mae": 0.5}'})
    again = MouthReader.load(path)
    assert again.accuracy == {"clean/mar/mae": 0.5}
    for found, expected in zip(
        again.read_patches(examples.patches),
        MouthReader(second, {}).read_patches(examples.patches),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_variation_keeps_the_mouth_in_place() -> None:
    patches = np.full((6, PATCH, PATCH, 3), 90, np.uint8)
    patches[:, 20:28, 10:20] = 220
    varied = np.asarray(jax.jit(vary)(patches, jax.random.key(0)))
    assert varied.dtype == np.uint8
    brightest = (
        varied.astype(int).sum(axis=-1)
        > varied.astype(int).sum(axis=-1).mean(axis=(1, 2), keepdims=True) + 90
    )
    mirrored = brightest[:, 24, 30:38].all(axis=1)
    plain = brightest[:, 24, 10:20].all(axis=1)
    assert (mirrored ^ plain).all()
