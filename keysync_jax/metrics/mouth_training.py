"""Training of the mouth reader: `python -m keysync_jax.metrics.mouth_training --seed S -o FILE`.

The frames are of people that no world with a small seed shows, with mouths that vary in every direction
independently, wider than speech does; and as a dub is, reduced to the generator's size and compressed.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax

from keysync_jax.backend import computing
from keysync_jax.media.crop import crop_frame, crop_track
from keysync_jax.media.timeline import FPS
from keysync_jax.media.video import read_frames
from keysync_jax.media.writer import VideoWriter
from keysync_jax.metrics.mouth import MouthReader, Mouths, cut_patch, eye_distance, make_network
from keysync_jax.metrics.sync import correlation
from keysync_jax.nn import functional as F
from keysync_jax.synthetic.articulation import Articulation
from keysync_jax.synthetic.face import FacePainter, Picture, mouth_aspect_ratio
from keysync_jax.synthetic.identity import LIP_CONTRAST, Identity, draw_identity
from keysync_jax.synthetic.motion import Motion, draw_motion
from keysync_jax.synthetic.world import SIZE, draw_clip
from keysync_jax.tensorfile import write_tensors
from keysync_jax.typing import Array, Params

WORLD = 987_654_321
"""Seed of the people here; worlds are made with other ones."""

HELD_OUT = 1_000_000
"""Number of the first person who is not trained on."""

GENERATOR_SIZE = 128
"""Side of the face crop that the small model generates, pixels."""

BATCH, LEARNING_RATE = 128, 2e-3
CONDITIONS = ("clean", "dub-like", "blurred")


class Examples(NamedTuple):
    """patches: uint8 `[N, 48, 48, 3]`. targets: (opening, width, MAR), float32 `[N, 3]`."""

    patches: np.ndarray
    targets: np.ndarray


def draw_mouths(rng: np.random.Generator, frames: int) -> Articulation:
    """Mouths of frames that have nothing to do with each other; one in five is closed or nearly so."""
    reach = np.where(rng.random(frames) < 0.2, 0.1, 1.0)
    opening = np.maximum(rng.uniform(-0.1, 1, frames) * reach, 0)
    rest = rng.uniform(-1, 1, frames), rng.uniform(0, 1, frames), rng.uniform(0, 1, frames)
    return Articulation(*(track.astype(np.float32) for track in (opening, *rest)))


def draw_person(seed: int, number: int, frames: int, mouths: int = 1) -> list[Picture]:
    """Frames of one person, a second apart; then as many with each of some other people's mouths.

    Painting a head takes as long as fifty frames of it do, and what there is to read is the mouth.
    """
    rng = np.random.default_rng([WORLD, seed, number])
    who = draw_identity(rng)
    painter, pictures = FacePainter(who, SIZE), []
    for each in range(mouths):
        if each:
            painter.who = give_mouth(who, draw_identity(rng))
        motion = draw_motion(rng, FPS * frames)
        apart = Motion(*(track[::FPS] for track in vars(motion).values()))
        articulation = draw_mouths(rng, frames)
        pictures += [painter.frame(apart, articulation, t) for t in range(frames)]
    return pictures


def give_mouth(who: Identity, other: Identity) -> Identity:
    """The person with the other's mouth; the lips keep their colour where the other's is like the skin."""
    told = np.linalg.norm(np.subtract(other.lip, who.skin)) >= LIP_CONTRAST
    return replace(
        who,
        lip=other.lip if told else who.lip,
        lip_fullness=other.lip_fullness,
        mouth_width=who.face_width * other.mouth_width / other.face_width,
        mouth_curve=other.mouth_curve,
        mouth_gain=other.mouth_gain,
    )


def targets_of(pictures: list[Picture]) -> np.ndarray:
    """(opening, width, MAR) by the true landmarks: float32 `[T, 3]`."""
    landmarks = np.stack([picture.landmarks for picture in pictures])
    lengths = np.array([(picture.mouth_gap, picture.mouth_width) for picture in pictures])
    relative = lengths / eye_distance(landmarks)[:, None]
    return np.column_stack([relative, mouth_aspect_ratio(landmarks)]).astype(np.float32)


def soften(picture: Picture, blur: float, quality: int | None = None) -> np.ndarray:
    """A frame whose face went through the generator's resolution and back: uint8 `[H, W, 3]`.

    blur: sigma of a Gaussian, in pixels of the reduced crop; 0 for none. quality: of a JPEG compression of
    the reduced crop, 0 to 100; None for none.
    """
    frame = picture.pixels.copy()
    x0, y0, x1, y1 = box = crop_track(picture.landmarks[None], np.ones(1, bool), *frame.shape[:2])[0]
    small = crop_frame(frame, box, GENERATOR_SIZE)
    if blur > 0:
        small = cv2.GaussianBlur(small, (0, 0), blur)
    if quality is not None:
        _, code = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        small = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR_RGB))
    frame[y0:y1, x0:x1] = cv2.resize(small, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
    return frame


def draw_examples(seed: int, heads: int, mouths: int, frames: int) -> Examples:
    """Two examples a frame, one of them softened; the eyes are found with an error of half a pixel."""
    patches, targets = [], []
    for number in range(heads):
        rng = np.random.default_rng([WORLD, seed, number, 1])
        pictures = draw_person(seed, number, frames, mouths)
        for picture in pictures:
            soft = soften(picture, max(0.0, rng.uniform(-0.3, 1.2)), int(rng.integers(40, 96)))
            for frame in (picture.pixels, soft):
                patches.append(cut_patch(frame, picture.landmarks + rng.normal(0, 0.5, (68, 2))))
        targets.append(np.repeat(targets_of(pictures), 2, axis=0))
    return Examples(np.stack(patches), np.concatenate(targets))


def vary(patches: Array, key: Array) -> Array:
    """Random contrast, brightness, colour, noise and mirror image: uint8 `[N, 48, 48, 3]`, the same."""
    gain, tint, shift, noise, mirror = jax.random.split(key, 5)
    n = len(patches)
    x = jnp.where(jax.random.bernoulli(mirror, 0.5, (n, 1, 1, 1)), patches[:, :, ::-1], patches)
    x = x.astype(jnp.float32) * jax.random.uniform(gain, (n, 1, 1, 1), minval=0.75, maxval=1.25)
    x = x * jax.random.uniform(tint, (n, 1, 1, 3), minval=0.9, maxval=1.1)
    x = x + jax.random.uniform(shift, (n, 1, 1, 1), minval=-20, maxval=20)
    strength, noise = jax.random.split(noise)
    x = x + jax.random.uniform(strength, (n, 1, 1, 1), maxval=5) * jax.random.normal(noise, x.shape)
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def train(examples: Examples, seed: int, steps: int) -> Params:
    """Weights after so many steps of Adam on the absolute error; deterministic."""
    graphdef, params = F.init(make_network, seed)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 20, steps))
    spread = examples.targets.std(axis=0)

    def loss_of(weights: Params, patches: Array, targets: Array) -> Array:
        return jnp.abs((F.bind(graphdef, weights)(patches) - targets) / spread).mean()

    @jax.jit
    def update(params, state, patches, targets, key):  # type: ignore[no-untyped-def]
        loss, gradient = jax.value_and_grad(loss_of)(params, vary(patches, key), targets)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state, loss

    state, key = optimizer.init(params), jax.random.key(seed)
    for step, batch in enumerate(_shuffled(len(examples.patches), steps, seed)):
        noise = jax.random.fold_in(key, step)
        with computing("fp32"):
            params, state, loss = update(
                params, state, examples.patches[batch], examples.targets[batch], noise
            )
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step}: mean absolute error {float(loss):.4f} standard deviations", flush=True)
    return params


def measure(reader: MouthReader, people: int = 60, clips: int = 8, seconds: float = 2.0) -> dict[str, float]:
    """Errors of a reader on people that it never saw.

    Returns:
      `{condition}/{quantity}/{figure}` -> value. Conditions: `clean`, as rendered; `dub-like`, the face
      reduced to 128 pixels and the video compressed with H.264 (CRF 16); `blurred`, reduced and blurred by a
      sigma of 1 pixel there. Quantities: `opening`, `width`, `mar`. Figures: `mae`, the mean absolute error
      (unit of the quantity, lower is better) and `correlation` (higher is better), both over mouths of every
      kind; `clip_correlation`, the mean over talking clips of the correlation over time (higher is better).
    """
    still = [draw_person(HELD_OUT, number, 8) for number in range(people)]
    talking = [list(draw_clip(WORLD, HELD_OUT + number, seconds).pictures()) for number in range(clips)]
    found: dict[str, float] = {}
    for condition in CONDITIONS:
        pairs = [_read(reader, pictures, condition) for pictures in still]
        read, true = (np.concatenate(x) for x in zip(*pairs, strict=True))
        spoken = [_read(reader, pictures, condition) for pictures in talking]
        for column, quantity in enumerate(("opening", "width", "mar")):
            name = f"{condition}/{quantity}"
            found[f"{name}/mae"] = float(np.abs(read - true)[:, column].mean())
            found[f"{name}/correlation"] = correlation(read[:, column], true[:, column])
            each = [correlation(a[:, column], b[:, column]) for a, b in spoken]
            found[f"{name}/clip_correlation"] = float(np.mean(each))
    return {name: round(value, 5) for name, value in found.items()}


def main() -> None:
    """Render, train, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=400)
    parser.add_argument("--mouths", type=int, default=4, help="of each head")
    parser.add_argument("--frames", type=int, default=8, help="of each mouth")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("-o", "--output", type=Path, required=True)
    settings = parser.parse_args()
    examples = draw_examples(settings.seed, settings.heads, settings.mouths, settings.frames)
    params = {k: np.asarray(x) for k, x in train(examples, settings.seed, settings.steps).items()}
    accuracy = measure(MouthReader(params, {}))
    recipe = {name: str(value) for name, value in vars(settings).items() if name != "output"}
    write_tensors(settings.output, params, {"accuracy": json.dumps(accuracy), "recipe": json.dumps(recipe)})
    for name, value in accuracy.items():
        print(f"{name} {value}")


def _shuffled(count: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of so many batches; every example once before any comes again."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:BATCH]
        order = order[BATCH:]


def _read(reader: MouthReader, pictures: list[Picture], condition: str) -> tuple[np.ndarray, np.ndarray]:
    """What the reader finds and what is true, (opening, width, MAR) `[T, 3]` each."""
    if condition == "clean":
        frames = [picture.pixels for picture in pictures]
    elif condition == "dub-like":
        frames = _compressed([soften(picture, 0) for picture in pictures])
    else:
        frames = [soften(picture, 1) for picture in pictures]
    mouths: Mouths = reader.read(frames, np.stack([picture.landmarks for picture in pictures]))
    return np.column_stack([mouths.opening, mouths.width, mouths.mar]), targets_of(pictures)


def _compressed(frames: list[np.ndarray]) -> list[np.ndarray]:
    """The frames after H.264 at the quality that dubs are written with."""
    height, width, _ = frames[0].shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with VideoWriter(path, width, height) as writer:
            for frame in frames:
                writer.write(frame)
        return list(read_frames(path))


if __name__ == "__main__":
    main()
