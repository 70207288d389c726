"""Files of the hub: fetched once, whole, checked, only where that is allowed; every refusal in a sentence."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keysync_jax import hub as hub_module
from keysync_jax.errors import UserError
from keysync_jax.hub import Address, File, locate
from tests.hub import StandIn, cached_files, drop_after, garble, refuse, truncate

WEIGHTS = bytes(range(256)) * 40
FILES = {"model.bin": WEIGHTS, "sub/config.json": b'{"a": 1}\n'}


def file(name: str = "model.bin", revision: str = "main", **facts: Any) -> File:
    return File(Address("me/model", revision, name), **facts)


def fetch(*files: File, allow: bool = True) -> list[bytes]:
    return [found.path.read_bytes() for found in locate(files, allow)]


def refused(match: str, *files: File, allow: bool = True) -> str:
    with pytest.raises(UserError, match=match) as error:
        locate(files or [file()], allow)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hub:me/model", Address("me/model")),
        ("hub:me/model@v1", Address("me/model", "v1")),
        ("hub:me/model/sub/model.pt", Address("me/model", "main", "sub/model.pt")),
        ("hub:me/mo.del-2@refs/pr/2/model.pt", Address("me/mo.del-2", "refs/pr/2", "model.pt")),
        ("hub:me/model@a%2Fb/WavLM-Base+.pt", Address("me/model", "a/b", "WavLM-Base+.pt")),
        (Path("hub:me/model@v1/x"), Address("me/model", "v1", "x")),
    ],
)
def test_addresses(text: str | Path, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["hub:", "hub:model", "hub:a/b/../c", "hub:a/b@/c", "hub:a/b/c//d", "a/b", "hub:a /b"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError, match="an address of the hub is hub:OWNER/NAME"):
        Address.parse(text)


def test_what_is_fetched_once_is_not_fetched_again(hub: StandIn, tmp_path: Path) -> None:
    commit = hub.put("me/model", FILES)
    lines: list[str] = []
    found = locate([file(), file("sub/config.json", what="sizes")], True, lines.append)
    assert [f.path.read_bytes() for f in found] == list(FILES.values())
    assert {f.address.revision for f in found} == {commit}
    assert found[0].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert lines == [
        f"hub:me/model@{commit}/model.bin        10.2 kB",
        f"hub:me/model@{commit}/sub/config.json  9 bytes  sizes",
    ]
    assert sorted(hub.fetched) == sorted(f"/me/model/resolve/{commit}/{name}" for name in FILES)
    hub.seen.clear()
    assert fetch(file(), file("sub/config.json")) == list(FILES.values())
    assert hub.fetched == []
    hub.seen.clear()
    assert fetch(file(revision=commit)) == [WEIGHTS]  # A commit is not asked for at all,
    assert fetch(file(), allow=False) == [WEIGHTS]  # and nothing is where fetching is not allowed.
    assert hub.seen == []
    assert cached_files(tmp_path / "cache") == ["config.json", "model.bin"]


def test_without_leave_nothing_is_asked(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)
    lines: list[str] = []
    with pytest.raises(
        UserError,
        match=r"2 files of the hub \(about 6.4 GB\) are not in the hub's cache, .*; --allow-download",
    ):
        locate([file(bytes=6_400_000_000), file("x.pt", what="a stage")], False, lines.append)
    assert lines == [
        "hub:me/model@main/model.bin    about 6.4 GB",
        "hub:me/model@main/x.pt       size not known  a stage",
    ]
    assert hub.seen == []
    assert not (tmp_path / "cache").exists()


def test_offline_only_the_cache_is_taken(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/model", FILES)
    fetch(file())
    hub.seen.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(file()) == [WEIGHTS]
    refused("config.json is not in the hub.s cache, .*; HF_HUB_OFFLINE is set", file("sub/config.json"))
    assert hub.seen == []


def test_a_branch_that_moved_is_followed_and_a_commit_stays(hub: StandIn) -> None:
    first = hub.put("me/model", FILES)
    fetch(file())
    second = hub.put("me/model", {"model.bin": WEIGHTS[::-1]})
    assert fetch(file(), allow=False) == [WEIGHTS]
    (found,) = locate([file()], True)
    assert found.path.read_bytes() == WEIGHTS[::-1]
    assert found.address.revision == second
    assert fetch(file(revision=first), file(), allow=False) == [WEIGHTS, WEIGHTS[::-1]]


def test_what_two_commits_share_is_fetched_once(hub: StandIn) -> None:
    first = hub.put("me/model", FILES)
    fetch(file())
    hub.put("me/model", FILES | {"new": b"x"})
    hub.seen.clear()
    assert fetch(file()) == [WEIGHTS]
    assert hub.fetched == []
    assert fetch(file(revision=first), allow=False) == [WEIGHTS]


def test_a_branch_is_known_later_whose_commit_was_there_before(hub: StandIn) -> None:
    commit = hub.put("me/model", FILES)
    fetch(file(revision=commit))
    hub.seen.clear()
    assert fetch(file()) == [WEIGHTS]
    assert hub.fetched == []
    assert fetch(file(), allow=False) == [WEIGHTS]


def test_a_pull_request_is_a_revision(hub: StandIn) -> None:
    hub.put("me/model", FILES, "refs/pr/2")
    assert fetch(file(revision="refs/pr/2")) == [WEIGHTS]


def test_a_broken_connection_goes_on_where_it_was(hub: StandIn) -> None:
    hub.put("me/model", FILES)
    hub.faults["model.bin"] = [drop_after(3500), drop_after(4100), drop_after(0)]
    assert fetch(file()) == [WEIGHTS]
    ranges = [s.headers.get("range") for s in hub.seen if s.method == "GET" and s.store]
    assert ranges == [None, "bytes=3000-", "bytes=7000-", "bytes=7000-"]


def test_a_later_call_goes_on_where_an_earlier_one_was(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)
    hub.faults["model.bin"] = [drop_after(3500), *[drop_after(0)] * 20]
    refused("no connection with http://127.0.0.1.*; 3 kB are here, the same command goes on")
    (begun,) = cached_files(tmp_path / "cache")
    assert begun.endswith(".incomplete")
    hub.faults.clear()
    hub.seen.clear()
    assert fetch(file()) == [WEIGHTS]
    assert [s.headers.get("range") for s in hub.seen if s.method == "GET" and s.store] == ["bytes=3000-"]
    assert cached_files(tmp_path / "cache") == ["model.bin"]


FETCH = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000
from keysync_jax.hub import Address, File, locate
print(*(at.path for at in locate([File(Address("me/model", "main", "model.bin"))], True)))
"""


