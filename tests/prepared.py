"""Small prepared datasets made without a model: every array tells its clip and frame."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.data.arrayrecord import RecordWriter
from keysync_jax.data.records import (
    FORMAT,
    ClipInfo,
    Dataset,
    EncoderInfo,
    Manifest,
    Record,
    Settings,
    ShardInfo,
    audio_name,
    encode_frame,
    encode_frame_records,
)
from keysync_jax.files import sha256_of
from keysync_jax.media.landmarks import runs_without
from keysync_jax.train.config import DataConfig, TrainConfig
from tests.clips import face_landmarks

SIZE, LATENT = 16, 8
CLIPS_PER_SHARD = 2
SETTINGS = Settings(
    crop_size=SIZE,
    latent_size=LATENT,
    latents="posterior",
    frames=True,
    vae="a" * 64,
    encoders={"hubert": EncoderInfo(6, "b" * 64), "wavlm": EncoderInfo(4, None)},
    landmarks="mediapipe",
)


def record(clip: int, frame: int, latents: str = "posterior", channels: int = 4) -> dict[str, np.ndarray]:
    """The left half of everything is 0, the right one tells clip and frame."""
    dtype = np.float16 if latents == "posterior" else np.float32
    right = np.arange(LATENT)[None, :, None] >= LATENT // 2
    mean = np.where(right, np.array(100 * clip + frame), 0) * np.ones((LATENT, LATENT, channels))
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[:, SIZE // 2 :] = frame % 250
    moments = {"mean": mean.astype(dtype)}
    if latents == "posterior":
        moments["logvar"] = np.full((LATENT, LATENT, channels), -3 - clip, dtype)
    return {
        **moments,
        "landmarks": face_landmarks(frame + 1, SIZE, SIZE)[frame] / 4,
        "audio_hubert": np.full((2, 6), 1000 * clip + frame, np.float32),
        "audio_wavlm": np.full((2, 4), -frame, np.float32),
        "frame": encode_frame(picture),
    }


def shifted_features(plain: np.ndarray, semitones: float) -> np.ndarray:
    """Features of a shifted voice: the plain ones and a part that tells the shift."""
    return (plain + semitones / 100).astype(np.float32)


def write_clip(writer: RecordWriter, manifest: Manifest, frames: Sequence[Record]) -> None:
    """The records of a clip's frames, group after group."""
    records = [encode_frame_records(arrays, manifest.groups) for arrays in frames]
    for group in zip(*records, strict=True):
        for data in group:
            writer.write(data)


def write_dataset(
    folder: Path,
    clips: Sequence[int | np.ndarray],
    settings: Settings = SETTINGS,
    number: int = 0,
    format: str = FORMAT,
    channels: int = 4,
) -> Dataset:
    """A dataset of clips with that many frames, or with a bool `[T]` that tells where there is a face.

    number: of the first clip, as the arrays tell it. channels: of the latents.
    """
    folder.mkdir()
    infos, shards = [], []
    manifest = Manifest(settings, (), (), format)
    for start in range(0, len(clips), CLIPS_PER_SHARD):
        path = folder / f"shard-{len(shards):05d}.arrayrecord"
        with RecordWriter(path) as writer:
            for i, clip in enumerate(clips[start : start + CLIPS_PER_SHARD], start):
                present = np.ones(clip, bool) if isinstance(clip, int) else clip
                gaps = runs_without(present)
                info = ClipInfo(
                    f"clip{i}", f"clip{i}.mp4", "c" * 64, len(present), len(shards), writer.records, gaps
                )
                infos.append(info)
                frames = []
                for frame in range(len(present)):
                    arrays = record(number + i, frame, settings.latents, channels)
                    arrays |= {
                        audio_name(kind, shift): shifted_features(arrays[audio_name(kind)], shift)
                        for kind in settings.encoders
                        for shift in settings.pitch
                    }
                    frames.append(arrays)
                write_clip(writer, manifest, frames)
        shards.append(ShardInfo(path.name, writer.records, path.stat().st_size, sha256_of(path)))
    replace(manifest, shards=tuple(shards), clips=tuple(infos)).save(folder)
    return Dataset(folder)


def train_config(kind: str = "keyframe", data: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """A config that fits `SETTINGS`: samples of 4 frames, keyframes 5 apart."""
    unet = UNetConfig(block_out_channels=(32, 64), head_dim=16, attention_levels=(0, 1))
    stage = StageConfig(kind, "hubert", unet, audio_dim=6, frames=4, latent_size=LATENT)  # type: ignore[arg-type]
    fields = {"batch_size": 8, "steps": 20, "seed": 3, **changes}
    options = DataConfig(**{"keyframe_stride": 5, **(data or {})})
    return TrainConfig(stage, vae=VAEConfig(block_out_channels=(32, 64)), data=options, **fields)
