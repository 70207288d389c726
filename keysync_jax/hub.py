"""Files of the Hugging Face Hub, `hub:OWNER/NAME[@REVISION]/FILE`: in its client's cache, or fetched into it.

Nothing is fetched unless the caller allows it. Addresses, tokens, redirects and the layout of the cache are
the client's (`huggingface_hub`, the extra `hub`; imported late). Two things are done here. A download that
was broken off goes on where it was: the client begins a file anew in every process, and a stage has 6 GB. And
bytes are checked against the digest that the hub names: the client checks their number.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for
from keysync_jax.files import continued, git_blob_of, sha256_of, sha256_once

log = logging.getLogger(__name__)

PREFIX = "hub:"
MAIN = "main"

_ADDRESS = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_BEGUN = ".keysync.incomplete"
"""Ending of what has arrived of a file; by its last part the client's own tools know and remove it."""

Say = Callable[[str], object]
"""Is told of each file that is to be fetched, in a line."""


@dataclass(frozen=True)
class Address:
    """A file of a repository, or the repository itself.

    Attributes:
      repo: "owner/name".
      revision: a branch, a tag or a commit.
      file: path inside the repository; empty for the repository.
    """

    repo: str
    revision: str = MAIN
    file: str = ""

    @classmethod
    def parse(cls, text: str | Path) -> "Address":
        """`"hub:owner/name@revision/folder/file"`; without a revision it is `main`.

        A slash in the name of a branch is written `%2F`, those of `refs/pr/N` as they are.

        Raises:
          UserError: it is no such address.
        """
        found = _ADDRESS.fullmatch(str(text).removeprefix(PREFIX))
        parts = found["file"].split("/") if found and found["file"] else []
        if not found or not str(text).startswith(PREFIX) or {"", ".", ".."} & set(parts):
            raise UserError(f"{text}: an address of the hub is {PREFIX}OWNER/NAME[@REVISION][/FILE]")
        return cls(found["repo"], unquote(found["revision"] or MAIN), found["file"] or "")

    def __str__(self) -> str:
        at = self.revision if self.revision.startswith("refs/") else self.revision.replace("/", "%2F")
        return f"{PREFIX}{self.repo}@{at}" + (f"/{self.file}" if self.file else "")

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return _COMMIT.fullmatch(self.revision) is not None

    def below(self, name: str) -> "Address":
        """A file in the folder that this is."""
        return replace(self, file=f"{self.file}/{name}" if self.file else name)

    def beside(self, name: str) -> "Address":
        """A file in the same folder."""
        folder, slash, _ = self.file.rpartition("/")
        return replace(self, file=folder + slash + name)


def is_address(path: str | Path) -> bool:
    """Whether it names something on the hub rather than on disk."""
    return str(path).startswith(PREFIX)


@dataclass(frozen=True)
class File:
    """A file to find.

    Attributes:
      what: it is, for messages.
      bytes: how many, where that is known before the hub is asked; about as many where `sha256` is None.
      sha256: what its bytes must have, where that is known.
      licence: of its content, as its publisher names it; empty where none was found.
    """

    address: Address
    what: str = ""
    bytes: int | None = None
    sha256: str | None = None
    licence: str = ""


@dataclass(frozen=True)
class Located:
    """A file in the cache.

    Attributes:
      file: what was asked for.
      address: of what was found; its revision is a commit.
      sha256: of the bytes, where they were read just now.
    """

    file: File
    address: Address
    path: Path
    sha256: str | None = None

    def verified(self) -> str:
        """SHA-256 of the bytes, compared with what is known of them.

        Known is the digest that the caller gave; else that by which the cache names large files.

        Raises:
          UserError: they differ, or the file cannot be read.
        """
        found = self.sha256 or sha256_once(self.path)
        stored = self.path.resolve()
        named = stored.name if _SHA256.fullmatch(stored.name) else None
        if named not in (None, found):
            raise UserError(
                f"{stored}: the hub's cache holds other bytes than {self.address} has "
                f"(their SHA-256 is {found}); remove that file to fetch it anew"
            )
        _check_known(self.file, self.address, found)
        return found


def locate(files: Sequence[File], allow_download: bool = False, say: Say | None = None) -> list[Located]:
    """Finds files in the cache, and fetches those that are missing.

    Where fetching is allowed the hub is asked what a branch or tag names today. A commit's file that is in
    the cache costs no request; where fetching is not allowed, none does.

    Args:
      allow_download: without it, and in the client's offline mode, only the cache is looked at.
      say: is told of each missing file: address, size, what it is.

    Raises:
      UserError: a file is missing and may or can not be fetched, or its bytes are not the known ones. What
        was received stays, and the next call goes on from there.
      OSError: the disk is full or the cache cannot be written.
    """
    hub = _client(files[0].address)
    found = {file: _cached(hub, file) for file in files}
    if allow_download and not hub.constants.HF_HUB_OFFLINE:
        found |= _updated(hub, found, say)
    absent = [file for file, at in found.items() if at is None]
    if absent:
        _tell(say, [(str(file.address), _known_size(file), file) for file in absent])
        raise UserError(_not_cached(hub, absent))
    return [at for at in (found[file] for file in files) if at is not None]


