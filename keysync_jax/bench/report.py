"""What `bench` measured: a table for people, JSON for the next run to compare with."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from keysync_jax import __version__
from keysync_jax.bench.measure import Measured
from keysync_jax.errors import UserError
from keysync_jax.files import write_json

FORMAT = "keysync-bench-1"


@dataclass(frozen=True)
class Conditions:
    """What the rows of a report have in common."""

    size: str
    dtype: str
    batch: int
    device: str
    threads: int
    versions: dict[str, str]

    @classmethod
    def here(cls, size: str, dtype: str, batch: int) -> "Conditions":
        import os

        versions = {"keysync_jax": __version__, "jax": jax.__version__}
        threads = len(os.sched_getaffinity(0))
        return cls(size, dtype, batch, jax.devices()[0].device_kind, threads, versions)


def table(conditions: Conditions, rows: Sequence[Measured], before: dict[str, float] | None = None) -> str:
    """Lines of text.

    Args:
      before: median seconds of an earlier report by the row's name.
    """
    c = conditions
    lines = [
        f"{c.size}, {c.dtype}, batch {c.batch}; {c.device}, {c.threads} cores; jax {c.versions['jax']}",
        f"{'':<12}{'compile s':>10}{'median s':>10}{'spread':>17}{'frames/s':>10}{'TFLOP':>9}{'TFLOP/s':>9}"
        f"{'of peak':>9}{'device GiB':>11}{'host GiB':>9}"
        + ("" if not _compared(rows) else f"{'torch s':>10}{'ratio':>7}")
        + ("" if before is None else f"{'before s':>10}{'ratio':>7}"),
    ]
    for row in rows:
        t, share = row.timing, row.share_of_peak
        line = (
            f"{row.name:<12}{row.compile_seconds:>10.1f}{t.median:>10.4f}"
            f"{f'{t.lowest:.4f}-{t.highest:.4f}':>17}{row.frames_per_second:>10.1f}"
            f"{row.flop / 1e12:>9.3f}{row.flop_per_second / 1e12:>9.2f}"
            f"{'-' if share is None else f'{share:.1%}':>9}"
            f"{row.device_bytes / 2**30:>11.2f}{row.host_bytes / 2**30:>9.2f}"
        )
        if row.other is not None and row.ratio is not None:
            line += f"{row.other.median:>10.4f}{row.ratio:>7.2f}"
        if before is not None:
            line += against(before.get(row.name), t.median)
        lines.append(line)
    return "\n".join([*lines, *(f"{row.name}: {row.note}" for row in rows)])


def _compared(rows: Sequence[Measured]) -> bool:
    return any(row.other is not None for row in rows)


def against(before: float | None, now: float) -> str:
    """Two columns: what it was, and the ratio; dashes where it is not known."""
    return f"{'-':>10}{'-':>7}" if before is None else f"{before:>10.4f}{now / before:>7.2f}"


def save(path: Path, conditions: Conditions, rows: Sequence[Any]) -> None:
    """Writes a report that `read` reads.

    Args:
      rows: dataclasses with `name` and `timing`.

    Raises:
      OSError: the file cannot be written.
    """
    write_json(path, {"format": FORMAT, **asdict(conditions), "rows": [asdict(row) for row in rows]})


def read(path: Path) -> dict[str, Any]:
    """An earlier report's content, with its `path`.

    Raises:
      UserError: the file is no report.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a report of keysync bench ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a report of keysync bench in the format {FORMAT}")
    return {**content, "path": path}


def check(earlier: dict[str, Any], conditions: Conditions) -> None:
    """Refuses an earlier report (`read`) that was measured under other conditions than these.

    Raises:
      UserError: it was.
    """
    for name, now in asdict(conditions).items():
        if name != "versions" and earlier.get(name) != now:
            raise UserError(
                f"{earlier['path']}: was measured with {name} {earlier.get(name)}, this run with {now}"
            )


def comparable(earlier: dict[str, Any] | None, rows: Sequence[Any]) -> dict[str, float] | None:
    """Median seconds of an earlier report for those of these rows that are of the same work; None of none."""
    if earlier is None:
        return None
    notes = {row.name: row.note for row in rows}
    same = [row for row in earlier["rows"] if row["timing"] and notes.get(row["name"]) == row["note"]]
    return {row["name"]: row["timing"]["median"] for row in same}