def test_a_process_that_was_killed_is_followed_by_one_that_goes_on(hub: StandIn, tmp_path: Path) -> None:
    large = WEIGHTS * 10
    hub.put("me/model", {"model.bin": large})
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": ""}
    run = {"args": [sys.executable, "-c", FETCH], "env": os.environ | settings, "text": True}
    process: list[subprocess.Popen[str]] = []

    def kill_midway(answer: Any) -> None:
        begun = tmp_path / "cache" / "models--me--model" / "blobs"

        def whole() -> Iterator[bytes]:
            yield large[:35_000]
            while not any(path.suffix == ".incomplete" and path.stat().st_size for path in begun.iterdir()):
                time.sleep(0.01)
            process[0].kill()
            process[0].wait()

        answer.pieces = whole()

    hub.faults["model.bin"] = [kill_midway]
    process.append(subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    process[0].communicate(timeout=60)
    assert process[0].returncode == -signal.SIGKILL
    assert [name.endswith(".incomplete") for name in cached_files(tmp_path / "cache")] == [True]
    hub.seen.clear()
    done = subprocess.run(**run, capture_output=True, check=True, timeout=60)
    assert Path(done.stdout.strip()).read_bytes() == large
    assert [s.headers.get("range") for s in hub.seen if s.method == "GET" and s.store] == ["bytes=30000-"]
    assert cached_files(tmp_path / "cache") == ["model.bin"]


def test_a_server_that_sends_all_again_is_no_harm(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)
    hub.faults["model.bin"] = [drop_after(3500), *[drop_after(0)] * 20]
    refused("no connection")

    def from_the_start(answer: Any) -> None:
        answer.status, answer.body, answer.length = 200, WEIGHTS, len(WEIGHTS)

    hub.faults["model.bin"] = [from_the_start]
    assert fetch(file()) == [WEIGHTS]


def test_a_truncated_file_is_refused(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)
    hub.faults["model.bin"] = [truncate(5000)]
    refused("file should be of size 10240 but has size 5000")
    assert fetch(file()) == [WEIGHTS]
    hub.faults["config.json"] = [truncate(3)]
    refused("file should be of size 9 but has size 3", file("sub/config.json"))


@pytest.mark.parametrize("name", FILES)
def test_other_bytes_of_the_same_number_are_refused(hub: StandIn, tmp_path: Path, name: str) -> None:
    hub.put("me/model", FILES)
    hub.faults[name.rpartition("/")[2]] = [garble]
    refused("what arrived is not what the hub names", file(name))
    assert cached_files(tmp_path / "cache") == []
    assert fetch(file(name)) == [FILES[name]]


def test_the_wrong_beginning_of_a_file_does_not_stay(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)

    def garble_and_drop(answer: Any) -> None:
        garble(answer)
        drop_after(3500)(answer)

    hub.faults["model.bin"] = [garble_and_drop]
    refused("what arrived is not what the hub names")
    assert fetch(file()) == [WEIGHTS]


def test_a_known_digest_that_differs_is_refused_before_anything_is_fetched(
    hub: StandIn, tmp_path: Path
) -> None:
    hub.put("me/model", FILES)
    refused("is not the known file, its SHA-256 is .* and not 0000", file(sha256="0" * 64))
    refused("is not the known file", file("sub/config.json", sha256="0" * 64))
    assert [path for path in hub.fetched if path.endswith("bin")] == []
    assert cached_files(tmp_path / "cache") == []
    right = hashlib.sha256(WEIGHTS).hexdigest()
    assert locate([file(sha256=right)], True)[0].verified() == right


def test_a_cached_file_that_was_damaged_is_noticed(hub: StandIn) -> None:
    hub.put("me/model", FILES)
    (found,) = locate([file()], True)
    found.path.resolve().write_bytes(WEIGHTS[::-1])
    (again,) = locate([file()], False)
    with pytest.raises(
        UserError, match=r"holds other bytes than .*; remove that file to fetch it anew"
    ) as error:
        again.verified()
    Path(str(error.value).partition(": ")[0]).unlink()
    assert fetch(file()) == [WEIGHTS]
    fetch(file("sub/config.json"))
    (small,) = locate([file("sub/config.json", sha256="0" * 64)], False)
    with pytest.raises(UserError, match="is not the known file"):
        small.verified()


def test_a_token_is_sent_to_the_hub_alone(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)
    (tmp_path / "token").write_text("hf_secret")
    fetch(file())
    sent = {(seen.method, seen.store, seen.headers.get("authorization")) for seen in hub.seen}
    token = "Bearer hf_secret"
    assert sent == {("HEAD", False, token), ("GET", False, token), ("GET", True, None)}


def test_without_a_token_none_is_sent(hub: StandIn) -> None:
    hub.put("me/model", FILES)
    fetch(file())
    assert not [seen for seen in hub.seen if "authorization" in seen.headers]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(hub: StandIn, tmp_path: Path, status: int) -> None:
    hub.put("me/model", FILES)
    repo = hub.repos["me/model"]
    repo.status, repo.code, repo.token = status, "GatedRepo", "hf_right"
    said = refused(f"me/model is gated: log in and accept its terms at {hub.endpoint}/me/model")
    assert f"set HF_TOKEN, or `hf auth login`, which writes {tmp_path / 'token'}" in said
    (tmp_path / "token").write_text("hf_wrong")
    assert "hf_wrong" not in refused("is gated: the account of your token has to accept its terms")
    (tmp_path / "token").write_text("hf_right")
    assert fetch(file()) == [WEIGHTS]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "", "me/model: there is no such repository, or it is private; if it is private, give a token"),
        (401, "RepoNotFound", "me/model: there is no such repository, or it is private"),
        (404, "RepoNotFound", "me/model: there is no such repository, or it is private"),
        (403, "", "me/model: the hub forbids access"),
        (500, "", "the hub answers 500; try again later"),
        (429, "", "the hub answers 429; try again later"),
    ],
)
def test_answers_that_are_no_file(
    hub: StandIn, tmp_path: Path, status: int, code: str, sentence: str
) -> None:
    hub.put("me/model", FILES)
    repo = hub.repos["me/model"]
    repo.status, repo.code = status, code
    refused(sentence)
    assert cached_files(tmp_path / "cache") == []


