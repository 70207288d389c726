"""Runs behind a URL: an object store in memory stands in for one of the cloud's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.files import write_bytes, write_text
from keysync_jax.train.checkpoint import read_config, saved_steps, settle_config
from keysync_jax.train.events import Events, read_events
from keysync_jax.train.inputs import inputs_of, read_inputs
from keysync_jax.train.places import Mirror, logs_folder, run_folder
from tests.train.smallest_config import smallest
from tests.train.synthetic_dataset import write_dataset

URL = "gs://bucket/runs/one"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`gs://` in memory; the cache of this machine is in `tmp_path`."""
    registry = pytest.importorskip("fsspec.registry")
    backend = pytest.importorskip("etils.epath.backend")
    memory = pytest.importorskip("fsspec.implementations.memory")

    class Store(memory.MemoryFileSystem):
        protocol = ("gcs", "gs")
        store: dict[str, object] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("gs://"))

    monkeypatch.setitem(registry._registry, "gcs", Store)
    monkeypatch.setattr("keysync_jax.train.places.cache_folder", lambda: tmp_path / "cache")
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_config_and_inputs_are_objects(store: None, tmp_path: Path) -> None:
    workdir, config = run_folder(URL), smallest()
    inputs = inputs_of([Dataset(write_dataset(tmp_path / "data"))], "hubert", {})
    settle_config(workdir, config, inputs)
    assert read_config(workdir) == config
    assert read_inputs(workdir) == inputs
    assert str(workdir / "config.json") == f"{URL}/config.json"
    assert not list(Path().glob("gs:*"))
    with pytest.raises(UserError, match=r"gs://bucket/other: not the folder of a training run"):
        read_config(run_folder("gs://bucket/other"))


def test_a_checkpoint_is_known_by_its_marker_not_its_name(store: None, tmp_path: Path) -> None:
    # A store has no renaming: a checkpoint under way has its final name.
    for folder in (run_folder(URL) / "checkpoints", tmp_path / "checkpoints"):
        for step, name, content in (
            (10, "commit_success.txt", b"done"),
            (20, "state/manifest.ocdbt", b"x"),
            (30, "_CHECKPOINT_METADATA", b'{"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": null}'),
            # Of Orbax before it wrote the marker everywhere.
            (5, "_CHECKPOINT_METADATA", b'{"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 2}'),
        ):
            path = folder / str(step) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        assert sorted(saved_steps(folder)) == [5, 10]
    assert saved_steps(run_folder("gs://bucket/nothing")) == []


def test_logs_are_local_and_copied_up(store: None, tmp_path: Path) -> None:
    workdir = run_folder(URL)
    local = logs_folder(workdir)
    assert local.is_relative_to(tmp_path / "cache")
    mirror = Mirror(workdir, active=True)
    Events(local, active=True).add("start")
    (local / "previews").mkdir()
    write_bytes(local / "previews/1.mp4", b"frames")
    mirror.up()
    assert (workdir / "previews/1.mp4").read_bytes() == b"frames"
    write_text(workdir / "metrics.jsonl", '{"step": 1}\n')
    # Another machine goes on with what is there.
    for path in local.rglob("*"):
        path.unlink() if path.is_file() else None
    Mirror(workdir, active=False)
    assert not read_events(local)
    Mirror(workdir, active=True)
    assert [e["event"] for e in read_events(local)] == ["start"]
    assert (local / "metrics.jsonl").read_text() == '{"step": 1}\n'
    # A folder needs none of it.
    assert logs_folder(tmp_path) is tmp_path


def test_urls_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ftp://x/y: only gs:// and s3:// are known beside folders"):
        run_folder("ftp://x/y")
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    backend = pytest.importorskip("etils.epath.backend")
    backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(UserError, match=r"s3://x/y: .* needed for it"):
        run_folder("s3://x/y")
