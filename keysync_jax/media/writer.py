"""Writing the result: 25 fps H.264 with the new voice at its own rate, complete or not at all."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Final

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from keysync_jax.errors import UserError
from keysync_jax.files import put, temporary
from keysync_jax.media.audio import Voice, open_voice, resample
from keysync_jax.media.timeline import FPS
from keysync_jax.media.video import MATRICES, ROUNDING, Colour

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
VIDEO_CODEC: Final = "libx264"
AUDIO_CODEC: Final = "aac"
AUDIO_BITS_PER_SAMPLE = Fraction(11, 2)
"""Just under the 6 bits a sample that AAC allows, so that a 16 kHz voice keeps all the format can hold."""
AUDIO_BITS_PER_SECOND = 192_000
"""Upper limit for one channel; more is not heard."""


def check_writable(path: Path) -> None:
    """Raise UserError now if a video could not be written to `path` later; call it before long work.

    Checks the suffix, the folder (a file is created in it and removed) and that PyAV has the encoders.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path}: its name must end in one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file name")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    try:
        with temporary(path):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    for codec in (VIDEO_CODEC, AUDIO_CODEC):
        try:
            av.Codec(codec, "w")
        except av.codec.codec.UnknownCodecError as error:
            raise UserError(f"this PyAV has no {codec} encoder; install its binary wheel") from error


class VideoWriter(AbstractContextManager["VideoWriter"]):
    """Write uint8 RGB frames and a voice to a video file; a context manager.

    The file appears under its name only when the block ends without an error; before, it is a temporary file
    in the same folder, which an error or an interrupt removes. Video is H.264 yuv420p at `quality` (CRF, 0 to
    51, lower is better), converted with the matrix that `colour` says and tagged so. Where the width or
    height is odd, which yuv420p cannot hold, the last column or row is repeated once: nothing is cut off.

    `voice` is re-encoded as AAC at its own sample rate and in full, whatever the number of frames (a rate
    that AAC lacks becomes the nearest one it has); with `until`, as much of it as comes before that second.
    `metadata` are tags of the container, as far as it knows them (title, comment ...). `aspect` is the
    pixel's width over its height. `threads` encode; 0: one a core. The number changes the bits that come out.
    Raises UserError as `check_writable` and `audio.read_audio` do.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        voice: Path | None = None,
        *,
        fps: int = FPS,
        quality: int = 16,
        preset: str = "medium",
        colour: Colour | None = None,
        aspect: Fraction = Fraction(1),
        threads: int = 0,
        until: Fraction | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        check_writable(path)
        self.path, self.frames = Path(path), 0
        self._shape, self._fps, self._colour = (height, width, 3), fps, colour or Colour()
        flags = {} if self.path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
        with ExitStack() as stack, self._naming_the_file():
            self._partial = stack.enter_context(temporary(self.path))
            self._container = stack.enter_context(av.open(str(self._partial), "w", options=flags))
            self._container.metadata.update(metadata or {})
            self._video = self._add_video(aspect, threads, {"crf": str(quality), "preset": preset})
            self._sound: Iterator[Packet] = iter(())
            if voice is not None:
                self._sound = self._encoded(stack.enter_context(open_voice(voice)), until)
            self._sound_packet: Packet | None = None
            self._stack = stack.pop_all()

    def _add_video(self, aspect: Fraction, threads: int, options: dict[str, str]) -> VideoStream:
        stream = self._container.add_stream(VIDEO_CODEC, rate=self._fps, options=options)
        height, width, _ = self._shape
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.sample_aspect_ratio = aspect
        context.thread_count = threads
        # PyAV's default lets threads share each frame, and waits for all of them at its end.
        context.thread_type = "FRAME"
        context.color_range = ColorRange.MPEG
        context.colorspace = self._colour.matrix
        context.color_primaries = self._colour.primaries
        context.color_trc = self._colour.transfer
        return stream

    def _encoded(self, voice: Voice, until: Fraction | None) -> Iterator[Packet]:
        """Add the sound stream now; return its packets, encoded as they are asked for."""
        rates = av.Codec(AUDIO_CODEC, "w").audio_rates or [voice.rate]
        rate = min(rates, key=lambda candidate: abs(candidate - voice.rate))
        stream = self._container.add_stream(AUDIO_CODEC, rate=rate, layout=voice.layout)
        channel_bits = min(int(rate * AUDIO_BITS_PER_SAMPLE), AUDIO_BITS_PER_SECOND)
        stream.bit_rate = channel_bits * (1 if voice.layout == "mono" else 2)

        def packets() -> Iterator[Packet]:
            samples = 0
            heard = voice.blocks if until is None else _first(voice.blocks, round(until * voice.rate))
            for block in resample(heard, voice.layout, voice.rate, rate):
                frame = AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", voice.layout)
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), samples
                samples += block.shape[1]
                yield from stream.encode(frame)
            yield from stream.encode(None)

        return packets()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, frame: np.ndarray) -> None:
        """Append one uint8 RGB frame `[height, width, 3]`, and the voice up to its time."""
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"expected a uint8 frame {self._shape}, got {frame.dtype} {frame.shape}")
        height, width, _ = self._shape
        padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(padded), "rgb24").reformat(
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_colorspace=MATRICES[self._colour.matrix],
            dst_color_range=ColorRange.MPEG,
            interpolation=ROUNDING,
        )
        picture.pts, picture.time_base = self.frames, Fraction(1, self._fps)
        with self._naming_the_file():
            self._container.mux(self._video.encode(picture))
            self._mux_sound(Fraction(self.frames, self._fps))
        self.frames += 1

    def _mux_sound(self, until: Fraction | None) -> None:
        """Write the sound packets that begin no later than `until` seconds; all that are left for None."""
        while True:
            packet = self._sound_packet or next(self._sound, None)
            self._sound_packet = packet
            if packet is None:
                return
            if until is not None and packet.pts is not None and packet.pts * packet.time_base > until:
                return
            self._container.mux(packet)
            self._sound_packet = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, self._naming_the_file():
            if kind is not None:
                return
            if self.frames == 0:
                raise ValueError(f"no frame was written to {self.path}")
            self._container.mux(self._video.encode(None))
            self._mux_sound(None)
            self._container.close()
            put(self._partial, self.path)


def _first(blocks: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` samples of blocks `[channels, samples]`."""
    for block in blocks:
        if count <= 0:
            return
        yield block[:, :count]
        count -= block.shape[1]