def _updated(
    hub: ModuleType, found: Mapping[File, Located | None], say: Say | None
) -> dict[File, Located | None]:
    """What the hub has of these files in place of what was found in the cache; fetches it where need be."""
    asked = [_ask(hub, file, cached) for file, cached in found.items()]
    remote = [at for at in asked if at is not None]
    now = {at.file: _cached(hub, at.file, at.address) for at in remote}
    missing = [at for at in remote if now[at.file] is None]
    _tell(say, [(str(at.address), _size(at.bytes), at.file) for at in missing])
    _check_space(hub, missing)
    for at in remote:
        before = found[at.file]
        if now[at.file] is None:
            now[at.file] = _fetch(hub, at)
        elif before is None or before.address != at.address:  # Another revision brought it.
            _enter(hub, at)
    return now


@dataclass(frozen=True)
class _Remote:
    """A file on the hub.

    Attributes:
      file: what was asked for.
      address: with the commit that the hub names.
      etag: the hub's name of the bytes: their SHA-256, for small files git's SHA-1.
      bytes: how many, where the hub says it.
    """

    file: File
    address: Address
    etag: str
    bytes: int | None


def _ask(hub: ModuleType, file: File, cached: Located | None) -> _Remote | None:
    """What the hub says of a file, for one request; None where the cached one will do without asking."""
    address = file.address
    if cached is not None and address.pinned:
        return None
    try:
        with _sentences(hub, address):
            url = hub.hf_hub_url(address.repo, address.file, revision=address.revision)
            found = hub.get_hf_file_metadata(url)
    except _BrokenOffError as error:
        if cached is None:
            raise
        log.warning("%s; the one in the cache is taken, of commit %s", error, cached.address.revision)
        return None
    if not found.commit_hash or not re.fullmatch(r"[\w.-]+", found.etag or ""):
        raise UserError(f"{hub.constants.ENDPOINT} does not answer as the hub does (asked for {address})")
    if _SHA256.fullmatch(found.etag):
        _check_known(file, address, found.etag)
    return _Remote(file, replace(address, revision=found.commit_hash), found.etag, found.size)


def _client(address: Address) -> ModuleType:
    """The client, with what is used of it that its top level does not have."""
    with needed_for(f"{address}: finding it"):
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    return huggingface_hub


def _cached(hub: ModuleType, file: File, address: Address | None = None) -> Located | None:
    """A file in the cache, of the commit that its branch or tag named when the hub was last asked."""
    at = address or file.address
    with _sentences(hub, at):
        found = hub.try_to_load_from_cache(at.repo, at.file, revision=at.revision)
    if not isinstance(found, str):  # It has a value of its own for files known not to exist.
        return None
    return Located(file, replace(at, revision=_commit(found, at)), Path(found))


def _commit(path: str, address: Address) -> str:
    """Of a file in the cache: the name of the folder that stands for the repository's root."""
    return Path(path).parents[address.file.count("/")].name


def _fetch(hub: ModuleType, remote: _Remote) -> Located:
    """Receives a file's bytes and checks them."""
    address, blob = remote.address, _blob(hub, remote)
    blob.parent.mkdir(parents=True, exist_ok=True)
    if blob.exists():
        sha256 = _check_bytes(remote, blob)
    else:
        with continued(blob, _BEGUN, f"{address}: another process is fetching it") as partial:
            _receive(hub, remote, partial)
            try:
                sha256 = _check_bytes(remote, partial)
            except UserError:
                partial.unlink()  # Nothing that comes after such bytes makes them right.
                raise
    return Located(remote.file, address, _enter(hub, remote), sha256)


def _enter(hub: ModuleType, remote: _Remote) -> Path:
    """Lets the client enter into its cache a file whose bytes are there: its links, and a branch's entry."""
    asked = remote.file.address
    with _sentences(hub, asked):
        path = hub.hf_hub_download(asked.repo, asked.file, revision=asked.revision)
    if _commit(path, asked) != remote.address.revision:
        raise UserError(f"{asked}: was changed while it was fetched; repeat the command")
    return Path(path)


def _blob(hub: ModuleType, remote: _Remote) -> Path:
    """Where the client's cache keeps a file's bytes, whatever its names."""
    folder = hub.file_download.repo_folder_name(repo_id=remote.address.repo, repo_type="model")
    return Path(hub.constants.HF_HUB_CACHE) / folder / "blobs" / remote.etag


def _receive(hub: ModuleType, remote: _Remote, partial: Path) -> None:
    """Fetches what is missing of a file; goes on after a broken connection as long as bytes arrive."""
    address = remote.address
    # Not the place that the hub redirects to: that address ends after an hour.
    url = hub.hf_hub_url(address.repo, address.file, revision=address.revision)
    while True:
        begun = partial.stat().st_size
        if remote.bytes is not None and begun > remote.bytes:
            begun = 0
        try:
            with _sentences(hub, address), partial.open("r+b") as file:
                file.truncate(begun)
                file.seek(begun)
                hub.file_download.http_get(
                    url,
                    file,
                    resume_size=begun,
                    headers=hub.utils.build_hf_headers(),
                    expected_size=remote.bytes,
                    displayed_filename=address.file,
                )
            return
        except _BrokenOffError as error:
            if partial.stat().st_size <= begun:
                raise UserError(f"{error}; {_size(begun)} are here, the same command goes on") from error


