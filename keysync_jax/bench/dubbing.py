"""Whole dubs, phase by phase: of a given clip or a synthetic one, with a given model or a random one."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from keysync_jax.bench.measure import Timing, fresh_store
from keysync_jax.bench.report import against
from keysync_jax.bench.sizes import Size
from keysync_jax.config import DecoderConfig, Dtype, GuidanceConfig, ModelConfig
from keysync_jax.diffusion.schedule import STUDENTS
from keysync_jax.errors import UserError
from keysync_jax.files import temporary_folder
from keysync_jax.media.landmarks import save_landmarks
from keysync_jax.media.timeline import FPS
from keysync_jax.media.writer import VideoWriter
from keysync_jax.model import DTYPES, components, maker, save_model
from keysync_jax.nn.functional import shapes
from keysync_jax.pipeline.dub import DubReport, DubSettings, dub
from keysync_jax.pipeline.phases import PARTS, Phase
from keysync_jax.synthetic.world import draw_clip, write_wave

SEED = 3_000_017
"""World of the clips; its people are in no training set."""


@dataclass(frozen=True)
class Dubbing:
    """What is dubbed.

    Attributes:
      landmarks: as `DubSettings` takes them.
      note: what it is, for the reader; dubs of other notes are not compared.
    """

    video: Path
    voice: Path
    landmarks: str
    note: str


@dataclass(frozen=True)
class Dubbed:
    """One row of the table: a phase, or the whole ("dub").

    Attributes:
      note: what was dubbed.
      compile_seconds: of the first dub, which is not timed.
      timing: wall seconds of the dubs after it; nothing is compiled in them.
      frames: of the dub.
      busy: of each part of the machine that the phase uses, median seconds in which it was busy.
      host_bytes: peak of the process.
    """

    name: str
    note: str
    compile_seconds: float
    timing: Timing
    frames: int
    busy: dict[str, float] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.timing.median


def measure_dub(
    work: Dubbing, model: Path, settings: DubSettings, repeats: int, folder: Path
) -> list[Dubbed]:
    """Dubs a clip so many times, after one that compiles; a row for each phase, the whole last.

    Args:
      folder: for the dubs, which are removed.

    Raises:
      UserError: an input cannot be used.
    """
    settings = changed(settings, landmarks=work.landmarks)
    work = changed(work, note=f"{work.note}, memory {settings.memory}")

    def once(number: int) -> tuple[DubReport, float]:
        output, before = folder / f"dub-{number}.mp4", time.perf_counter()
        report = dub(work.video, work.voice, output, model, settings)
        seconds = time.perf_counter() - before
        output.unlink()
        return report, seconds

    (store := folder / "compiled").mkdir()
    with fresh_store(store):
        (first, _), *timed = [once(number) for number in range(repeats + 1)]
    later = [{phase.name: phase for phase in report.phases.done} for report, _ in timed]
    rows = [
        _row(f"dub {phase.name}", work, first, [phase], [phases[phase.name] for phases in later])
        for phase in first.phases.done
    ]
    whole = _row("dub", work, first, first.phases.done, timed[-1][0].phases.done)
    return [*rows, changed(whole, timing=Timing.of([seconds for _, seconds in timed]), busy={})]


def _row(
    name: str, work: Dubbing, dubbed: DubReport, first: Sequence[Phase], timed: Sequence[Phase]
) -> Dubbed:
    """A row of the same phase in several dubs.

    Args:
      first: of the dub that compiled.
      timed: of the dubs after it.
    """
    busy = {part: statistics.median(p.busy.get(part, 0.0) for p in timed) for part in first[0].busy}
    return Dubbed(
        name,
        work.note,
        sum(phase.compile_seconds for phase in first),
        Timing.of([phase.seconds for phase in timed]),
        dubbed.frames,
        busy,
        max(phase.peak_bytes for phase in timed),
    )


@contextmanager
def synthetic(width: int, height: int, seconds: float) -> Iterator[Dubbing]:
    """A clip of the synthetic world in a picture of any size, its landmarks, and another person's voice.

    The world's pictures are enlarged to the shorter side and stand in the middle; what is beside them is
    their edge. Two seconds at most are drawn, then played again: drawing takes longer than reading.

    Raises:
      UserError: a size or length that cannot be.
    """
    if width % 2 or height % 2 or min(width, height) < 64:
        raise UserError(f"a picture of {width} x {height}: both sides are even, and 64 or more")
    if not seconds >= 1:
        raise UserError(f"a clip to measure on has 1 second or more, not {seconds:g}")
    with temporary_folder("keysync-bench") as folder:
        clip, other = draw_clip(SEED, 0, min(seconds, 2.0)), draw_clip(SEED, 1, seconds)
        pictures, frames = list(clip.pictures()), round(seconds * FPS)
        side = min(width, height)
        scale, corner = (
            side / pictures[0].pixels.shape[0],
            np.array([(width - side) / 2, (height - side) / 2]),
        )
        points = np.stack([picture.landmarks * scale + corner for picture in pictures])
        save_landmarks(folder / "landmarks.npy", np.resize(points, (frames, *points.shape[1:])))
        voice, video = folder / "voice.wav", folder / "video.mp4"
        write_wave(voice, other.wave)
        with VideoWriter(video, width, height, voice, quality=16, preset="veryfast") as writer:
            shown = [_framed(picture.pixels, width, height) for picture in pictures]
            for frame in islice(cycle(shown), frames):
                writer.write(frame)
        note = f"synthetic, {frames} frames of {width} x {height}"
        yield Dubbing(video, voice, str(folder / "landmarks.npy"), note)


def _framed(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    face = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC)
    return cv2.copyMakeBorder(face, y, height - side - y, x, width - side - x, cv2.BORDER_REPLICATE)


def random_model(folder: Path, size: Size, dtype: Dtype, student: int | None = None) -> Path:
    """Writes a model directory of a size, its weights random: what it dubs is noise, in a true model's time.

    Args:
      folder: a new one.
      dtype: of the matrices.
      student: steps of `schedule.STUDENTS` that it takes, unguided, with a small decoder beside the VAE's
        own; None: it is guided and takes the whole table.
    """
    between = size.stage
    unet = changed(between.unet, in_channels=between.unet.in_channels - 1)
    config = ModelConfig(
        keyframe=changed(between, kind="keyframe", unet=unet),
        interpolation=between,
        vae=size.vae,
        encoders={"hubert": size.speech},
        provenance=dict.fromkeys(("keyframe", "interpolation", "vae"), "random"),
    )
    if student is not None:
        half = tuple(width // 2 for width in size.vae.block_out_channels)
        small = DecoderConfig(half, norm_groups=size.vae.norm_groups // 2)
        unguided, grid = GuidanceConfig("none"), STUDENTS[student]
        config = changed(config, guidance=unguided, sigmas=grid, decoder_small=small)
    block = np.random.default_rng(0).standard_normal(2**22 + 1, np.float32)
    tensors = {
        component: {
            path: _drawn(block, path, leaf.shape, DTYPES[dtype])
            for path, leaf in shapes(maker(config, component))[1].items()
        }
        for component in components(config)
    }
    save_model(folder, config, tensors)
    return folder


def _drawn(block: np.ndarray, path: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Kernels of variance 1 / fan-in out of a block of numbers, which is taken again and again; scales 1."""
    if len(shape) > 1:
        scale = np.float32(np.prod(shape[:-1]) ** -0.5)
        return np.resize((scale * block[: np.prod(shape)]).astype(dtype), shape)
    return np.full(shape, path.endswith("scale"), np.float32)


