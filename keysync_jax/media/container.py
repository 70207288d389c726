"""Opening a media file so that FFmpeg reads this one file and nothing else.

FFmpeg also "opens" playlists, scripts and stream descriptions, whatever the file is called, and then reads
what they name. Here it is handed an open file, may use no protocol to open another, and only demuxers of
`FORMATS` are let near it. A fault of the disk reaches the caller as the OSError that it is; read by name, one
in the header of a file would look like damage of the file.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from io import SEEK_SET
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer

from keysync_jax.errors import UserError

_CONTAINERS = (
    "3g2 3gp asf asf_o avi caf cine dhav dv flv gxf ivf lmlm4 m4a matroska mj2 mov mp4 mpeg mpegts mxf nsv "
    "nut nuv ogg pva rm ty webm wtv yuv4mpegpipe"
)
_BARE_VIDEO = "av1 cavsvideo dirac dnxhd evc h261 h263 h264 hevc m4v mjpeg mpegvideo obu vc1 vc1test vvc"
_BARE_AUDIO = (
    "aac ac3 ac4 act adx aiff amr amrnb amrwb ape apc au avr codec2 dsf dss dts dtshd eac3 flac g722 g723_1 "
    "g729 gsm hcom iamf iff ilbc ircam lc3 loas mlp mmf mp3 mpc mpc8 nistsphere oma osq pvf qcp qoa rka rso "
    "sbc shn sln sox spdif tak truehd tta voc vqf w64 wav wsd wv wve xwma"
)
# These read the bytes that they are given, as does image2 of a file that was opened for it.
_PICTURES = (
    "apng bmp_pipe dpx_pipe exr_pipe gif image2 jpeg_pipe jpegxl_pipe pam_pipe pbm_pipe pgm_pipe png_pipe "
    "ppm_pipe qoi_pipe tiff_pipe webp_pipe"
)
FORMATS = frozenset(f"{_CONTAINERS} {_BARE_VIDEO} {_BARE_AUDIO} {_PICTURES}".split())
"""FFmpeg's demuxers that read one file: not concat, hls, dash, sdp, vobsub, lavfi and their like."""

_OPTIONS = {
    "format_whitelist": ",".join(sorted(FORMATS)),
    "protocol_whitelist": "none",
    "pattern_type": "none",  # image2 would take a name with % or * for many.
}


class _Source:
    """What FFmpeg reads from; the first fault is kept, and reading ends with it.

    FFmpeg reads on after a fault, and each further one would be printed as lost.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.name = file, str(file.name)
        self.seekable, self.tell = file.seekable, file.tell
        self.fault: OSError | None = None

    def read(self, size: int) -> bytes:
        if self.fault is not None:
            return b""
        try:
            return self._file.read(size)
        except OSError as error:
            raise self._kept(error) from None

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            if error.errno == errno.EINVAL:
                # No fault: FFmpeg looks before the start of a file, as for the size of an empty one.
                return -errno.EINVAL
            raise self._kept(error) from None

    def _kept(self, error: OSError) -> OSError:
        error.filename = error.filename or self.name
        self.fault = self.fault or error
        return error


@contextmanager
def open_container(path: Path, what: str) -> Iterator[InputContainer]:
    """Open a media file; `what` ("video", "audio") names it in messages.

    Raises UserError if it cannot be read or is of no format in `FORMATS`, and, with the OSError as its cause,
    where reading it fails later.
    """
    source: _Source | None = None
    try:
        with Path(path).open("rb") as file:
            source = _Source(file)
            with _opened(source, path, what) as container:
                yield container
    except OSError as error:
        if source is not None and error is not source.fault:
            raise
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from error


def _opened(source: _Source, path: Path, what: str) -> InputContainer:
    try:
        return av.open(source, "r", options=_OPTIONS)
    except av.error.ArgumentError as error:
        raise UserError(
            f"cannot read the {what} {path}: it is damaged or no media file "
            "(playlists, scripts and descriptions that lead to other files are not followed)"
        ) from error
    except av.error.FFmpegError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
