"""`bench --report`: which commands are run, what is kept of them, and the tables."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from keysync_jax.bench import everything, report
from keysync_jax.bench.dubbing import Dubbed
from keysync_jax.bench.everything import Plan, parts_of, run
from keysync_jax.bench.measure import Measured, Timing
from keysync_jax.bench.tables import markdown
from keysync_jax.bench.training import Trained
from keysync_jax.cli import main
from keysync_jax.errors import UserError

HERE = {"platform": "cpu", "device": "cpu", "devices": 1, "versions": {"jax": "0"}}
TIMING = Timing(0.5, 0.4, 0.6, 3)
ROWS: dict[str, list[Any]] = {
    "networks": [Measured("unet", "14 frames", 1.5, TIMING, 14, 10**12, 4e12, 2**30, 2**31)],
    "train": [
        Trained("as it is", "2 clips", "cpu", 1, 9.0, TIMING, 2, 10**12, 4e12, 2**30, 2**31, 3 * 2**30),
        Trained("remat=none", "2 clips", "cpu", 1, fault="does not fit: 90 GiB"),
    ],
    "dub": [
        Dubbed("dub encode", "50 frames", 2.0, TIMING, 50, {"device": 0.3, "decoder": 0.1}),
        Dubbed("dub", "50 frames", 2.0, TIMING, 50),
    ],
}
PARITY = "Golden numbers tiny, fp32:\n\n| | entries |\n| --- | --- |\n| network | 2 |\n\n2 of 2 entries.\n"


class Commands:
    """Stands for the commands' processes: what each was asked, and the figures that it would write."""

    def __init__(self, failing: str = "", slow: str = ""):
        self.asked: list[str] = []
        self.failing, self.slow = failing, slow

    def run(self, command: list[str], cwd: Path, timeout: float, **_: object) -> Any:
        assert timeout > 0
        arguments = command[3:]
        self.asked.append(name := Path(arguments[-1]).stem)
        if name == self.slow:
            raise subprocess.TimeoutExpired(command, timeout)
        if name == self.failing:
            return subprocess.CompletedProcess(command, 2, "", "trace\nkeysync: the device is too small\n")
        if arguments[0] == "parity":
            (cwd / name).mkdir()
            (cwd / name / "report.md").write_text(PARITY)
        else:
            conditions = report.Conditions("tiny", "bf16", 1, "cpu", 2, {})
            report.save(cwd / arguments[-1], conditions, ROWS[name.partition("-")[0]])
        return subprocess.CompletedProcess(command, 0, f"table of {name}\n", "")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found = Commands()
    monkeypatch.setattr(everything, "_asked_apart", lambda: HERE)
    monkeypatch.setattr(everything.subprocess, "run", lambda *a, **k: found.run(*a, **k))
    return found


def test_every_part_of_a_plan_is_a_command_that_the_parser_knows() -> None:
    from keysync_jax.cli import _parser

    parts = parts_of(Plan("mid", 2, 3, "tests/golden/tiny"), "mid")
    names = [part.name for part in parts]
    assert names[:8] == [
        *(f"networks-bf16-{part}" for part in ("unet", "vae", "sampler", "audio")),
        *("golden-fp32", "golden-bf16", "train-bf16", "dub-bf16"),
    ]
    assert names[8] == "train-bf16-remat=none"
    assert len(set(names)) == len(names)
    for part in parts:
        _parser().parse_args(part.arguments)
    assert parts[6].command == (
        "keysync bench train --vary --size mid --dtype bf16 --batch 2 --repeats 3 --json train-bf16.json"
    )
    alone = _parser().parse_args(parts[8].arguments)
    assert (alone.vary, alone.set) == ([], ["remat=none"])


def test_a_report_has_a_table_of_each_part(commands: Commands, tmp_path: Path) -> None:
    said: list[str] = []
    assert run(tmp_path / "out", Plan(golden="tests/golden/tiny"), 60, said.append) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# 1 x cpu, size tiny\n\njax 0. Every command")
    for line in (
        "keysync bench unet --size tiny --dtype bf16 --json networks-bf16-unet.json",
        "keysync bench sampler --size tiny --dtype bf16 --json networks-bf16-sampler.json",
        "| unet | 1.5 | 0.5000 | 0.4000-0.6000 | 28.0 | 1 | 2 | 50.0% | 1.00 |",
        "| as it is | 9 | 0.500 | 4.00 | 2 | 50.0% | 1.00 | 2.00 | 3.00 |",
        "| remat=none | does not fit: 90 GiB |  |  |  |  |  |  |  |",
        "| encode | 2.0 | 0.50 | 0.40-0.60 | 100.0 | 0.30 / 0.20 | 0.10 / 0.40 |  |",
        "| network | 2 |",
    ):
        assert f"\n{line}\n" in text
    assert "table of networks-bf16-unet" in said
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [part["state"] for part in content["parts"]] == ["done"] * 18
    assert content["parts"][0]["figures"]["rows"][0]["timing"] == asdict(TIMING)


def test_what_failed_or_took_too_long_is_done_by_the_next_call(commands: Commands, tmp_path: Path) -> None:
    commands.failing, commands.slow = "train-bf16", "dub-bf16"
    said: list[str] = []
    assert run(tmp_path / "out", Plan(), 60, said.append) == 1
    assert "train-bf16: failed: keysync: the device is too small" in said
    assert "not measured: train-bf16, dub-bf16; the same command goes on with them" in said
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Not measured: train-bf16: keysync: the device is too small." in text
    assert "Not measured: dub-bf16: did not end within" in text
    commands.failing = commands.slow = ""
    commands.asked.clear()
    assert run(tmp_path / "out", Plan(), 60, said.append) == 0
    assert commands.asked == ["train-bf16", "dub-bf16"]
    assert "Not measured" not in (tmp_path / "out" / "report.md").read_text()


def test_without_time_nothing_is_begun_and_all_is_listed(commands: Commands, tmp_path: Path) -> None:
    assert run(tmp_path / "out", Plan(), 0, lambda _: None) == 0
    assert commands.asked == []
    assert (tmp_path / "out" / "report.md").read_text().count(": the time was up.") == 16


def test_a_folder_of_another_plan_is_refused(commands: Commands, tmp_path: Path) -> None:
    run(tmp_path / "out", Plan(), 0, lambda _: None)
    with pytest.raises(UserError, match="holds a report of another plan"):
        run(tmp_path / "out", Plan(size="mid"), 0, lambda _: None)


def test_a_report_takes_no_parts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "unet", "--report", str(tmp_path / "out")]) == 2
    assert "--report measures everything" in capsys.readouterr().err
    assert main(["bench", "--minutes", "3"]) == 2
    assert "--minutes goes with --report" in capsys.readouterr().err


def test_a_part_without_figures_says_why() -> None:
    part = {
        "name": "dub-bf16",
        "section": "dub-bf16",
        "kind": "dub",
        "command": "keysync bench dub",
        "why": "no time",
        "figures": None,
    }
    assert "Not measured: dub-bf16: no time." in markdown({**HERE, "size": "tiny", "parts": [part]})