def dub_table(rows: Sequence[Dubbed], before: dict[str, float] | None = None) -> str:
    """Lines of text: seconds, and of device, decoder and encoder busy / waiting seconds.

    Args:
      before: median seconds of an earlier report by the row's name.
    """
    lines = [
        f"{'':<20}{'compile s':>10}{'median s':>10}{'spread':>15}{'frames/s':>10}{'host GiB':>10}"
        + "".join(f"{part:>15}" for part in PARTS)
        + ("" if before is None else f"{'before s':>10}{'ratio':>7}")
    ]
    for row in rows:
        t = row.timing
        lines.append(
            f"{row.name:<20}{row.compile_seconds:>10.1f}{t.median:>10.2f}{f'{t.lowest:.2f}-{t.highest:.2f}':>15}"
            f"{row.frames_per_second:>10.1f}{row.host_bytes / 2**30:>10.2f}"
            + "".join(f"{busy_and_waiting(row, part):>15}" for part in PARTS)
            + ("" if before is None else against(before.get(row.name), t.median))
        )
    return "\n".join([*lines, f"dub: {rows[-1].note}"])


def busy_and_waiting(row: Dubbed, part: str) -> str:
    """Seconds; empty where the phase does without the part."""
    if part not in row.busy:
        return ""
    return f"{row.busy[part]:.2f} / {max(row.timing.median - row.busy[part], 0):.2f}"
