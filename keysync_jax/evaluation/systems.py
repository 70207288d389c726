"""The systems that are judged: a command that dubs one clip, or a folder of ready-made videos.

A command is a template, split as a shell would split it and then filled in, so no file name is ever read by a
shell: `{video}` `{audio}` `{out}`, and if it can `{reference}` (a picture; `current`: every frame is its own
reference), `{reference_index}` (the number of that picture's frame, or `current`) and `{landmarks}` (the
list's). What else is known of a system stands in its sheet, a JSON file.
"""

import json
import shlex
import shutil
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from keysync_jax.errors import UserError
from keysync_jax.evaluation.protocol import PROTOCOLS, Cell, Reference
from keysync_jax.media.writer import SUFFIXES

NEEDED = ("video", "audio", "out")
OPTIONAL = ("reference", "reference_index", "landmarks")
CURRENT = "current"

_REFERENCES: Mapping[str, Reference] = {"current": "CR", "alternative": "AR"}


@dataclass(frozen=True)
class System:
    """A system under test.

    Attributes:
      name: in reports; part of no path.
      command: the template's words; empty for a folder.
      folder: of ready-made videos: `XM-CR/CLIP.mp4`, `XM/CLIP.mp4` or, where the protocol has one run a clip,
        `CLIP.mp4`.
      references: which of the protocol's it can be run with.
      sheet: what its sheet says, as it is.
    """

    name: str
    command: tuple[str, ...] = ()
    folder: Path | None = None
    references: tuple[Reference, ...] = ("CR", "AR")
    sheet: Mapping[str, str] = field(default_factory=dict)

    def runs(self, cell: Cell) -> bool:
        """Whether it can be run in a cell; in another it is "not applicable"."""
        return not cell.reference or cell.reference in self.references

    def wants(self, name: str) -> bool:
        """Whether the template has a placeholder."""
        return any(
            field == name for word in self.command for _, field, _, _ in string.Formatter().parse(word)
        )

    def words(self, values: Mapping[str, str]) -> list[str]:
        """The command's words, filled in."""
        return [word.format(**values) for word in self.command]

    def file(self, cell: Cell, clip: str, cells: int) -> Path | None:
        """The ready-made video of a clip; None where the folder has none."""
        assert self.folder is not None
        places = [self.folder / cell.name, self.folder / cell.setup]
        places += [self.folder] if cells == 1 else []
        candidates = (place / f"{clip}{suffix}" for place in places for suffix in SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)


def _fields(words: Iterable[str]) -> set[str]:
    """The placeholders of a template's words."""
    return {name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None}


def parse_systems(texts: Iterable[str]) -> list[System]:
    """Systems from `NAME=COMMAND`, `NAME=FOLDER` or `NAME=SHEET.json`.

    Raises:
      UserError: one is none of these, its program is not there, or two have one name.
    """
    systems = [parse_system(text) for text in texts]
    names = [system.name for system in systems]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two systems are called {min(twice)}; every system has a name of its own")
    return systems


def parse_system(text: str) -> System:
    """One system; see `parse_systems`."""
    name, equals, what = text.partition("=")
    if not (name.strip() and equals and what.strip()):
        raise UserError(f"--system takes NAME=COMMAND, NAME=FOLDER or NAME=SHEET.json, not {text!r}")
    name, path = name.strip(), Path(what.strip())
    if path.is_dir():
        current = any((path / cell.name).is_dir() for cell in PROTOCOLS["leakage"] if cell.reference == "CR")
        return System(name, folder=path, references=("CR", "AR") if current else ("AR",))
    if path.suffix == ".json" and path.is_file():
        return _of_sheet(name, path)
    return _of_command(name, what)


def _of_command(name: str, template: str, references: tuple[Reference, ...] | None = None) -> System:
    try:
        words = tuple(shlex.split(template))
        fields = _fields(words)
    except ValueError as error:
        raise UserError(f"--system {name}: the command cannot be read ({error})") from None
    if unknown := fields - {*NEEDED, *OPTIONAL}:
        known = ", ".join(f"{{{f}}}" for f in (*NEEDED, *OPTIONAL))
        raise UserError(f"--system {name}: {{{min(unknown)}}} is none of {known}")
    if missing := [f for f in NEEDED if f not in fields]:
        raise UserError(f"--system {name}: neither a folder nor a command with {{{missing[0]}}}: {template}")
    if shutil.which(words[0]) is None:
        raise UserError(f"--system {name}: there is no program {words[0]}")
    takes_reference = bool(fields & {"reference", "reference_index"})
    return System(name, words, references=references or (("CR", "AR") if takes_reference else ("AR",)))


def _of_sheet(name: str, path: Path) -> System:
    try:
        sheet = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--system {name}: {path} is no JSON file ({error})") from None
    if not isinstance(sheet, dict) or not isinstance(sheet.get("command"), str):
        raise UserError(f"--system {name}: {path} is a sheet, an object with a command")
    listed = sheet.get("references")
    if listed is not None and (
        not isinstance(listed, list) or not listed or any(r not in _REFERENCES for r in listed)
    ):
        raise UserError(f"--system {name}: {path}: the references are a list of {', '.join(_REFERENCES)}")
    references = None if listed is None else tuple(_REFERENCES[r] for r in listed)
    system = _of_command(name, sheet["command"], references)
    said = {key: str(value) for key, value in sheet.items() if key not in ("command", "references")}
    return System(name, system.command, references=system.references, sheet=said)
