"""Dubbing a clip with a system: once, checked, kept under a name that says what it was made from.

A run is a folder with the dub, what the command printed, and whether it is one. It appears whole; a run that
failed is kept too, with the command's last words.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from keysync_jax.errors import UserError, machine_fault
from keysync_jax.evaluation.inputs import Inputs, Voiced
from keysync_jax.evaluation.protocol import Cell
from keysync_jax.evaluation.systems import CURRENT, System
from keysync_jax.files import fingerprint, new_folder, sha256_once, write_json
from keysync_jax.media.timeline import FPS
from keysync_jax.media.video import probe_video, scan_timeline

FORMAT = "keysync-run-1"
DUB, LOG, RUN = "dub.mp4", "log.txt", "run.json"

GRACE_SECONDS = 5.0

WORDS = 300
"""Characters of a failed command's last words."""

# The command becomes this process, after the kernel was asked to end it with the one that started it.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        pass
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


@dataclass(frozen=True)
class Run:
    """What became of a clip in a cell.

    Attributes:
      video: the dub; None where there is none.
      failure: why, in a sentence.
      frames: of the dub at 25 fps.
      seconds: that the command took; None for a ready-made video.
    """

    video: Path | None
    failure: str | None = None
    frames: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class RunSettings:
    """How commands are run.

    Attributes:
      slack: frames by which a dub may be shorter or longer than its voice.
      timeout: seconds after which a command is ended; None: never.
      retry: run what failed again.
    """

    slack: int = 5
    timeout: float | None = None
    retry: bool = False


def run(system: System, cell: Cell, name: str, inputs: Inputs, folder: Path, settings: RunSettings) -> Run:
    """The dub of a clip: taken where it is there, else made.

    Args:
      folder: of runs.

    Raises:
      OSError: the machine failed; nothing is kept of it.
    """
    voiced = inputs.voiced(name, cell.setup)
    values, made_from = _values(system, cell, name, inputs, voiced)
    place = folder / fingerprint(made_from)[:16]
    size = inputs[name].size
    kept = _kept(place, size, voiced.frames, settings.slack)
    if kept is not None and kept.failure is not None and settings.retry:
        shutil.rmtree(place)
        kept = None
    if kept is None:
        with new_folder(place) as partial:
            seconds, why = _call(system.words({**values, "out": str(partial / DUB)}), partial, settings)
            made = {"format": FORMAT, "from": made_from, "failure": why, "seconds": round(seconds, 2)}
            write_json(partial / RUN, made)
        kept = _kept(place, size, voiced.frames, settings.slack)
    assert kept is not None
    return kept


def ready_made(system: System, cell: Cell, name: str, inputs: Inputs, cells: int, slack: int) -> Run:
    """The dub of a clip out of a system's folder."""
    path = system.file(cell, name, cells)
    if path is None:
        return Run(None, f"{system.folder} has no video of it in {cell.name}")
    failure = check(path, inputs[name].size, inputs.voiced(name, cell.setup).frames, slack)
    return Run(None, failure) if failure else Run(path, frames=len(scan_timeline(path)))


def check(path: Path, size: tuple[int, int], frames: int, slack: int) -> str | None:
    """Why a video is no dub: it must be as large as the source, at 25 fps, and as long as the voice."""
    if not path.is_file():
        return "the command wrote no video"
    try:
        info, found = probe_video(path), len(scan_timeline(path))
    except UserError as error:
        if machine_fault(error) is not None:
            raise
        return str(error).replace(str(path), "the video that it wrote")
    if (info.width, info.height) != size:
        return f"the dub is {info.width} x {info.height}, the source {size[0]} x {size[1]}"
    if abs(info.fps - FPS) > 0.05:
        return f"the dub has {float(info.fps):g} frames a second; {FPS} are scored"
    if abs(found - frames) > slack:
        return f"the dub has {found} frames, its voice {frames}"
    return None


def _values(
    system: System, cell: Cell, name: str, inputs: Inputs, voiced: Voiced
) -> tuple[dict[str, str], dict[str, object]]:
    """What the template is filled in with, and what of it the dub depends on."""
    clip = inputs[name]
    values = {"video": str(clip.video.resolve()), "audio": str(voiced.audio.resolve())}
    made_from: dict[str, object] = {
        "format": FORMAT,
        "command": list(system.command),
        "video": sha256_once(clip.video),
        "audio": sha256_once(voiced.audio),
    }
    # A script that was changed is another command. Only the first file: others may be logs, which grow.
    script = next((word for word in (*system.command[1:], *system.command) if Path(word).is_file()), None)
    made_from |= {} if script is None else {"script": sha256_once(script)}
    if system.wants("reference") or system.wants("reference_index"):
        current = cell.reference == "CR"
        picture = clip.picture() if not current and system.wants("reference") else None
        values["reference"] = CURRENT if picture is None else str(picture.resolve())
        values["reference_index"] = CURRENT if current else str(clip.clip.alternative)
        made_from["reference"] = CURRENT if current else clip.clip.alternative
    if system.wants("landmarks"):
        if clip.clip.landmarks is None:
            raise UserError(f"--system {system.name} takes {{landmarks}}, and the list has none of {name}")
        values["landmarks"] = str(clip.clip.landmarks.resolve())
        made_from["landmarks"] = sha256_once(clip.clip.landmarks)
    return values, made_from


def _kept(place: Path, size: tuple[int, int], frames: int, slack: int) -> Run | None:
    """A run that is there, checked."""
    try:
        made = json.loads((place / RUN).read_bytes())
    except FileNotFoundError:
        return None
    video = place / DUB
    failure = made["failure"] or check(video, size, frames, slack)
    if failure:
        return Run(None, str(failure), seconds=made["seconds"])
    return Run(video, frames=len(scan_timeline(video)), seconds=made["seconds"])


def _call(words: Sequence[str], place: Path, settings: RunSettings) -> tuple[float, str | None]:
    """Runs a command; the seconds it took and, where it failed, why.

    An exception, a signal's too, ends the command and what it started before it passes.
    """
    start = time.monotonic()
    with (place / LOG).open("wb") as log:
        process = _started(words, log)
        try:
            code: int | None = process.wait(settings.timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    took = time.monotonic() - start
    if code == 0:
        return took, None
    how = f"took more than {settings.timeout:g} s" if code is None else _ended(code)
    return took, f"{how}: {_last_words(place / LOG)}"


def _started(words: Sequence[str], log: BinaryIO) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command and everything in its session, if it has not ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def _last_words(log: Path) -> str:
    """The end of what a command printed, as one line."""
    text = log.read_bytes()[-4 * WORDS :].decode(errors="replace")
    lines = [" ".join(line.split()) for line in text.replace("\r", "\n").splitlines()]
    words = " / ".join([line for line in lines if line][-3:])
    return words[-WORDS:] or "it printed nothing"
