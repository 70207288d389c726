"""Reading a voice: as the networks hear it (16 kHz mono), and as blocks at its own rate for the output file.

Time zero is the start of the file, so a track that starts late is led in by silence, and gaps in the
timestamps (browser recordings leave pauses out) are silence too, up to ten minutes. Both readers share one
decoding path, so the lips follow the very samples that are written to the output.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer

from keysync_jax.errors import UserError
from keysync_jax.media.container import open_container
from keysync_jax.media.timeline import FPS, LONGEST_GAP, LONGEST_STEP_BACK, Jump, report_jumps

RATE = 16_000
"""Samples a second that the speech encoders expect."""

PAUSE_SECONDS = (Fraction(1, 200), Fraction(600))
"""A smaller jump of the timestamps is their rounding, a larger one a broken clock; one between is a pause."""


@dataclass(frozen=True)
class AudioInfo:
    """`rate` in Hz; `channels` as stored; `duration` in seconds by the header, None where unknown."""

    rate: int
    channels: int
    duration: float | None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, AudioStream]]:
    with open_container(path, "audio") as container:
        streams = [s for s in container.streams.audio if s.codec_context]
        if not streams:
            raise UserError(f"{path} has no audio stream; give a file with sound")
        yield container, streams[0]


def probe_audio(path: Path) -> AudioInfo:
    """Describe an audio file by its header. Raises UserError if it cannot be read or has no sound."""
    with _opened(path) as (container, stream):
        if not stream.rate:
            raise _without_a_sample(path)
        duration = container.duration / av.time_base if container.duration else None
        return AudioInfo(stream.rate, stream.channels, duration)


def _without_a_sample(path: Path) -> UserError:
    return UserError(f"{path} has an audio stream, but not one sample of it can be decoded")


def frames_of(samples: int, rate: int = RATE, fps: int = FPS) -> int:
    """Number of video frames that cover `samples` samples; a started frame counts, so no speech is cut."""
    return -(-samples * fps // rate)


def read_audio(path: Path, rate: int = RATE, picture: Sequence[Jump] = ()) -> np.ndarray:
    """Decode a whole voice as float32 mono `[samples]` in [-1, 1] at `rate` Hz.

    Stereo is averaged. Resampling keeps time zero and turns n samples into round(n * rate / source rate).
    `picture` is as in `open_voice`. Where the timestamps jump otherwise a warning names the place.
    Raises UserError if the file cannot be read, has no audio stream or not one sample.
    """
    with open_voice(path, picture) as voice:
        mono = [block.mean(axis=0, keepdims=True) for block in voice.blocks]
    report_jumps(path, "sound", voice.jumps, voice.start or Fraction(0))
    samples = sum(block.shape[1] for block in mono)
    wave = np.concatenate(list(resample(mono, "mono", voice.rate, rate)), axis=1)[0]
    return np.clip(wave[: round(Fraction(samples * rate, voice.rate))], -1.0, 1.0)


@dataclass(frozen=True)
class Voice:
    """An open voice: `rate` in Hz, `layout` "mono" or "stereo", `blocks` of float32 `[channels, n]`.

    `start` is the file's first timestamp in seconds, None where unknown; to `jumps` the places are added, as
    blocks are read, where the timestamps step back or by more than `PAUSE_SECONDS`.
    """

    rate: int
    layout: str
    blocks: Iterator[np.ndarray]
    start: Fraction | None
    jumps: list[Jump]


@contextmanager
def open_voice(path: Path, picture: Sequence[Jump] = ()) -> Iterator[Voice]:
    """Open a voice at its own rate; more than two channels are mixed down to stereo.

    Given the jumps of the `picture` in the same file, the sound stays in step with its frames: what it has
    between the two times of a jump is left out. Raises UserError as `read_audio` does.
    """
    with _opened(path) as (container, stream):
        frames = _decoded(container, stream)
        first = next((frame for frame in frames if frame.samples), None)
        if first is None:
            raise _without_a_sample(path)
        layout = "mono" if len(first.layout.channels) == 1 else "stereo"
        start = None if container.start_time is None else Fraction(container.start_time, av.time_base)
        clock = _SoundClock(start, first.sample_rate, picture)
        blocks = _with_pauses(chain([first], frames), first.sample_rate, layout, clock)
        yield Voice(first.sample_rate, layout, blocks, start, clock.jumps)


def _decoded(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            return
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):
            continue  # The jump this leaves in the timestamps becomes silence.
        yield from frames


class _SoundClock:
    """Where each frame of a track belongs behind the ones before it.

    Args:
      start: when the sound begins, None for its first frame's time.
      picture: jumps of the frames that it goes with.
    """

    def __init__(self, start: Fraction | None, rate: int, picture: Sequence[Jump]) -> None:
        self.jumps: list[Jump] = []
        self._expected, self._ahead, self._shortest = start, deque(picture), Fraction(1, rate)

    def pause(self, frame: AudioFrame) -> Fraction | None:
        """Seconds of silence before a frame, negative for sound that is too much; None to leave it out."""
        expected, lasts = self._expected, Fraction(frame.samples, frame.sample_rate)
        time = expected if frame.pts is None else frame.pts * Fraction(frame.time_base or 1)
        if time is None:
            return Fraction(0)
        expected = time if expected is None else expected
        crossed = False
        while self._ahead and self._crosses(self._ahead[0], expected, time):
            jump = self._ahead.popleft()
            expected, crossed = expected + jump.after - jump.before, True
        if self._ahead and self._ahead[0].is_forward and self._ahead[0].before <= time < self._ahead[0].after:
            return None
        shortest, self._shortest = self._shortest, PAUSE_SECONDS[0]
        self._expected, pause = time + lasts, time - expected
        if crossed:
            return pause if pause <= PAUSE_SECONDS[1] else Fraction(0)
        if pause > PAUSE_SECONDS[1] or pause < -LONGEST_STEP_BACK:
            self.jumps.append(Jump(expected, time))
        return pause if shortest <= pause <= PAUSE_SECONDS[1] else Fraction(0)

    @staticmethod
    def _crosses(jump: Jump, expected: Fraction, time: Fraction) -> bool:
        """Whether a frame at `time`, where one at `expected` would follow, is the first behind a jump."""
        if jump.is_forward:
            return time >= jump.after
        step = time - expected
        return step < -LONGEST_STEP_BACK and abs(step - (jump.after - jump.before)) <= LONGEST_GAP


def _with_pauses(
    frames: Iterable[AudioFrame], rate: int, layout: str, clock: _SoundClock
) -> Iterator[np.ndarray]:
    """Blocks in one rate and layout, silence where the timestamps jump (before the first: by one sample)."""
    resampler, setup = AudioResampler("fltp", layout, rate), None
    channels = len(resampler.layout.channels)
    surplus = 0
    for frame, is_last in _marking_last(frames):
        pause = clock.pause(frame)
        if pause is None:
            continue
        if pause > 0:
            yield np.zeros((channels, round(pause * rate)), np.float32)
        surplus += max(0, -round(pause * rate))
        if setup not in (None, (frame.format.name, frame.layout.name, frame.sample_rate)):
            yield from _arrays(resampler, None)
            resampler = AudioResampler("fltp", layout, rate)
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        # AAC pads its last frame; MP4 tells how much of it counts.
        cut = is_last and frame.time_base == Fraction(1, rate) and 0 < frame.duration < frame.samples
        for block in _arrays(resampler, frame):
            whole = block[:, : frame.duration if cut else None]
            if whole.shape[1] > surplus:
                yield whole[:, surplus:]
            surplus = max(0, surplus - whole.shape[1])
    yield from _arrays(resampler, None)


def _marking_last(frames: Iterable[AudioFrame]) -> Iterator[tuple[AudioFrame, bool]]:
    held: AudioFrame | None = None
    for frame in frames:
        if held is not None:
            yield held, False
        held = frame
    if held is not None:
        yield held, True


def _arrays(resampler: AudioResampler, frame: AudioFrame | None) -> Iterator[np.ndarray]:
    """What the resampler gives for a frame, or, for None, what it still holds."""
    for out in resampler.resample(frame):
        if out is not None and out.samples:
            yield out.to_ndarray()


def resample(blocks: Iterable[np.ndarray], layout: str, source: int, rate: int) -> Iterator[np.ndarray]:
    """Resample float32 `[channels, n]` blocks from `source` to `rate` Hz, aligned at the first sample.

    n samples become n * rate / source, rounded up or to nearest; at equal rates the blocks pass unchanged.
    """
    if source == rate:
        yield from blocks
        return
    resampler = AudioResampler("fltp", layout, rate)
    for block in blocks:
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(block, np.float32), "fltp", layout)
        frame.sample_rate = source
        yield from _arrays(resampler, frame)
    yield from _arrays(resampler, None)