def _check_bytes(remote: _Remote, path: Path) -> str:
    """SHA-256 of what was received, compared with what the hub and the caller know of it."""
    found = sha256_of(path)
    of_git = _COMMIT.fullmatch(remote.etag) is not None
    if (_SHA256.fullmatch(remote.etag) and found != remote.etag) or (
        of_git and git_blob_of(path) != remote.etag
    ):
        raise UserError(f"{remote.address}: what arrived is not what the hub names (its digest differs)")
    _check_known(remote.file, remote.address, found)
    return found


def _check_known(file: File, address: Address, found: str) -> None:
    if file.sha256 not in (None, found):
        raise UserError(
            f"{address}: is not the known file, its SHA-256 is {found} and not {file.sha256} "
            "(to take it as it is, name it with its commit)"
        )


def _check_space(hub: ModuleType, missing: Sequence[_Remote]) -> None:
    cache = Path(hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    blobs = [_blob(hub, at) for at in missing]
    here = sum(p.stat().st_size for b in blobs for p in (b, b.with_name(b.name + _BEGUN)) if p.exists())
    needed, free = sum(at.bytes or 0 for at in missing) - here, shutil.disk_usage(cache).free
    if needed > free:
        raise UserError(f"{cache}: the hub's cache has {_size(free)} of room, the files take {_size(needed)}")


def _tell(say: Say | None, missing: Sequence[tuple[str, str, File]]) -> None:
    """Says of every missing file its address, its size, and what it is, in columns."""
    width = max((len(address) for address, _, _ in missing), default=0)
    width_of_size = max((len(size) for _, size, _ in missing), default=0)
    for address, size, file in missing:
        what = file.what + (f" (licence: {file.licence})" if file.licence else "")
        if say is not None:
            say(f"{address:<{width}}  {size:>{width_of_size}}  {what}".rstrip())


def _known_size(file: File) -> str:
    """Of a file that the hub was not asked for."""
    return _size(file.bytes) if file.sha256 or file.bytes is None else f"about {_size(file.bytes)}"


def _not_cached(hub: ModuleType, absent: Sequence[File]) -> str:
    sizes = [file.bytes for file in absent if file.bytes is not None]
    size = f" (about {_size(sum(sizes))})" if sizes else ""
    one = len(absent) == 1
    what = f"{absent[0].address}{size} is" if one else f"{len(absent)} files of the hub{size} are"
    if hub.constants.HF_HUB_OFFLINE:
        way = "HF_HUB_OFFLINE is set, so nothing is fetched"
    else:
        way = "--allow-download (in Python allow_download=True) fetches " + ("it" if one else "them")
    return f"{what} not in the hub's cache, {hub.constants.HF_HUB_CACHE}; {way}"


def _size(count: int | None) -> str:
    """Bytes for people, by powers of 1000, as the hub's pages say them."""
    if count is None:
        return "size not known"
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count} bytes"


class _BrokenOffError(UserError):
    """The hub cannot be reached, or the connection ended before the answer did."""


@contextmanager
def _sentences(hub: ModuleType, address: Address) -> Iterator[None]:
    """Turns the client's errors into sentences; those of the disk pass."""
    errors = hub.errors
    try:
        yield
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(hub, address, error)) from error
    except errors.HTTPError as error:  # Of the transport.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _BrokenOffError(f"{address}: no connection with {hub.constants.ENDPOINT} ({reason})") from error
    except errors.HFValidationError as error:
        raise UserError(f"{address}: no repository has such a name") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{address}: {str(error).splitlines()[0]}") from error


def _refusal(hub: ModuleType, address: Address, error: Any) -> str:
    """What an answer of the hub that is an error means, and what to do."""
    errors, status = hub.errors, error.response.status_code
    token = hub.get_token() is not None
    page = f"{hub.constants.ENDPOINT}/{address.repo}"
    login = f"set HF_TOKEN, or `hf auth login`, which writes {hub.constants.HF_TOKEN_PATH}"
    if isinstance(error, errors.GatedRepoError):
        if token:
            return f"{address.repo} is gated: the account of your token has to accept its terms, at {page}"
        return (
            f"{address.repo} is gated: log in and accept its terms at {page}, then give your token ({login})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address.repo} has no revision {address.revision!r}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{address.repo} has no file {address.file!r} at {address.revision}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        why = (
            "the hub does not take your token for it"
            if token
            else f"if it is private, give a token ({login})"
        )
        return f"{address.repo}: there is no such repository, or it is private; {why}"
    if status == 403:
        return f"{address.repo}: the hub forbids access (403); see {page}"
    return f"{address}: the hub answers {status}; try again later"
