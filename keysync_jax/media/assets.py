"""Model files of others: where they are kept, and fetching them when the user allows it."""

import os
import shutil
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from keysync_jax.errors import UserError
from keysync_jax.files import replacing, sha256_of

CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Asset:
    """One file at its official address; `what` names it in messages."""

    what: str
    url: str
    sha256: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


PYTHON_FAN = "https://www.adrianbulat.com/downloads/python-fan/"
ASSETS = {
    "face_landmarker": Asset(
        "MediaPipe's Face Landmarker",
        "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/"
        "face_landmarker.task",
        "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    ),
    "s3fd": Asset(
        "the S3FD face detector",
        PYTHON_FAN + "s3fd-619a316812.pth",
        "619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
    ),
    "2dfan4": Asset(
        "the 2DFAN-4 landmark network",
        PYTHON_FAN + "2DFAN4-11f355bf06.pth.tar",
        "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
    ),
    "2dfan4_torchscript": Asset(
        "the 2DFAN-4 landmark network (TorchScript)",
        PYTHON_FAN + "2DFAN4-cd938726ad.zip",
        "cd938726adb1f15f361263cce2db9cb820c42585fa8796ec72ce19107f369a46",
    ),
}


def cache_folder() -> Path:
    """Folder of fetched files: $KEYSYNC_CACHE, else `keysync_jax` in the platform's cache folder."""
    if override := os.environ.get("KEYSYNC_CACHE"):
        return Path(override)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "keysync_jax"


def resolve_asset(
    name: str, path: Path | None = None, allow_download: bool = False, folder: Path | None = None
) -> Path:
    """Find the file of `ASSETS[name]`: the given path, else the cache, else its official address.

    A given path may be another version and only has to exist. A file in `folder` (`cache_folder()` if None)
    must have the known SHA-256; a damaged one is fetched again where fetching is allowed.
    Raises UserError if there is no sound file and none may or can be fetched.
    """
    asset = ASSETS[name]
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"{asset.what} is not at {path}")
        return Path(path)
    cached = (cache_folder() if folder is None else folder) / asset.file_name
    sound = cached.is_file() and sha256_of(cached) == asset.sha256
    if not sound and not allow_download:
        state = "is damaged" if cached.is_file() else "is missing"
        raise UserError(
            f"{asset.what} {state} ({cached}): allow fetching it with --allow-download, "
            f"or put the file from {asset.url} there"
        )
    if not sound:
        _download(asset, cached)
    return cached


def _download(asset: Asset, target: Path) -> None:
    """Fetch to a temporary name beside `target`, check, rename."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            with urllib.request.urlopen(asset.url, timeout=60) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            if sha256_of(partial) != asset.sha256:
                raise UserError(f"{asset.what} from {asset.url} is not the known file (its SHA-256 differs)")
    except OSError as error:
        raise UserError(f"cannot fetch {asset.what} from {asset.url}: {error}") from error
