"""Folders of synthetic clips: the job behind `keysync synth`."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from keysync_jax.errors import UserError
from keysync_jax.files import settle, sweep
from keysync_jax.processes import Workers
from keysync_jax.synthetic.world import FORMAT, draw_clip, write_clip

SETTINGS = "world.json"

SHORTEST_SECONDS = 0.56
"""14 frames, the shortest sample."""


@dataclass(frozen=True)
class SynthSettings:
    """What to make.

    Attributes:
      clips: how many.
      seconds: length of each.
      seed: of the world; another seed has other people with other voices.
      occluded: share of the clips in which something passes before the mouth.
      workers: processes; 0: this one. The clips do not depend on it.
    """

    clips: int
    seconds: float = 8.0
    seed: int = 0
    occluded: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise UserError(f"the number of clips is 1 or more, not {self.clips}")
        if not self.seconds >= SHORTEST_SECONDS:
            raise UserError(f"a clip has {SHORTEST_SECONDS} seconds or more, not {self.seconds:g}")
        if self.seed < 0:
            raise UserError(f"the seed is 0 or more, not {self.seed}")
        if not 0 <= self.occluded <= 1:
            raise UserError(f"the share of occluded clips is 0 to 1, not {self.occluded:g}")
        if self.workers < 0:
            raise UserError(f"the number of workers is 0 or more, not {self.workers}")

    @property
    def world(self) -> dict[str, float | str]:
        """What the clips depend on, their number apart: a folder can be added to."""
        return {
            "format": FORMAT,
            "seed": self.seed,
            "seconds": self.seconds,
            "occluded": self.occluded,
        }


def synth(output: str | Path, settings: SynthSettings, show_progress: bool = False) -> int:
    """Makes clips; those that are there already are left as they are, so an interrupted call goes on.

    Args:
      output: folder of the clips, new or begun with the same settings.

    Returns:
      How many were made by this call.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    output = Path(output)
    settle(output / SETTINGS, settings.world, "synthetic clips")
    sweep(output)
    missing = [n for n in range(settings.clips) if not (output / f"clip-{n:05d}.mp4").is_file()]
    tasks = [(output, settings.seed, n, settings.seconds, _is_occluded(settings, n)) for n in missing]
    with (
        tqdm(
            total=settings.clips,
            initial=settings.clips - len(missing),
            desc="clips",
            unit=" clip",
            disable=not show_progress,
        ) as bar,
        closing(_run(tasks, settings.workers)) as made,
    ):
        for _ in made:
            bar.update()
    return len(missing)


def _is_occluded(settings: SynthSettings, number: int) -> bool:
    return bool(np.random.default_rng([settings.seed, number, 99]).random() < settings.occluded)


Task = tuple[Path, int, int, float, bool]


def _run(tasks: list[Task], workers: int) -> Generator[None]:
    if workers == 0:
        yield from map(_make, tasks)
        return
    with Workers(_make, workers) as pool:
        for _, done in pool.in_order(tasks, 2 * workers):
            yield done.result()


def _make(task: Task) -> None:
    folder, seed, number, seconds, occluded = task
    write_clip(folder, draw_clip(seed, number, seconds, occluded))
