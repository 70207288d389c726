"""What is installed on this machine, and what is not."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import av
import jax

from keysync_jax import __version__
from keysync_jax.doctor.finding import Finding
from keysync_jax.errors import UserError
from keysync_jax.extras import EXTRAS
from keysync_jax.media.assets import cache_folder, resolve_asset
from keysync_jax.media.writer import AUDIO_CODEC, VIDEO_CODEC

GIB = 2**30

TASKS = {
    "to train": ("optax", "orbax", "grain", "ml_collections"),
    "to convert checkpoints": ("torch",),
    "to fetch models of the hub": ("huggingface_hub",),
    "to write datasets": ("array_record",),
}
"""What takes more than a dub does, and the modules that it takes."""


def installation() -> list[Finding]:
    """The machine and the installation, from what every command needs to what some do."""
    return [*_versions(), *_devices(), *_memory(), _codecs(), *_detectors(), *_tasks(), *_cache()]


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "keysync_jax", __version__)
    yield Finding("ok", "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("ok", "jax", f"{version('jax')}, flax {version('flax')}, PyAV {version('av')}")


def _devices() -> Iterator[Finding]:
    """What JAX computes on."""
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield Finding("missing", "devices", f"JAX finds none ({str(error).splitlines()[0]})")
        return
    stats = devices[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / GIB:.0f} GiB each" if "bytes_limit" in stats else ""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        yield Finding("note", "devices", f"the CPU alone, {cores} cores; an accelerator's JAX is an extra: "
                      "pip install 'keysync_jax[cuda]' or 'keysync_jax[tpu]'")  # fmt: skip
    else:
        yield Finding("ok", "devices", f"{len(devices)} x {kind}{memory}")


def _memory() -> Iterator[Finding]:
    """Of the host."""
    file = Path("/proc/meminfo")
    if file.is_file():
        sizes = dict(line.split(":") for line in file.read_text().splitlines() if ":" in line)
        total, free = (int(sizes[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
        yield Finding("ok", "memory", f"{total:.1f} GiB, {free:.1f} GiB free")


def _codecs() -> Finding:
    absent = []
    for codec in (VIDEO_CODEC, AUDIO_CODEC):
        try:
            av.Codec(codec, "w")
        except av.codec.codec.UnknownCodecError:
            absent.append(codec)
    if absent:
        return Finding("missing", "codecs", f"this PyAV has no {', '.join(absent)}: pip install --force "
                       "--only-binary av av")  # fmt: skip
    return Finding("ok", "codecs", f"{VIDEO_CODEC} and {AUDIO_CODEC}")


def _detectors() -> Iterator[Finding]:
    """One of them is enough; with landmarks from a file, none is needed."""
    found = [_mediapipe(), _face_alignment()]
    usable = any(finding.state == "ok" for finding in found)
    for finding in found:
        yield Finding("note", finding.about, finding.said) if usable and finding.state != "ok" else finding


def _mediapipe() -> Finding:
    about = "mediapipe"
    if find_spec("mediapipe") is None:
        return Finding("missing", about, "not installed: pip install 'keysync_jax[landmarks]'")
    try:
        path = resolve_asset("face_landmarker")
    except UserError as error:
        return Finding("missing", about, str(error))
    return Finding("ok", about, f"{_version('mediapipe')}, its model file is {path}")


def _face_alignment() -> Finding:
    about = "face_alignment"
    if find_spec("face_alignment") is None:
        return Finding("missing", about, "not installed: pip install 'keysync_jax[face-alignment]'")
    try:
        for asset in ("s3fd", "2dfan4"):
            resolve_asset(asset)
    except UserError as error:
        return Finding("missing", about, str(error))
    return Finding("ok", about, f"{_version('face-alignment')}, its model files are in the cache")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"


def _tasks() -> Iterator[Finding]:
    for task, modules in TASKS.items():
        absent = [module for module in modules if find_spec(module) is None]
        if absent:
            extras = ",".join(dict.fromkeys(EXTRAS[module] for module in absent))
            said = f"needs {', '.join(absent)}: pip install 'keysync_jax[{extras}]'"
            yield Finding("note", task, said)
        else:
            yield Finding("ok", task, "everything is installed")


def _cache() -> Iterator[Finding]:
    """The folder of fetched files and compiled programs, and the room beside it."""
    folder = cache_folder()
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = f"{shutil.disk_usage(there).free / GIB:.1f} GiB free"
    if not os.access(there, os.W_OK):
        yield Finding("note", "cache", f"{folder} cannot be written; set KEYSYNC_CACHE to a folder that can")
    elif not folder.exists():
        yield Finding("ok", "cache", f"{folder} is not there yet; {free}")
    else:
        parts = ", ".join(f"{child.name} {_bytes(child) / GIB:.2f}" for child in sorted(folder.iterdir()))
        yield Finding("ok", "cache", f"{folder}: {parts or 'nothing'} (GiB); {free}")


def _bytes(path: Path) -> int:
    """Of a file, or of all files in a folder; those that go meanwhile do not count."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
