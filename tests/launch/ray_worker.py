"""By hand: prepare, or dub, on a local Ray cluster whose actors are killed at random, against no Ray.

    python -m tests.launch.ray_worker prepare FOLDER --clips 40
    python -m tests.launch.ray_worker dub FOLDER --clips 10

With the embedded model. Prints JSON: how many actors were killed, and in the middle of what; whether files
are the same; how often each clip is there. `tests/launch/test_ray.py` runs `prepare` in a small size.
"""

import argparse
import csv
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from keysync_jax.backend import keep_compiled
from keysync_jax.data.faces import Faces
from keysync_jax.data.join import join
from keysync_jax.data.parts import Part
from keysync_jax.data.prepare import PrepareSettings, prepare
from keysync_jax.data.records import Dataset
from keysync_jax.data.sources import Clip
from keysync_jax.launch import ray_prepare
from keysync_jax.launch.ray_dub import on_ray
from keysync_jax.launch.ray_prepare import Encoder, OnRay
from keysync_jax.media.assets import cache_folder
from keysync_jax.media.video import read_frames
from keysync_jax.model import DEFAULT, open_model
from keysync_jax.pipeline.dub import DubSettings
from keysync_jax.pipeline.pairs import dub_pairs, read_pairs
from keysync_jax.synthetic.write import SynthSettings, synth

PARTS = 4


@contextmanager
def killing(actor: str, at: list[int], progress: Callable[[], int], seed: int) -> Iterator[list[str]]:
    """Kills an actor of this process's cluster in the middle of a call, each time that so much is done.

    Args:
      actor: its class's name.
      at: values of `progress`, ascending.

    Yields:
      What each was at.
    """
    draw, killed, over = random.Random(seed), list[str](), threading.Event()

    def kill_each() -> None:
        for count in at:
            while not over.is_set() and progress() < count:
                time.sleep(0.02)
            time.sleep(draw.random())
            while not over.is_set() and not (found := busy(actor)):
                time.sleep(0.01)
            if over.is_set():
                return
            victim = draw.choice(found)
            with suppress(psutil.NoSuchProcess):
                title = victim.cmdline()[0]
                victim.send_signal(signal.SIGKILL)
                killed.append(title)

    thread = threading.Thread(target=kill_each, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def busy(actor: str) -> list[psutil.Process]:
    """Processes below this one that are an actor of that class in the middle of a call."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith(f"ray::{actor}."):
                found.append(process)
    return found


def dying(mark: Path) -> type:
    """The actor of `prepare`, which is killed in the middle of a clip once; the file says that it was."""

    class Dying(Encoder):
        def part(self, clip: Clip, faces: Faces, crops: Any, path: Path) -> Part:
            def until_killed() -> Iterator[Any]:
                for number, crop in enumerate(crops):
                    if number == 3 and not mark.exists():
                        mark.touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield crop

            return super().part(clip, faces, until_killed(), path)

    return Dying


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def try_prepare(folder: Path, clips: int, seconds: float, kills: int, crop: int | None) -> dict[str, Any]:
    """Once without Ray, once on it with kills, once in parts.

    Args:
      kills: at random; 0: once, in the middle of the first clip.
    """
    source, ray, one = folder / "clips", folder / "ray", folder / "one"
    synth(source, SynthSettings(clips=clips, seconds=seconds, seed=11))
    settings = PrepareSettings(crop=crop)
    model = None if crop is not None else DEFAULT
    times = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        begun = time.monotonic()
        call()
        times[name] = round(time.monotonic() - begun, 1)

    timed("one", lambda: prepare(source, one, model, settings))
    mark = (folder / "killed").absolute()
    if not kills:
        ray_prepare.Encoder = dying(mark)  # type: ignore[misc]
    at = [(1 + kill) * clips // (kills + 2) for kill in range(kills)]
    with killing("Encoder", at, lambda: len(list((ray / ".work/parts").glob("*.json"))), seed=3) as killed:
        timed("ray", lambda: prepare(source, ray, model, settings, elsewhere=OnRay))
    parts = [folder / f"part-{number}" for number in range(PARTS)]
    for number, part in enumerate(parts):
        cut = PrepareSettings(crop=crop, part=(number, PARTS))
        timed(f"part {number}", lambda part=part, cut=cut: prepare(source, part, model, cut))  # type: ignore[misc]
    join(parts, folder / "joined")
    content = {name: Dataset(folder / name).content_sha256() for name in ("one", "ray", "joined")}
    return {
        "killed": killed + ["once"] * mark.exists(),
        "seconds": times,
        "ray: all files equal": contents(ray) == contents(one),
        "content": content,
        "clips, each once": dict(Counter(Counter(clip.name for clip in Dataset(ray).clips).values())),
        "left behind": sorted(path.name for path in ray.iterdir()),
    }


def try_dub(folder: Path, clips: int, seconds: float, kills: int) -> dict[str, Any]:
    """The same pairs without Ray, and on it with kills."""
    source = folder / "clips"
    synth(source, SynthSettings(clips=clips, seconds=seconds, seed=12))
    names = sorted(path.stem for path in source.glob("*.mp4"))
    with (source / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "voice", "out", "landmarks"])
        for first, second in zip(names, [*names[1:], names[0]], strict=True):
            rows.writerow([f"{first}.mp4", f"{second}.mp4", f"{first}.mp4", f"{first}.npy"])
    model, done = open_model(DEFAULT), {}
    at = [(1 + kill) * clips // (kills + 2) for kill in range(kills)]
    for name in ("one", "ray"):
        pairs = read_pairs(source / "list.csv", folder / name, DubSettings())
        if name == "one":
            done[name] = dub_pairs(pairs, folder / name, model)
            continue
        with killing("Dubber", at, lambda: len(list((folder / "ray").glob("clip*.json"))), seed=4) as killed:
            done[name] = dub_pairs(pairs, folder / name, model, made=on_ray(DEFAULT))
    same = [
        all(
            (a == b).all() for a, b in zip(*(read_frames(folder / n / f"{v}.mp4") for n in done), strict=True)
        )
        for v in names
    ]
    return {
        "killed": killed,
        "states": {name: dict(Counter(o.state for o in report.outcomes)) for name, report in done.items()},
        "dubs of equal pixels": sum(same),
        "left behind": sorted(p.name for p in (folder / "ray").iterdir() if p.name.startswith(".")),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("prepare", "dub"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--crop", type=int, help="prepare crops alone, without a model")
    given = parser.parse_args()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        keep_compiled(cache_folder() / "compiled")
    if given.what == "prepare":
        found = try_prepare(given.folder, given.clips, given.seconds, given.kills, given.crop)
    else:
        found = try_dub(given.folder, given.clips, given.seconds, given.kills)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
