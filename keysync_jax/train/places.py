"""A run's folder: local or mounted, or a URL of an object store (`gs://bucket/run`), where checkpoints and
config are.

Logs are appended to, which objects are not: behind a URL they are kept in a local folder, and process 0
copies them up with every checkpoint.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for
from keysync_jax.files import fingerprint, is_remote, write_bytes
from keysync_jax.media.assets import cache_folder

log = logging.getLogger(__name__)


def run_folder(workdir: str | Path) -> Path:
    """The path of a run's folder; behind a URL one of `etils.epath`, which has the methods of `Path`.

    Raises:
      UserError: nothing here can read such a URL.
    """
    if not is_remote(str(workdir)):
        return Path(workdir)
    with needed_for(f"--workdir {workdir}"):
        from etils import epath
    if not str(workdir).startswith(("gs://", "s3://")):
        raise UserError(f"--workdir {workdir}: only gs:// and s3:// are known beside folders")
    path: Any = epath.Path(str(workdir))
    try:
        path.exists()
    except ImportError as error:
        raise UserError(
            f"--workdir {workdir}: {error.name or 'a package'} is needed for it: pip install "
            "'keysync_jax[gcs]'"
        ) from error
    return cast(Path, path)


def logs_folder(workdir: Path) -> Path:
    """Where the logs of a run are written: its folder, or a local one where that is a URL."""
    if not is_remote(workdir):
        return workdir
    return cache_folder() / "runs" / f"{workdir.name}-{fingerprint(str(workdir))[:12]}"


class Mirror:
    """Copies the logs of a run behind a URL; of a local run there is nothing to do.

    Args:
      workdir: of the run.
      active: whether this process copies.
    """

    def __init__(self, workdir: Path, active: bool):
        self._remote, self._local = workdir, logs_folder(workdir)
        self._active = active and self._local is not workdir
        self._copied: dict[Path, tuple[int, int]] = {}
        if self._active:
            self._local.mkdir(parents=True, exist_ok=True)
            self._down(self._remote)

    def up(self) -> None:
        """Copies what has changed. A store that cannot be reached is told, and costs the copies alone."""
        for path in self._files() if self._active else ():
            state = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._copied.get(path) == state:
                continue
            target = self._remote / path.relative_to(self._local).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(target, path.read_bytes())
            except OSError as error:
                log.warning("%s: cannot be written (%s); tried again with the next checkpoint", target, error)
                return
            self._copied[path] = state

    def _files(self) -> Iterator[Path]:
        return (p for p in sorted(self._local.rglob("*")) if p.is_file() and not p.name.startswith("."))

    def _down(self, folder: Path) -> None:
        """Brings the records that the next attempt adds to; it may be on another machine."""
        for name in ("metrics.jsonl", "events.jsonl", "wandb_id"):
            if (folder / name).exists():
                write_bytes(self._local / name, (folder / name).read_bytes())
