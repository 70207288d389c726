"""`keysync prepare --ray`: clips cut by CPU tasks, encoded by actors on devices, on however many nodes.

What is done to a clip is what `prepare` does on one machine (`faces.cut_faces`, then the maker's `part`), so
the dataset is the same. A clip is done at least once, and is once in the dataset: its part file appears
whole, under a name that follows from the clip's, and the process that holds the dataset's lock notes it then.
"""

import copy
import errno
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.data.faces import SHARED_BYTES, Faces, Task, cut_faces, in_memory, read_crops
from keysync_jax.data.parts import Part, Work
from keysync_jax.data.records import Settings
from keysync_jax.data.sources import Clip
from keysync_jax.errors import UserError
from keysync_jax.files import temporary_folder
from keysync_jax.launch.ray_cluster import RETRIES, actors, connected, outcome_of, shared_out

CLIPS_AHEAD = 2
"""Clips that are cut for each device before it asks for them, besides those that CPUs are at; they wait in
Ray's object store."""


class OnRay:
    """A maker of records from videos (`data.from_videos`), which works on a Ray cluster.

    Args:
      maker: of this machine. It is sent to the devices, so it must not have loaded anything.
      address: as `ray_cluster.connected` takes it.

    Raises:
      UserError: the maker is none of videos, or its settings name processes or devices of one machine.
    """

    def __init__(self, maker: Any, address: str = "") -> None:
        from keysync_jax.data.from_videos import FromVideos, Videos

        if not isinstance(maker, Videos):
            raise UserError("precomputed latents are only packed, for which --ray is not needed")
        if maker.settings.workers or maker.settings.devices is not None:
            raise UserError("--ray takes all that the cluster has; leave --workers and --devices out")
        self.stored: Settings = maker.stored
        self._address, self._maker = address, copy.copy(maker)
        if (file := maker.settings.landmark_model) is not None:
            self._maker.settings = replace(maker.settings, landmark_model=file.absolute())
        if isinstance(self._maker, FromVideos):
            self._maker.model = replace(self._maker.model, folder=self._maker.model.folder.absolute())

    def make(self, clips: Sequence[Clip], work: Work) -> Generator[tuple[Clip, Part | str]]:
        """A part, or the reason why there is none, for every clip, in the order in which they are done."""
        if not clips:
            return
        with connected(self._address) as ray:
            encoders = actors(ray, Encoder, self._maker)
            ahead = CLIPS_AHEAD * len(encoders) + int(ray.cluster_resources().get("CPU", 0))
            cutting = _Cutting(ray, self._maker, clips, ahead)

            def start(encoder: Any, item: tuple[Clip, Faces, Any]) -> Any:
                clip, faces, crops = item
                return encoder.part.remote(clip, faces, crops, work.records(clip).absolute())

            for (clip, _, _), made in shared_out(ray, encoders, cutting, start):
                part = outcome_of(ray, made)
                if not work.records(clip).is_file():
                    why = "a node has written a part here, which is not seen; all must share this folder"
                    raise OSError(errno.EIO, why, str(work.output))
                yield clip, part
                yield from cutting.skipped()
            yield from cutting.skipped()


class Encoder:
    """An actor: writes the part files of clips, with networks that stay loaded."""

    def __init__(self, maker: Any) -> None:
        from keysync_jax.backend import keep_compiled
        from keysync_jax.media.assets import cache_folder

        keep_compiled(cache_folder() / "compiled")
        self._maker = maker

    def part(self, clip: Clip, faces: Faces, crops: np.ndarray, path: Path) -> Part:
        from keysync_jax.backend import computing

        with computing(self._maker.settings.dtype):
            part: Part = self._maker.part(clip, faces, crops, path)
        return part


def cut(task: Task) -> tuple[Faces | str, np.ndarray | None]:
    """Faces of a clip and its crops, uint8 `[T, S, S, 3]`; or why it cannot be used."""
    with temporary_folder("keysync-crops") as folder, in_memory(task, SHARED_BYTES) as given:
        found = cut_faces(replace(given, crops=folder / "crops"))
        if isinstance(found, str):
            return found, None
        return found, np.stack(list(read_crops(found, task.size)))


class _Cutting(Iterator[tuple[Clip, Faces, Any]]):
    """Clips that are cut, each when it is asked for, as soon as one is done; some are cut ahead.

    The crops stay in Ray's object store, where the device's node takes them from.
    """

    def __init__(self, ray: Any, maker: Any, clips: Sequence[Clip], ahead: int) -> None:
        self._ray, self._maker, self._ahead = ray, maker, ahead
        self._cut = ray.remote(cut).options(num_cpus=1, num_returns=2, max_retries=RETRIES)
        self._waiting, self._running = iter(clips), dict[Any, tuple[Clip, Any]]()
        self._skipped: list[tuple[Clip, str]] = []
        self._fill()

    def __next__(self) -> tuple[Clip, Faces, Any]:
        while self._running:
            ((found, *_), _) = self._ray.wait(list(self._running))
            clip, crops = self._running.pop(found)
            self._fill()
            faces = self._faces(clip, found)
            if isinstance(faces, Faces):
                return clip, faces, crops
            self._skipped.append((clip, faces))
        raise StopIteration

    def skipped(self) -> list[tuple[Clip, str]]:
        """Clips that cannot be used, each with its reason; those that were not told yet."""
        told, self._skipped = self._skipped, []
        return told

    def _fill(self) -> None:
        for clip in self._waiting:
            found, crops = self._cut.remote(self._maker.task(_absolute(clip), Path()))
            self._running[found] = clip, crops
            if len(self._running) >= self._ahead:
                return

    def _faces(self, clip: Clip, found: Any) -> Faces | str:
        try:
            faces: Faces | str = outcome_of(self._ray, found)
            return faces
        except self._ray.exceptions.WorkerCrashedError:
            return f"{clip.path}: reading it ended its process {1 + RETRIES} times (a crash in a decoder)"


def _absolute(clip: Clip) -> Clip:
    """The clip as a process finds it that was started in another folder."""
    return replace(
        clip,
        path=clip.path.absolute(),
        landmarks=None if clip.landmarks is None else clip.landmarks.absolute(),
    )
