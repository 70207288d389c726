"""The clips of a source divided among datasets: which clip is of which part."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keysync_jax.data.sources import Clip
from keysync_jax.errors import UserError
from keysync_jax.files import fingerprint


@dataclass(frozen=True)
class PartOf:
    """Which of several datasets that were made of the same clips one is.

    Attributes:
      number: from 0 on; count: of the datasets.
      clips: `digest_of` the sources of all clips, those of the other datasets included.
    """

    number: int
    count: int
    clips: str

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_part(text: str) -> tuple[int, int]:
    """Number and count of `--part I/N`.

    Raises:
      UserError: it is nothing of that kind.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isascii() and number.isdecimal() and count.isascii() and count.isdecimal()):
        raise UserError(f"--part takes a number and a count, as --part 0/4, not {text!r}")
    check_part((int(number), int(count)))
    return int(number), int(count)


def check_part(part: tuple[int, int]) -> None:
    """Refuses a number that the count does not have."""
    number, count = part
    if not 0 <= number < count:
        raise UserError(f"parts are numbered from 0: of {count} there is no part {number}/{count}")


def number_of(name: str, count: int) -> int:
    """The part that a clip of this name is of, whatever other clips there are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % count


def part_of(clips: Sequence[Clip], part: tuple[int, int]) -> tuple[PartOf, list[Clip]]:
    """A part, and the clips of it in their order; there may be none."""
    number, count = part
    chosen = [clip for clip in clips if number_of(clip.name, count) == number]
    return PartOf(number, count, digest_of(clip.source for clip in clips)), chosen


def digest_of(sources: Iterable[str]) -> str:
    """Names a list of clips by their sources, in whatever order."""
    return fingerprint(sorted(sources))
