"""Clips to prepare, and what the tests of `keysync prepare` share."""

from pathlib import Path
from typing import ClassVar

import numpy as np

from keysync_jax.model import Model, Network, open_model
from tests.clips import face_landmarks, write_video, write_voice

FRAMES = {"a2": 20, "a10": 31, "sub/b": 16}


def add_clip(folder: Path, name: str, frames: int, landmarks: np.ndarray | None = None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    voice = write_voice(folder.parent / "voice.wav", frames / 25)
    write_video(folder / f"{name}.mp4", frames, voice=voice)
    np.save(folder / f"{name}.npy", face_landmarks(frames) if landmarks is None else landmarks)


def write_good(folder: Path) -> Path:
    """Three clips that can be prepared."""
    for name, frames in FRAMES.items():
        add_clip(folder, name, frames)
    return folder


class KeptModel(Model):
    """Loads each component once."""

    kept: ClassVar[dict[str, Network]] = {}

    def load(self, component: str, dtype: str = "fp32") -> Network:
        if component not in self.kept:
            self.kept[component] = super().load(component, dtype)
        return self.kept[component]


def kept_model(folder: Path) -> Model:
    """The model directory, opened as a `KeptModel`."""
    opened = open_model(folder)
    return KeptModel(opened.folder, opened.config, opened.hashes)


def contents(folder: Path) -> dict[str, bytes]:
    assert all(path.is_file() for path in folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt
