"""`bench --report`: every measurement that fits a time, each by a command of its own, and their tables.

A part's figures lie in the report's folder as soon as it is done, so a report that was stopped, or whose
time was up, goes on with what is left.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from keysync_jax import __version__
from keysync_jax.bench.tables import markdown
from keysync_jax.bench.training import VARIED
from keysync_jax.files import settle, write_json, write_text
from keysync_jax.processes import Workers

FORMAT = "keysync-bench-report-1"
MARK = "bench.json"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "libtpu")
"""Whose versions a report tells, as far as they are installed."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """What a report measures.

    Attributes:
      size: of the networks; full on an accelerator and tiny on a CPU where None.
      batch, repeats: of all of them; the commands' own where None.
      golden: prefix of the golden numbers; none are compared where None.
    """

    size: str | None = None
    batch: int | None = None
    repeats: int | None = None
    golden: str | None = None


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
      name: of its files in the report's folder.
      section: of the document; parts of one section share a table.
      kind: "networks", "dub", "train" or "golden".
      arguments: of `keysync`.
      result: the file with its figures, relative to the report's folder.
    """

    name: str
    section: str
    kind: str
    arguments: tuple[str, ...]
    result: str

    @property
    def command(self) -> str:
        return " ".join(("keysync", *self.arguments))


def parts_of(plan: Plan, size: str) -> list[Part]:
    """The commands of a report, those first that tell most; each is as small as can be done again alone."""
    return [
        *_networks(plan, size, "bf16"),
        *_golden(plan, "fp32"),
        *_golden(plan, "bf16"),
        _bench(plan, size, "bf16", "train", "train", "--vary"),
        _bench(plan, size, "bf16", "dub", "dub"),
        *(_bench(plan, size, "bf16", "train", "train", "--vary", "--set", change) for change in VARIED),
        *_networks(plan, size, "fp32"),
    ]


def _bench(plan: Plan, size: str, dtype: str, kind: str, *what: str) -> Part:
    section = f"{kind}-{dtype}"
    last = what[-1].removeprefix("--vary")
    name = section if last in ("", kind) else f"{section}-{last}"
    options = ["--size", size, "--dtype", dtype]
    for option, value in (("batch", plan.batch), ("repeats", plan.repeats)):
        options += [f"--{option}", str(value)] if value is not None else []
    return Part(name, section, kind, ("bench", *what, *options, "--json", f"{name}.json"), f"{name}.json")


def _networks(plan: Plan, size: str, dtype: str) -> list[Part]:
    return [_bench(plan, size, dtype, "networks", part) for part in ("unet", "vae", "sampler", "audio")]


def _golden(plan: Plan, dtype: str) -> list[Part]:
    if plan.golden is None:
        return []
    prefix, name = str(Path(plan.golden).absolute()), f"golden-{dtype}"
    arguments = ("parity", "--golden", prefix, "--dtype", dtype, "-o", name)
    return [Part(name, name, "golden", arguments, f"{name}/report.md")]


def run(folder: Path, plan: Plan, seconds: float, say: Say = print) -> int:
    """Measures what is left of a report, as far as the time goes, and writes `report.md` and `report.json`.

    Args:
      folder: of the report, new or begun with the same plan on the same kind of device.
      seconds: after which the part under way is stopped; a later call does it anew.

    Returns:
      0, or 1 where a part failed; a later call tries it again.

    Raises:
      UserError: the folder holds something else.
    """
    ends = time.monotonic() + seconds
    here = _asked_apart()
    size = plan.size or ("tiny" if here["platform"] == "cpu" else "full")
    settle(
        folder / MARK, {"format": FORMAT, **asdict(plan), "size": size, **here}, "a report", "another plan"
    )
    parts = parts_of(plan, size)
    for part in parts:
        left = ends - time.monotonic()
        if _is_done(folder, part) or left <= 0:
            continue
        say(f"{part.name}: {part.command}")
        state = _run_part(folder, part, left)
        write_json(folder / f"{part.name}.run.json", state)
        say(state["output"] if state["state"] == "done" else f"{part.name}: {state['state']}: {state['why']}")
        _write(folder, here, size, parts)
    _write(folder, here, size, parts)
    states = [_state(folder, part)["state"] for part in parts]
    if todo := [part.name for part, state in zip(parts, states, strict=True) if state != "done"]:
        say(f"not measured: {', '.join(todo)}; the same command goes on with them")
    say(f"wrote {folder / 'report.md'}")
    return 1 if "failed" in states else 0


def _run_part(folder: Path, part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part's command in the report's folder; how it ended."""
    before = time.monotonic()
    found: dict[str, Any] = {"command": part.command}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "keysync_jax.cli", *part.arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**found, "state": "left", "why": f"did not end within {seconds:.0f} s; give more --minutes"}
    found |= {"seconds": time.monotonic() - before, "output": done.stdout.rstrip()}
    # Golden numbers beyond their bounds (1) are a result too.
    if done.returncode in (0, 1) and (folder / part.result).is_file():
        return {**found, "state": "done"}
    lines = done.stderr.strip().splitlines()
    return {**found, "state": "failed", "why": lines[-1] if lines else f"exit code {done.returncode}"}


def _is_done(folder: Path, part: Part) -> bool:
    return _state(folder, part)["state"] == "done"


def _state(folder: Path, part: Part) -> dict[str, Any]:
    """How a part's last run ended."""
    try:
        found: dict[str, Any] = json.loads((folder / f"{part.name}.run.json").read_bytes())
    except (OSError, ValueError):
        return {"command": part.command, "state": "left", "why": "the time was up"}
    if found["state"] == "done" and not (folder / part.result).is_file():
        return {**found, "state": "left", "why": "its figures are gone"}
    return found


def _write(folder: Path, here: Mapping[str, Any], size: str, parts: Sequence[Part]) -> None:
    """`report.json` with all figures, and `report.md` with the tables of the documents."""
    found = []
    for part in parts:
        state = _state(folder, part)
        figures = _figures(folder / part.result) if state["state"] == "done" else None
        told = {name: value for name, value in state.items() if name != "output"}
        about = {"name": part.name, "section": part.section, "kind": part.kind}
        found.append({**about, **told, "figures": figures})
    content = {"format": FORMAT, "size": size, **here, "parts": found}
    write_json(folder / "report.json", content)
    write_text(folder / "report.md", markdown(content))


def _figures(path: Path) -> Any:
    """What a part found: JSON, or its own table."""
    return json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_text()


def _asked_apart() -> dict[str, Any]:
    """The device that is here, asked by a process that does not keep it."""
    with Workers(_here, 1) as workers:
        return workers.submit(None).result()


def _here(_: None) -> dict[str, Any]:
    devices = jax.local_devices()
    versions = {"keysync_jax": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    first = devices[0]
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "devices": len(devices),
        "versions": versions,
    }
