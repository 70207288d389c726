"""Judging commands and folders: the whole way in the synthetic world, failures, what is kept, the report."""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.evaluation.runs import check
from keysync_jax.files import write_json
from keysync_jax.media.video import probe_video
from keysync_jax.media.writer import VideoWriter
from keysync_jax.synthetic.write import SynthSettings, synth
from tests.clips import write_video
from tests.processes import children, hidden_names, is_alive, wait_until

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"

CLIPS, SECONDS = 3, 1.2
METRICS = "mar_std"
FILES = ("report.html", "report.json", "metrics.csv", "table.tex", "table.md", "videos.json", "pairs.csv")

# Copies the video, writes down that it was called; fails where it is told to.
COPY = """
import shutil, sys
from pathlib import Path
calls, bad, video, audio, out, reference = sys.argv[1:]
with open(calls, "a") as file:
    file.write(f"{Path(video).name} {Path(audio).name} {reference}\\n")
if bad and bad in video:
    print("loading ...\\nno face here", file=sys.stderr)
    sys.exit(3)
shutil.copyfile(video, out)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "clips of; $(touch oops)"
    synth(folder, SynthSettings(CLIPS, SECONDS, seed=6_000_011))
    return folder


@pytest.fixture
def copier(tmp_path: Path) -> Path:
    script = tmp_path / "copy.py"
    script.write_text(COPY)
    return script


def command(script: Path, bad: str = "") -> str:
    python = f"{sys.executable} {script} {script.with_suffix('.calls')} '{bad}'"
    return f"{python} {{video}} {{audio}} {{out}} {{reference_index}}"


def evaluate(world: Path, output: Path, *arguments: str, metrics: str = METRICS) -> int:
    given = ["--pairs", str(world), "-o", str(output), "--landmarks", "none", "--metrics", metrics]
    return main(["evaluate", *given, *arguments])


def content(output: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((output / "report.json").read_text())
    return found


def calls(script: Path) -> list[str]:
    log = script.with_suffix(".calls")
    return log.read_text().splitlines() if log.is_file() else []


def test_the_leakage_protocol_of_a_command_is_kept_and_told_the_same_twice(
    world: Path, tmp_path: Path, copier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, system = tmp_path / "out", f"a <b>copy</b> | & 50 %={command(copier)}"
    assert evaluate(world, output, "--system", system, "--protocol", "leakage") == 0
    # Six runs a clip: three voices, with the current frame and with frame 0 as the reference.
    assert len(calls(copier)) == 6 * CLIPS
    assert len(set(calls(copier))) == 6 * CLIPS
    assert {line.split()[-1] for line in calls(copier)} == {"current", "0"}
    assert not hidden_names(output)
    found = content(output)
    rows = {(row["system"], row["reference"]): row for row in found["rows"]}  # type: ignore[attr-defined]
    copied, real = rows["a <b>copy</b> | & 50 %", "CR"], rows["real video", "CR"]
    frozen = rows["frozen mouth", "CR"]
    # A copy is the real video: all of the source's mouth in silence, nothing of a foreign voice.
    assert copied["cells"] == real["cells"]
    assert real["cells"]["AM-CR"]["sync"]["value"] > 0.97
    assert abs(real["cells"]["XM-CR"]["sync"]["value"]) < 0.6
    assert real["leakage"]["sync_s"]["value"] > 0.97
    assert real["leakage"]["gain_s"]["value"] == pytest.approx(1, abs=0.1)
    assert real["leakage"]["lip_leak"]["value"] == pytest.approx(1, abs=1e-3)
    assert real["leakage"]["lsd"]["value"] > 0.4
    assert frozen["leakage"]["lip_leak"]["value"] < 0.1
    assert abs(frozen["leakage"]["gain_s"]["value"]) < 0.05
    before = {name: (output / name).read_bytes() for name in FILES}
    for name in FILES:
        (output / name).unlink()
    assert evaluate(world, output, "--system", system, "--protocol", "leakage") == 0
    assert len(calls(copier)) == 6 * CLIPS
    assert {name: (output / name).read_bytes() for name in FILES} == before
    assert not (Path.cwd() / "oops").exists()
    check_page(before["report.html"].decode())
    assert r"a <b>copy</b> | \& 50 \% (CR)" in before["table.tex"].decode()
    assert r"a <b>copy</b> \| & 50 % (AR)" in before["table.md"].decode()
    assert "sync_S" in capsys.readouterr().out


class Page(HTMLParser):
    """What a page holds: texts, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""
        self.inline: dict[str, str] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        self._open = "data" if given.get("type") == "application/json" else tag
        self.addresses += [given[name] for name in ("src", "href", "style", "onclick") if name in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style", "data"):
            self.inline.setdefault(self._open, data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def check_page(text: str) -> None:
    """It fetches nothing, its policy names its style and script, and no name of a system became a tag."""
    page = Page(text)
    assert page.policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.inline[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "a &lt;b&gt;copy&lt;/b&gt; | &amp; 50 %" in text
    assert "<b>copy" not in text
    assert json.loads(page.inline["data"])["protocol"] == "leakage"
    for section in ("Results", "The leakage plane", "LipLeak_lite against", "The mouth over time", "Stills"):
        assert f"<h2>{section}" in text
    # Six runs of the system, three of each anchor, which knows no reference.
    assert page.tags.count("img") == 12
    assert page.tags.count("svg") > 5


def test_a_clip_that_fails_leaves_all_runs_and_is_tried_again_when_asked(
    world: Path, tmp_path: Path, copier: Path
) -> None:
    output = tmp_path / "out"
    systems = ["--system", f"good={command(copier)}", "--system", f"bad={command(copier, 'clip-00001')}"]
    assert evaluate(world, output, *systems) == 0
    found = content(output)
    failures = found["failures"]
    assert [(f["system"], f["clip"], f["cell"]) for f in failures] == [  # type: ignore[attr-defined]
        ("bad", "clip-00001", "XM"),
        ("bad", "clip-00001", "SI"),
    ]
    assert failures[0]["why"] == "exit code 3: loading ... / no face here"  # type: ignore[index]
    clips = {row["system"]: row["clips"] for row in found["rows"]}  # type: ignore[attr-defined]
    assert clips == {"good": 3, "bad": 2, "real video": 3, "frozen mouth": 3}
    # Systems are compared on the clips that both have.
    assert {one["clips"] for one in found["comparisons"]} == {2}  # type: ignore[attr-defined]
    assert "no face here" in (output / "report.html").read_text()
    count = len(calls(copier))
    assert evaluate(world, output, *systems, "--retry") == 0
    assert len(calls(copier)) == count + 2


def test_a_damaged_clip_is_left_out_and_counted(world: Path, tmp_path: Path, copier: Path) -> None:
    table = tmp_path / "list.csv"
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    lines = ["video,voice,landmarks,truth", "broken.mp4,,,"]
    lines += [f'"{world}/{n}.mp4","{world}/{n}.wav","{world}/{n}.npy","{world}/{n}.truth.npz"'
              for n in ("clip-00000", "clip-00002")]  # fmt: skip
    table.write_text("\n".join(lines) + "\n")
    assert evaluate(table, tmp_path / "out", "--system", f"copy={command(copier)}") == 0
    found = content(tmp_path / "out")
    assert list(found["left_out"]) == ["broken"]  # type: ignore[call-overload]
    assert {row["clips"] for row in found["rows"]} == {2}  # type: ignore[attr-defined]
    assert len(calls(copier)) == 4


def test_a_changed_script_is_another_command(world: Path, tmp_path: Path, copier: Path) -> None:
    """What it is called with may change: a log, as that of the calls."""
    arguments = ["--system", f"copy={command(copier)}", "--protocol", "reconstruction"]
    clip = tmp_path / "one.csv"
    clip.write_text(f'video\n"{world}/clip-00000.mp4"\n')
    for script, count in ((COPY, 1), (COPY, 1), (COPY + "# changed\n", 2)):
        copier.write_text(script)
        assert evaluate(clip, tmp_path / "out", *arguments) == 0
        assert len(calls(copier)) == count


def test_a_folder_of_videos_is_a_system(world: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in (0, 2):
        (videos / f"clip-{number:05d}.mp4").symlink_to(world / f"clip-{number:05d}.mp4")
    arguments = ("--system", f"x={videos}", "--protocol", "reconstruction", "--clips", "1")
    made = []
    for _ in range(2):
        assert evaluate(world, tmp_path / "out", *arguments) == 0
        made.append((tmp_path / "out" / "report.html").read_bytes())
    assert made[0] == made[1]
    # The first clip by all systems beside each other, in the page and as a file.
    (played,) = (tmp_path / "out" / "side_by_side").iterdir()
    info = probe_video(played)
    assert (info.width, info.height) == (3 * 160, 160)
    assert base64.b64encode(played.read_bytes()) in made[0]
    assert b"from the left: x, real video, frozen mouth" in made[0]
    found = content(tmp_path / "out")
    assert [(f["clip"], f["cell"]) for f in found["failures"]] == [("clip-00001", "AM")]  # type: ignore[attr-defined]
    rows = {row["system"]: row for row in found["rows"]}  # type: ignore[attr-defined]
    assert rows["x"]["cells"]["AM"]["sync"]["value"] > 0.97


def test_the_command_of_the_docs_is_judged(world: Path, tmp_path: Path) -> None:
    """Its twenty lines open a mouth with the loudness of the voice."""
    script = tmp_path / "louder.py"
    script.write_text(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)[0])
    assert len(script.read_text().splitlines()) <= 25
    system = f"louder={sys.executable} {script} {{video}} {{audio}} {{landmarks}} {{out}}"
    assert evaluate(world, tmp_path / "out", "--system", system) == 0
    found = content(tmp_path / "out")
    assert found["failures"] == []
    rows = {row["system"]: row for row in found["rows"]}  # type: ignore[attr-defined]
    louder, real = rows["louder"], rows["real video"]
    assert louder["cells"]["XM"]["sync"]["value"] > 0.25 > real["cells"]["XM"]["sync"]["value"]
    assert louder["leakage"]["lip_leak"]["value"] < 0.5 < real["leakage"]["lip_leak"]["value"]


def test_dubs_are_checked(tmp_path: Path) -> None:
    dub = write_video(tmp_path / "dub.mp4", 20)
    assert check(dub, (96, 80), 20, 0) is None
    assert check(dub, (96, 80), 24, 5) is None
    assert check(dub, (96, 80), 26, 5) == "the dub has 20 frames, its voice 26"
    assert check(dub, (96, 96), 20, 0) == "the dub is 96 x 80, the source 96 x 96"
    assert check(tmp_path / "none.mp4", (96, 80), 20, 0) == "the command wrote no video"
    slow = tmp_path / "slow.mp4"
    with VideoWriter(slow, 96, 80, fps=30) as writer:
        for _ in range(24):
            writer.write(np.zeros((80, 96, 3), np.uint8))
    assert check(slow, (96, 80), 20, 0) == "the dub has 30 frames a second; 25 are scored"
    slow.write_bytes(b"text")
    assert "the video that it wrote" in str(check(slow, (96, 80), 20, 0))


SLEEPER = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_ends_with_the_evaluation(world: Path, tmp_path: Path, number: signal.Signals) -> None:
    script, note, output = tmp_path / "sleep.py", tmp_path / "pid", tmp_path / "out"
    script.write_text(SLEEPER)
    system = f"slow={sys.executable} {script} {note} {{video}} {{audio}} {{out}}"
    arguments = ["evaluate", "--pairs", str(world), "-o", str(output), "--landmarks", "none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "keysync_jax.cli", *arguments, "--system", system],
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    wait_until(lambda: note.is_file() and note.read_text(), 60, "the command runs")
    command_id = int(note.read_text())
    assert command_id in children(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    wait_until(lambda: not is_alive(command_id), 10, "the command has ended")
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert b"goes on where this one was" in errors
        assert not [name for name in hidden_names(output) if "partial" in name]
    # What the next call finds is no run: nothing of it was kept.
    assert not list((output / "runs").glob("[0-9a-f]*"))


def test_a_command_that_takes_too_long_has_failed(world: Path, tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text(SLEEPER)
    system = f"slow={sys.executable} {script} {tmp_path / 'pid'} {{video}} {{audio}} {{out}}"
    arguments = ["--system", system, "--protocol", "reconstruction", "--timeout", "0.4"]
    assert evaluate(world, tmp_path / "out", *arguments) == 0
    failures = content(tmp_path / "out")["failures"]
    assert {one["why"] for one in failures} == {"took more than 0.4 s: it printed nothing"}  # type: ignore[attr-defined]
    assert not is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--protocol", "both"], "the protocol is one of"),
        (["--metrics", "beauty"], "there is no metric beauty"),
        (["--weights", "nowhere"], "is no folder of weights"),
        (["--system", "real video=sh {video} {audio} {out}"], "an anchor of that name"),
        (["--slack", "-1"], "--slack is 0 or more"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    output = tmp_path / "out"
    assert main(["evaluate", "--pairs", str(world), "-o", str(output), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_of_something_else_is_left_alone(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "thesis.json", {})
    assert evaluate(world, tmp_path) == 2
    assert "holds no evaluation" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.json"]
