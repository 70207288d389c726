"""Which files are opened at all, and what a fault of the machine looks like."""

import errno
import fcntl
import io
import os
import struct
import termios
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer

from keysync_jax.errors import UserError
from keysync_jax.media.audio import probe_audio, read_audio
from keysync_jax.media.container import FORMATS, open_container
from keysync_jax.media.video import count_frames, probe_video, read_frames
from keysync_jax.media.writer import VideoWriter
from tests.media.test_video import steady, write_clip, write_sound

CONCAT = "ffconcat version 1.0\nfile '{0}'\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{0}\n#EXT-X-ENDLIST\n"
MANIFEST = (
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="0" '
    'bandwidth="9"><BaseURL>{0}</BaseURL></Representation></AdaptationSet></Period></MPD>\n'
)
SESSION = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns={0}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n"
)
LEADING = {"concat": CONCAT, "m3u8": PLAYLIST, "mpd": MANIFEST, "sdp": SESSION}
READERS: dict[str, Callable[[Path], object]] = {
    "probe": probe_video,
    "count": count_frames,
    "frames": lambda path: next(read_frames(path)),
    "probe sound": probe_audio,
    "sound": read_audio,
    "mux": lambda path: VideoWriter(path.with_suffix(".out.mp4"), 64, 48, path),
}


@pytest.mark.parametrize("suffix", [".mp4", ".wav", ""])
@pytest.mark.parametrize("kind", LEADING)
def test_a_file_that_leads_to_others_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    """The other one is a pipe full of video: whoever opened it would have taken from it."""
    video = write_clip(tmp_path / "video.ts", steady(5, 25)).read_bytes()
    pipe = tmp_path / "secret.ts"
    os.mkfifo(pipe)
    script = tmp_path / f"script{suffix or '.' + kind}"
    script.write_text(LEADING[kind].format(pipe.name))
    filled = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        size = os.write(filled, video)
        for name, read in READERS.items():
            with pytest.raises(UserError) as raised:
                read(script)
            sentence = str(raised.value)
            assert sentence.startswith(("cannot read the video", "cannot read the audio")), name
            assert str(script) in sentence
            assert struct.unpack("i", fcntl.ioctl(filled, termios.FIONREAD, bytes(4)))[0] == size, name
    finally:
        os.close(filled)


@pytest.mark.parametrize("name", ["concat:{}", "subfile,,start,0,end,0,,:{}", "file:{}", "crypto:{}"])
def test_a_name_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", steady(5, 25))
    with pytest.raises(UserError, match="No such file"):
        count_frames(Path(name.format("clip.mp4")))


def test_a_picture_named_as_a_pattern_is_itself(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", steady(3, 25))
    pictures = list(read_frames(clip))
    for name, picture in zip(["frame1.jpg", "frame2.jpg", "frame%d.jpg"], pictures, strict=True):
        made = write_clip(
            tmp_path / "made.mkv", steady(1, 25), frames=[picture], codec="mjpeg", pix_fmt="yuvj420p"
        )
        with av.open(str(made)) as container:
            (tmp_path / name).write_bytes(bytes(next(container.demux(video=0))))
    (found,) = list(read_frames(tmp_path / "frame%d.jpg"))
    others = [np.abs(found.astype(int) - picture).mean() for picture in pictures]
    assert np.argmin(others) == 2


def test_only_demuxers_that_read_one_file() -> None:
    for name in FORMATS:
        assert av.ContainerFormat(name, "r").is_input, name
    leading = {
        "concat",
        "hls",
        "dash",
        "sdp",
        "rtsp",
        "rtp",
        "sap",
        "lavfi",
        "vobsub",
        "imf",
        "webm_dash_manifest",
    }
    assert not FORMATS & (leading | {"tty", "mlv", "image2pipe", "ffmetadata"})


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("clip.mov", "libx264", "yuv420p"),
        ("clip.avi", "mpeg4", "yuv420p"),
        ("clip.mpg", "mpeg2video", "yuv420p"),
        ("clip.flv", "flv1", "yuv420p"),
        ("clip.wmv", "wmv2", "yuv420p"),
        ("clip.mxf", "mpeg2video", "yuv420p"),
        ("clip.webm", "libvpx-vp9", "yuv420p"),
        ("clip.y4m", "wrapped_avframe", "yuv420p"),
        ("clip.gif", "gif", "rgb8"),
        ("clip.png", "apng", "rgb24"),
    ],
)
def test_containers_of_media_are_read(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    how: dict[str, Any] = {"container_format": "apng"} if name.endswith("png") else {}
    clip = write_clip(
        tmp_path / name, steady(6, 25), codec=codec, pix_fmt=pix_fmt, base=Fraction(1, 25), **how
    )
    assert count_frames(clip) == 6


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.w64", "pcm_s16le"),
        ("v.aiff", "pcm_s16be"),
        ("v.au", "pcm_s16be"),
        ("v.caf", "pcm_s16le"),
        ("v.flac", "flac"),
        ("v.mp3", "libmp3lame"),
        ("v.aac", "aac"),
        ("v.ogg", "libopus"),
        ("v.m4a", "aac"),
        ("v.mka", "pcm_s16le"),
        ("v.ac3", "ac3"),
    ],
)
def test_containers_of_sound_are_read(tmp_path: Path, name: str, codec: str) -> None:
    wav, path = tmp_path / "v.wav", tmp_path / name
    write_sound(wav, 0.5, 48_000)
    with av.open(str(wav)) as read, av.open(str(path), "w") as write:
        stream = write.add_stream(codec, rate=48_000, layout="mono")
        for frame in read.decode(audio=0):
            frame.pts = None
            write.mux(stream.encode(frame))
        write.mux(stream.encode(None))
    assert len(read_audio(path)) == pytest.approx(8000, abs=1600)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mpg", ".wav", ".mp3", ".flac", ".ogg"])
@pytest.mark.parametrize("content", [b"", b"x", b"RIFF", b"not a video" * 100])
def test_empty_and_foreign_files_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, content: bytes
) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    for name, read in READERS.items():
        # FFmpeg takes whatever is named .flac for sound.
        in_flac = "file.flac has (no video stream|an audio stream, but not one sample)"
        refused = f"cannot read the (video|audio) .*file{suffix}: |{in_flac}"
        with pytest.raises(UserError, match=refused):
            read(path)
        assert capfd.readouterr().err == "", name


class Failing(io.FileIO):
    """A file whose disk fails after some reads."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("reads", [0, 1, 2, 6])
def test_a_disk_that_fails_is_not_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], reads: int
) -> None:
    noise = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8) for i in range(60)]
    clip = write_clip(tmp_path / "clip.mkv", steady(60, 25), frames=noise, options={"crf": "1"})
    assert clip.stat().st_size > 7 * 32_768

    def opened(path: Path, mode: str) -> Failing:
        file = Failing(path)
        file.reads = reads
        return file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UserError, match=r"cannot read the video .*clip\.mkv: Input/output error") as raised:
        count_frames(clip)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.EIO
    assert raised.value.__cause__.filename == str(clip)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_file_that_the_machine_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", steady(5, 25))

    def refuse(path: Path, mode: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=os.strerror(code)) as raised:
        probe_video(clip)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == code


def test_an_error_of_others_passes_as_it_is(tmp_path: Path) -> None:
    """A full disk while something is made of the video is not a fault of the video."""
    clip = write_clip(tmp_path / "clip.mp4", steady(5, 25))

    def use(container: InputContainer) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"), open_container(clip, "video") as container:
        use(container)
