"""Where the inputs of a conversion lie: on disk, or on the hub (`hub:OWNER/NAME[@REVISION]/FILE`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keysync_jax.convert.containers import check_can_read, is_transformers_file
from keysync_jax.convert.released import listed
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.hub import Address, Located, Say, is_address, locate


@dataclass(frozen=True)
class Source:
    """An input of a conversion, on disk.

    Attributes:
      path: a file, or a folder in transformers' or diffusers' layout.
      located: where the hub's cache has it, if it came from there.
    """

    path: Path
    located: Located | None = None

    @property
    def name(self) -> str:
        """What messages and the provenance call it; of the hub, the commit is in it."""
        return self.path.name if self.located is None else str(self.located.address)

    def provenance(self) -> str:
        """Its name, and the SHA-256 of a file's bytes, which are checked where something is known of them."""
        if self.located is not None:
            return f"{self.name} sha256:{self.located.verified()}"
        return f"{self.name} sha256:{sha256_of(self.path)}" if self.path.is_file() else self.name


def gather(
    inputs: Mapping[str, str | Path], allow_download: bool = False, say: Say | None = None
) -> dict[str, Source]:
    """Finds every input; those of the hub in its cache, where they are brought if fetching is allowed.

    Args:
      inputs: component -> path or address of a file on the hub.
      allow_download, say: as `hub.locate` takes them.

    Raises:
      UserError: an address is none, names no file, or cannot be fetched; a pickle needs torch.
    """
    addresses = {part: Address.parse(path) for part, path in inputs.items() if is_address(path)}
    for address in addresses.values():
        if not address.file:
            raise UserError(f"{address}: name one file of the repository, {address}/FILE")
        check_can_read(address.file)
    # The sizes of an encoder in transformers' layout are in a file of their own.
    sizes = [a.beside("config.json") for a in addresses.values() if is_transformers_file(a.file)]
    located = (
        locate([listed(a) for a in (*addresses.values(), *sizes)], allow_download, say) if addresses else []
    )
    found = dict(zip(addresses, located, strict=False))
    for at in found.values():
        if say is not None and not at.file.address.pinned:
            unchecked = "" if at.file.sha256 else ", whose bytes nothing that is known here can check"
            say(f"{at.file.address}: taken as it is in commit {at.address.revision}{unchecked}")
    return {
        part: Source(found[part].path, found[part]) if part in found else Source(Path(path))
        for part, path in inputs.items()
    }
