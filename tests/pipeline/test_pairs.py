"""Many dubs in one run: what a list may say, one bad pair among good ones, and what is not made again."""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.media.writer import VideoWriter
from keysync_jax.model import DEFAULT, Model, components, open_model
from keysync_jax.pipeline import pairs as pairs_module
from keysync_jax.pipeline.dub import DubSettings, dub
from keysync_jax.pipeline.pairs import Outcome, dub_pairs, read_pairs
from keysync_jax.pipeline.phases import Phases
from keysync_jax.pipeline.report import DubReport, warned
from tests.clips import face_landmarks, write_video, write_voice

FRAMES = 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video, its landmarks and two voices."""
    folder = tmp_path_factory.mktemp("clip")
    write_voice(folder / "voice.wav", 0.6)
    write_voice(folder / "other.wav", 0.7)
    write_video(folder / "video.mp4", FRAMES)
    landmarks = face_landmarks(FRAMES)
    landmarks[:14] = np.nan  # More than is bridged.
    np.save(folder / "landmarks.npy", landmarks)
    return folder


def write_list(folder: Path, *lines: str) -> Path:
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def place(clip: Path, tmp_path: Path, *lines: str) -> Path:
    """A list beside a copy of the clip."""
    shutil.copytree(clip, tmp_path / "clip")
    return write_list(tmp_path / "clip", *lines)


def read(folder: Path, *lines: str) -> list[pairs_module.Pair]:
    return read_pairs(write_list(folder, *lines), folder / "dubs", DubSettings(seed=3))


def test_what_a_list_says(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        "video,voice,out,landmarks,occluder,identity,seed,steps,quality",
        "a b.mp4,sub/v.wav,,points.npy,masks.npz,face.png,7,12,20",
        "../c.mov,v.wav,x/y.mkv,mediapipe,,random,,,",
    )
    assert (first.video, first.voice) == (tmp_path / "a b.mp4", tmp_path / "sub/v.wav")
    assert first.output == tmp_path / "dubs/a b-v.mp4"
    assert first.report == tmp_path / "dubs/a b-v.json"
    assert first.settings == DubSettings(
        landmarks=str(tmp_path / "points.npy"),
        occluder=tmp_path / "masks.npz",
        identity=str(tmp_path / "face.png"),
        seed=7,
        steps=12,
        quality=20,
    )
    assert second.output == tmp_path / "dubs/x/y.mkv"
    assert second.settings == DubSettings(seed=3, identity="random")
    assert [pair.line for pair in (first, second)] == [2, 3]


HEAD = "video,voice,out"
REFUSED = {
    "empty": ([""], "has no column 'video'"),
    "no pair": ([HEAD], "lists no pair"),
    "unknown column": (["video,voice,output"], "has the column 'output'; known are video, voice, out"),
    "column twice": (["video,voice,voice"], "has the column 'voice'"),
    "no voice": ([HEAD, "a.mp4,,x.mp4"], "line 2: names no voice"),
    "too many": ([HEAD, "a.mp4,v.wav,x.mp4,y"], "line 2: has more or fewer fields"),
    "too few": ([HEAD, "a.mp4"], "line 2: has more or fewer fields"),
    "a number": (["video,voice,seed", "a.mp4,v.wav,x"], "line 2: seed is a whole number, not 'x'"),
    "quality": (["video,voice,quality", "a.mp4,v.wav,99"], "line 2: the quality is 0"),
    "absolute": ([HEAD, "a.mp4,v.wav,/tmp/x.mp4"], "line 2: out is a name, or a path below the folder"),
    "above": ([HEAD, "a.mp4,v.wav,../x.mp4"], "no part of out begins with a dot"),
    "above, later": ([HEAD, "a.mp4,v.wav,x/../../x.mp4"], "no part of out begins with a dot"),
    "hidden": ([HEAD, "a.mp4,v.wav,.x.mp4"], "no part of out begins with a dot"),
    "backslash": ([HEAD, "a.mp4,v.wav,..\\x.mp4"], "out is a name, or a path below"),
    "line feed": ([HEAD, 'a.mp4,v.wav,"x\n.mp4"'], "out is a name, or a path below"),
    "suffix": ([HEAD, "a.mp4,v.wav,x.exe"], "out ends in one of .mp4"),
    "summary": ([HEAD, "a.mp4,v.wav,pairs.mp4"], "whose report would be in the place of the list's"),
    "twice": ([HEAD, "a.mp4,v.wav,x.mp4", "b.mp4,v.wav,X.mkv"], "X.mkv is that of line 2 already"),
    "an input": ([HEAD, "dubs/x.mp4,v.wav,x.mp4"], "would be in the place of an input"),
    "link": ([HEAD, "a.mp4,v.wav,link/x.mp4"], "leads out of the folder"),
    "no text": (["video,voice", "\x00a,b"], "line contains NUL|names no|list of pairs cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_list_that_cannot_be_used_is_refused_whole(tmp_path: Path, case: str) -> None:
    lines, sentence = REFUSED[case]
    (tmp_path / "dubs").mkdir()
    (tmp_path / "dubs" / "link").symlink_to(tmp_path)
    if case == "no text":
        (tmp_path / "list.csv").write_bytes(b"video,voice\n\xff\xfe,b\n")
        with pytest.raises(UserError, match="this list of pairs cannot be read"):
            read_pairs(tmp_path / "list.csv", tmp_path / "dubs", DubSettings())
        return
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, *lines)


def test_a_bad_pair_is_told_and_the_rest_done_once(
    clip: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = place(
        clip,
        tmp_path,
        "video,voice,out,landmarks",
        "video.mp4,voice.wav,one.mp4,landmarks.npy",
        "video.mp4,nothing.wav,two.mp4,landmarks.npy",
        "video.mp4,other.wav,sub/three.mp4,landmarks.npy",
    )
    dubs = tmp_path / "dubs"
    loads: list[str] = []
    load = Model.load

    def counted(model: Model, component: str, dtype: str = "fp32") -> object:
        loads.append(component)
        return load(model, component, dtype)

    frames: list[str] = []
    write = VideoWriter.write

    def kept(writer: VideoWriter, frame: np.ndarray) -> None:
        frames.append(hashlib.sha256(frame.tobytes()).hexdigest())
        write(writer, frame)

    monkeypatch.setattr(Model, "load", counted)
    monkeypatch.setattr(VideoWriter, "write", kept)
    command = ["dub", "--pairs", str(listed), "-o", str(dubs), "--model", str(tiny_model)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "2 dubbed, 0 were there, 1 failed" in printed
    assert "failed     line 3:" in printed
    assert sorted(loads) == sorted(components(open_model(tiny_model).config))  # Once for all pairs.
    summary = json.loads((dubs / "pairs.json").read_bytes())
    assert [pair["state"] for pair in summary] == ["done", "failed", "done"]
    assert "nothing.wav" in summary[1]["reason"]
    report = json.loads((dubs / "one.json").read_bytes())
    assert report["made_from"]["video"] == sha256_of(clip / "video.mp4")
    assert report["made_from"]["model"] == open_model(tiny_model).fingerprint
    assert report["undubbed"] == [{"first": 0, "frames": 14, "why": "no face was found"}]
    assert report["frames"] == 15
    assert [phase["name"] for phase in report["phases"]][-1] == "compose"
    later = json.loads((dubs / "sub/three.json").read_bytes())
    assert sum(phase["compiled"] for phase in later["phases"]) == 0  # The programs are those of the first.

    # Alone it is the same dub.
    first = frames[:15]
    frames.clear()
    settings = DubSettings(landmarks=str(clip / "landmarks.npy"))
    dub(clip / "video.mp4", clip / "voice.wav", tmp_path / "alone.mp4", tiny_model, settings)
    assert frames == first
    monkeypatch.undo()

    # The bad one is repaired, the others stay.
    shutil.copy(clip / "voice.wav", tmp_path / "clip/nothing.wav")
    before = (dubs / "one.mp4").stat().st_mtime_ns
    assert main(command) == 0
    assert "1 dubbed, 2 were there, 0 failed" in capsys.readouterr().out
    assert (dubs / "one.mp4").stat().st_mtime_ns == before


def fake(request: str = "r") -> Model:
    """A model of which only the name counts."""
    opened = open_model(DEFAULT)
    return Model(opened.folder, opened.config, {**opened.hashes, "x": request})


@dataclass
class Dubs:
    """`dub`, which writes a name."""

    made: list[str]

    def __call__(
        self, video: Path, voice: Path, output: Path, model: Model, settings: DubSettings, told: None
    ) -> DubReport:
        if video.name == "strange.mp4":
            raise ValueError("nobody thought of this")
        if video.name == "full.mp4":
            raise OSError(28, "No space left on device", str(output))
        self.made.append(output.name)
        output.write_text(f"{video.name} {settings.seed}")
        return DubReport(output, 1, 0, Phases(show=False))


@pytest.fixture
def dubs(monkeypatch: pytest.MonkeyPatch) -> Dubs:
    found = Dubs([])
    monkeypatch.setattr(pairs_module, "dub", found)
    monkeypatch.setattr(pairs_module, "loaded_for", lambda model, _: model)
    return found


def two(folder: Path, first: str = "a.mp4") -> list[pairs_module.Pair]:
    for name in (first, "b.mp4", "v.wav", "p.npy"):
        (folder / name).write_bytes(name.encode())
    return read(folder, "video,voice,landmarks", f"{first},v.wav,p.npy", "b.mp4,v.wav,p.npy")


def states(outcomes: tuple[Outcome, ...]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def test_a_pair_is_known_by_what_it_is_made_from(tmp_path: Path, dubs: Dubs) -> None:
    pairs, folder = two(tmp_path), tmp_path / "dubs"
    assert states(dub_pairs(pairs, folder, fake()).outcomes) == ["done", "done"]
    assert states(dub_pairs(pairs, folder, fake()).outcomes) == ["kept", "kept"]
    (tmp_path / "b.mp4").write_bytes(b"another video")
    assert states(dub_pairs(pairs, folder, fake()).outcomes) == ["kept", "done"]
    (tmp_path / "p.npy").write_bytes(b"other landmarks")
    assert states(dub_pairs(pairs, folder, fake()).outcomes) == ["done", "done"]
    pairs[0].output.write_bytes(b"half a file")
    assert states(dub_pairs(pairs, folder, fake()).outcomes) == ["done", "kept"]
    pairs[1].report.unlink()
    assert states(dub_pairs(pairs, folder, fake()).outcomes) == ["kept", "done"]
    faster = [replace(pair, settings=replace(pair.settings, memory="fast")) for pair in pairs]
    assert states(dub_pairs(faster, folder, fake()).outcomes) == ["kept", "kept"]
    better = [replace(pair, settings=replace(pair.settings, quality=1)) for pair in pairs]
    assert states(dub_pairs(better, folder, fake()).outcomes) == ["done", "done"]
    assert states(dub_pairs(better, folder, fake("another model")).outcomes) == ["done", "done"]


def test_a_defect_is_one_pairs_and_a_full_disk_is_none(tmp_path: Path, dubs: Dubs) -> None:
    folder = tmp_path / "dubs"
    report = dub_pairs(two(tmp_path, "strange.mp4"), folder, fake())
    assert states(report.outcomes) == ["failed", "done"]
    assert "unexpected ValueError: nobody thought of this" in report.table()
    with pytest.raises(OSError, match="No space left"):
        dub_pairs(two(tmp_path, "full.mp4"), folder, fake())
    assert json.loads((folder / "pairs.json").read_bytes()) == []


def test_one_dub_can_have_a_report(
    clip: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    video, voice, output = (
        str(path) for path in (clip / "video.mp4", clip / "voice.wav", tmp_path / "o.mp4")
    )
    command = ["dub", video, voice, "-o", output, "--model", str(tiny_model)]
    for report in (video, output, str(tmp_path), str(tmp_path / "no/report.json")):
        assert main([*command, "--report", report]) == 2
        assert "cannot write" in capsys.readouterr().err
    assert main([*command, "--pairs", "list.csv"]) == 2
    assert main(["dub", video, "-o", output, "--model", str(tiny_model)]) == 2
    assert "dub takes VIDEO and AUDIO" in capsys.readouterr().err
    report = tmp_path / "report.json"
    landmarks = ["--landmarks", str(clip / "landmarks.npy")]
    assert main([*command, *landmarks, "--report", str(report)]) == 0
    content = json.loads(report.read_bytes())
    assert content["output"] == {"file": "o.mp4", "sha256": sha256_of(Path(output))}
    assert content["settings"]["landmarks"] == landmarks[1]
    assert content["warnings"] == []


def test_warnings_are_kept_and_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("keysync_jax.media.video")
    with warned() as found:
        for _ in range(2):
            log.warning("the clock was set anew")
        log.info("nothing")
    assert found == ["the clock was set anew"]
    log.warning("after it")
    assert found == ["the clock was set anew"]
