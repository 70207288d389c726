"""A prepared dataset of random numbers, in the sizes of the tiny configs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keysync_jax.data.arrayrecord import RecordWriter
from keysync_jax.data.records import (
    ClipInfo,
    EncoderInfo,
    Manifest,
    Record,
    Settings,
    ShardInfo,
    encode_frame,
)
from keysync_jax.files import sha256_of
from tests.prepared import write_clip

CROP, LATENT = 16, 8


def write_dataset(
    folder: Path,
    lengths: Sequence[int] = (40, 31),
    encoder: str = "hubert",
    vae: str | None = None,
    audio: str | None = None,
    dim: int = 768,
) -> Path:
    """One shard with clips of these lengths; `vae` and `audio` are hashes for the manifest."""
    folder.mkdir(parents=True)
    path, rng, clips = folder / "00000.arrayrecord", np.random.default_rng(0), []
    settings = Settings(CROP, LATENT, "posterior", True, vae, {encoder: EncoderInfo(dim, audio)}, "given")
    with RecordWriter(path) as writer:
        for number, frames in enumerate(lengths):
            clips.append(ClipInfo(f"clip{number}", f"clip{number}.mp4", "0" * 64, frames, 0, writer.records))
            arrays = [random_record(rng, encoder, dim) for _ in range(frames)]
            write_clip(writer, Manifest(settings, (), ()), arrays)
    shard = ShardInfo(path.name, writer.records, path.stat().st_size, sha256_of(path))
    Manifest(settings, (shard,), tuple(clips)).save(folder)
    return folder


def random_record(rng: np.random.Generator, encoder: str, dim: int = 768) -> Record:
    shape = (LATENT, LATENT, 4)
    return {
        "mean": rng.standard_normal(shape).astype(np.float16),
        "logvar": np.full(shape, -4, np.float16),
        "landmarks": rng.uniform(2, CROP - 2, (68, 2)).astype(np.float32),
        f"audio_{encoder}": rng.standard_normal((2, dim)).astype(np.float32),
        "frame": encode_frame(rng.integers(0, 256, (CROP, CROP, 3), np.uint8)),
    }
