"""What hosts are compared by before a run begins, and what the loss of one is told as."""

import socket
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.files import sources_fingerprint
from keysync_jax.launch import preflight as module
from keysync_jax.launch.join import join_hosts
from keysync_jax.launch.preflight import Host, check_alike, check_sum, device_sums, preflight
from keysync_jax.train import checkpoint
from keysync_jax.train.hosts import HostsLostError, lost_hosts_told
from tests.train.smallest_config import smallest

HOSTS = [Host(f"node{i}", 1000.0 + i, "code", "config", f"nonce{i}") for i in range(4)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"code": "x"},
            "process 2 on node2: has another version of keysync_jax or JAX than process 0 on node0",
        ),
        ({"config": "x"}, "process 2 on node2: was given another --config than process 0 on node0"),
        ({"time": 1100.0}, r"process 2 on node2: its clock is \+98 s off that of the others"),
    ],
)
def test_a_host_that_differs_is_named(changes: dict[str, str | float], sentence: str) -> None:
    check_alike(HOSTS)
    other = replace(HOSTS[2], **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        check_alike([*HOSTS[:2], other, HOSTS[3]])


def test_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    count = jax.device_count()
    assert device_sums() == [count * (count + 1) / 2] * jax.local_device_count()
    check_sum(device_sums())
    rows = [{"name": "a", "sums": device_sums()}, {"name": "b", "sums": [-1.0]}]
    monkeypatch.setattr(module, "gathered", lambda row: rows)
    with pytest.raises(UserError, match=r"b: a sum over all 1 devices is -1 there, not 1"):
        check_sum(device_sums())


def test_a_folder_that_one_host_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As process 0 of two, whose second one sees another folder."""
    asked = []

    def gathered(row: dict[str, str]) -> list[dict[str, str]]:
        asked.append(sorted(path.name for path in tmp_path.iterdir()))
        return [row, {"fault": ""} if len(asked) == 1 else {"fault": "of node0"}]

    monkeypatch.setattr(module, "gathered", gathered)
    with pytest.raises(UserError, match=r"process 1 on node1 does not see what process 0 writes there"):
        module._check_folder(tmp_path, HOSTS)
    assert asked[0] == ["preflight-nonce0"]
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "gathered", lambda row: [row, {"fault": ""}])
    with pytest.raises(UserError, match=r"process 0 on node0 cannot write it \(Not a directory\)"):
        module._check_folder(tmp_path / "file/run", HOSTS)


def test_another_host_waits_for_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_SEEN_SECONDS", 0.0)
    assert not module._appears(tmp_path, "x", "content")
    (tmp_path / "x").write_text("content")
    assert module._appears(tmp_path, "x", "content")


def test_one_process_has_nothing_to_compare(tmp_path: Path) -> None:
    assert preflight(smallest(), tmp_path) == [socket.gethostname()]
    assert not list(tmp_path.iterdir())


def test_code_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "pkg").mkdir(parents=True)
        (tmp_path / name / "pkg/m.py").write_text("x = 1\n")
        (tmp_path / name / "pkg/m.pyc").write_text(name)
    assert sources_fingerprint([tmp_path / "a/pkg"]) == sources_fingerprint([tmp_path / "b/pkg"])
    (tmp_path / "b/pkg/m.py").write_text("x = 2\n")
    assert sources_fingerprint([tmp_path / "a/pkg"]) != sources_fingerprint([tmp_path / "b/pkg"])


def test_a_lost_host_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: str) -> None:
        with lost_hosts_told():
            raise jax.errors.JaxRuntimeError(words)

    with pytest.raises(jax.errors.JaxRuntimeError):
        fails("Gloo all-reduce failed")  # One process has nobody to lose.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(HostsLostError, match=r"is gone \(Gloo all-reduce failed\)"):
        fails("Gloo all-reduce failed\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError):
        fails("RESOURCE_EXHAUSTED: out of memory")
    # Some come as another exception.
    with pytest.raises(HostsLostError), lost_hosts_told():
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:33415")
    with pytest.raises(ValueError, match="a defect"), lost_hosts_told():
        raise ValueError("a defect")
    checkpoints = object.__new__(checkpoint.Checkpoints)
    checkpoints.folder, checkpoints._latest = Path("run"), 7
    lost = checkpoints._failed(8, jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: a barrier timed out"))
    assert isinstance(lost, HostsLostError)
    assert isinstance(checkpoints._failed(8, ValueError("os_error_code='28'")), UserError)


def test_a_coordinator_that_cannot_be_found() -> None:
    with pytest.raises(HostsLostError, match=r"does not know the host of process 0, no-such-host.invalid"):
        join_hosts(False, "no-such-host.invalid:1", 2, 1, seconds=0)
    with pytest.raises(UserError, match="--coordinator, --processes and --process go together"):
        join_hosts(True, "h:1", 2, None)
    assert join_hosts(False, None, None, None) is None


def test_commands_that_say_too_little(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "--workdir", "x"]) == 2
    assert "--config is missing" in capsys.readouterr().err
    assert main(["train", "--report", str(tmp_path)]) == 2
    assert "has no events.jsonl" in capsys.readouterr().err