def test_what_is_not_there(hub: StandIn) -> None:
    refused("me/model: there is no such repository")
    hub.put("me/model", FILES)
    refused("me/model has no file 'x.pt' at main", file("x.pt"))
    refused("me/model has no revision 'v9'", file(revision="v9"))
    refused("no repository has such a name", File(Address("me--you/x", "main", "a")))


def test_an_error_in_place_of_the_bytes(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", FILES)
    hub.faults["model.bin"] = [refuse(503)]
    refused("the hub answers 503; try again later")
    assert fetch(file()) == [WEIGHTS]


def test_a_hub_that_cannot_be_reached(hub: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    hub.put("me/model", FILES)
    commit = locate([file()], True)[0].address.revision
    nowhere = "http://127.0.0.1:9"
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    refused(f"no connection with {nowhere}", file("sub/config.json"))
    assert fetch(file()) == [WEIGHTS]
    assert f"the one in the cache is taken, of commit {commit}" in caplog.text


def test_a_server_that_is_no_hub(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/model", FILES)
    hub.repos["me/model"].commits[""] = FILES
    hub.repos["me/model"].branches["main"] = ""
    refused("does not answer as the hub does")


def test_a_full_disk_is_seen_before_anything_is_fetched(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/model", FILES)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    refused(r"the hub's cache has 10 kB of room, the files take 10.2 kB")
    assert hub.fetched == []


def test_a_disk_that_fills_up_is_not_the_hubs_fault(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/model", FILES)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match="No space left") as error:
        locate([file()], True)
    assert not isinstance(error.value, UserError)


def test_a_second_process_is_turned_away(hub: StandIn) -> None:
    hub.put("me/model", FILES)

    def meanwhile(_: Any) -> None:
        refused("another process is fetching it")

    hub.faults["model.bin"] = [meanwhile]
    assert fetch(file()) == [WEIGHTS]


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"hub:me/model@main/model.bin: finding it needs huggingface_hub, .* 'keysync_jax\[hub\]'")
