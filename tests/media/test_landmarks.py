"""Landmark files, bridging of gaps, detectors and their model files."""

import dataclasses
import hashlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.media import assets
from keysync_jax.media.assets import ASSETS, cache_folder, resolve_asset
from keysync_jax.media.detectors import FaceAlignmentDetector, MediaPipeDetector, make_detector
from keysync_jax.media.landmarks import bridge, bridge_each, detect_all, load_landmarks, save_landmarks
from keysync_jax.media.timeline import Timeline
from keysync_jax.media.video import read_frames
from tests.clips import face_landmarks


def some_landmarks(frames: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 100, (frames, 68, 2)).astype(np.float32)


def test_saved_landmarks_are_read_back(tmp_path: Path) -> None:
    landmarks = some_landmarks(7)
    landmarks[3] = np.nan
    landmarks[5, 10, 0] = np.nan  # One missing point makes a missing face.
    save_landmarks(tmp_path / "face.npy", landmarks)
    read = load_landmarks(tmp_path / "face.npy", 7)
    assert read.dtype == np.float32
    landmarks[5] = np.nan
    np.testing.assert_array_equal(read, landmarks)
    assert [path.name for path in tmp_path.iterdir()] == ["face.npy"]


def test_landmarks_of_the_source_frames_follow_the_timeline(tmp_path: Path) -> None:
    landmarks = some_landmarks(6)
    np.save(tmp_path / "face.npy", landmarks.astype(np.float64))
    timeline = Timeline(np.array([0, 1, 3, 5]), tuple(range(6)))
    np.testing.assert_array_equal(load_landmarks(tmp_path / "face.npy", 4, timeline), landmarks[[0, 1, 3, 5]])
    np.testing.assert_array_equal(load_landmarks(tmp_path / "face.npy", 6), landmarks)


def test_bad_landmark_files(tmp_path: Path) -> None:
    def saved(name: str, array: np.ndarray, **how: bool) -> Path:
        np.save(tmp_path / name, array, **how)
        return tmp_path / name

    text = tmp_path / "text.npy"
    text.write_text("68 points")
    cut = tmp_path / "cut.npy"
    cut.write_bytes(saved("whole.npy", some_landmarks(5)).read_bytes()[:400])
    np.savez(tmp_path / "many.npz", some_landmarks(5))
    infinite = some_landmarks(5)
    infinite[0, 0, 0] = np.inf
    cases = {
        tmp_path / "nothing.npy": "does not exist",
        tmp_path: "cannot read",
        text: "cannot read",
        cut: "cannot read",
        saved("objects.npy", np.array([{}, 1], object), allow_pickle=True): "cannot read",
        tmp_path / "many.npz": "one array of numbers",
        saved("words.npy", np.array(["face"] * 5)): "one array of numbers",
        saved("three.npy", np.zeros((5, 68, 3))): r"shape \[5, 68, 3\]",
        saved("flat.npy", np.zeros((5, 136))): r"shape \[5, 136\]",
        saved("longer.npy", some_landmarks(6)): "6 frames, but the video has 5",
        saved("infinite.npy", infinite): "infinite",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            load_landmarks(path, 5)
        assert str(path) in str(raised.value)


def test_gaps_are_bridged_and_long_ones_are_absent() -> None:
    landmarks = np.zeros((20, 68, 2), np.float32) + np.arange(20, dtype=np.float32)[:, None, None]
    expected = landmarks.copy()
    landmarks[[0, 1, 5, 6, 7, 10, 11, 12, 13, 19]] = np.nan
    expected[:2], expected[19] = 2, 18
    filled, present = bridge(landmarks, max_gap=3)
    np.testing.assert_allclose(filled, expected)
    assert filled.dtype == np.float32
    assert np.flatnonzero(~present).tolist() == [10, 11, 12, 13]
    assert np.flatnonzero(~bridge(landmarks, max_gap=1)[1]).tolist() == [0, 1, 5, 6, 7, 10, 11, 12, 13]


@pytest.mark.parametrize("most", [40, 10, 0])
def test_a_stream_is_bridged_as_the_whole_is(most: int) -> None:
    draw = np.random.default_rng(0)
    landmarks = draw.normal(200, 50, (90, 68, 2)).astype(np.float32)
    for start, stop in ((0, 3), (10, 11), (20, 32), (33, 46), (60, 61), (80, 90)):
        landmarks[start:stop] = np.nan
    taken = iter(enumerate(landmarks))
    found = list(bridge_each(taken, most))
    filled, present = bridge(landmarks)
    # As far as the first gap that is too long to hold; the rest is taken, but not yielded.
    assert len(found) == {40: 90, 10: 20, 0: 0}[most]
    assert next(taken, None) is None
    assert [item for item, _, _ in found] == list(range(len(found)))
    for item, row, here in found:
        np.testing.assert_array_equal(row, filled[item])
        assert here == present[item]
    assert not list(bridge_each(enumerate(landmarks[:3]), most))


def test_what_follows_a_face_is_needed_only_where_there_is_none() -> None:
    landmarks = face_landmarks(6)
    landmarks[2:4] = np.nan
    taken: list[int] = []

    def rows() -> Iterator[tuple[int, np.ndarray]]:
        for i, row in enumerate(landmarks):
            taken.append(i)
            yield i, row

    assert [(item, taken[-1]) for item, _, _ in bridge_each(rows(), 9)] == [
        (0, 0), (1, 1), (2, 4), (3, 4), (4, 4), (5, 5),
    ]  # fmt: skip


def test_bridging_leaves_found_faces_alone() -> None:
    landmarks = some_landmarks(9)
    filled, present = bridge(landmarks)
    np.testing.assert_array_equal(filled, landmarks)
    assert present.all()
    with pytest.raises(UserError, match="no face"):
        bridge(np.full((9, 68, 2), np.nan, np.float32))


def test_detect_all_marks_frames_without_a_face() -> None:
    class EveryOther:
        calls = 0

        def detect(self, frame: np.ndarray) -> np.ndarray | None:
            self.calls += 1
            return None if self.calls % 2 else np.full((68, 2), frame.mean(), np.float32)

    seen: list[int] = []
    frames = (np.full((4, 4, 3), i, np.uint8) for i in range(4))
    found = detect_all(frames, EveryOther(), seen.append)
    assert found.dtype == np.float32
    assert found[:, 0, 0].tolist()[1::2] == [1, 3]
    assert np.isnan(found[::2]).all()
    assert seen == [1, 1, 1, 1]
    assert detect_all([], EveryOther()).shape == (0, 68, 2)


@pytest.fixture
def tiny_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An asset "tiny" whose official address is a file here; returns that file."""
    source = tmp_path / "official" / "tiny.bin"
    source.parent.mkdir()
    source.write_bytes(b"weights" * 1000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(ASSETS, "tiny", assets.Asset("a tiny model", source.as_uri(), digest))
    monkeypatch.setenv("KEYSYNC_CACHE", str(tmp_path / "cache"))
    return source


def test_assets_are_fetched_only_when_allowed(tiny_asset: Path) -> None:
    cached = cache_folder() / "tiny.bin"
    with pytest.raises(UserError, match="--allow-download") as raised:
        resolve_asset("tiny")
    assert str(cached) in str(raised.value)
    assert not cache_folder().exists()
    assert resolve_asset("tiny", allow_download=True) == cached
    assert cached.read_bytes() == tiny_asset.read_bytes()
    assert list(cache_folder().iterdir()) == [cached]
    tiny_asset.unlink()
    assert resolve_asset("tiny") == cached


def test_damaged_assets_are_refused(tiny_asset: Path) -> None:
    cached = resolve_asset("tiny", allow_download=True)
    cached.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        resolve_asset("tiny")
    resolve_asset("tiny", allow_download=True)
    assert cached.read_bytes() == tiny_asset.read_bytes()
    cached.unlink()
    tiny_asset.write_bytes(b"something else")
    with pytest.raises(UserError, match="SHA-256"):
        resolve_asset("tiny", allow_download=True)
    tiny_asset.unlink()
    with pytest.raises(UserError, match="cannot fetch"):
        resolve_asset("tiny", allow_download=True)
    assert list(cache_folder().iterdir()) == []


def test_an_explicit_path_only_has_to_exist(tiny_asset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(b"another version")
    assert resolve_asset("tiny", other) == other
    with pytest.raises(UserError, match=r"missing\.bin"):
        resolve_asset("tiny", tmp_path / "missing.bin", allow_download=True)


def test_unknown_detector() -> None:
    with pytest.raises(UserError, match="mediapipe, face_alignment"):
        make_detector("dlib")


def test_face_alignment_takes_no_model_file() -> None:
    with pytest.raises(UserError, match=r"model\.task: the face_alignment detector takes no model file"):
        make_detector("face_alignment", Path("model.task"))


@pytest.fixture
def fake_face_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the package with its 1.5 interface, whose network returns what `faces` holds."""
    torch = pytest.importorskip("torch")

    class FaceAlignment:
        def __init__(self, kind: int, device: str, flip_input: bool, compile: bool = True) -> None:
            package.made = (kind, flip_input, compile)

        def get_landmarks_from_image(self, image: np.ndarray, return_bboxes: bool = False) -> tuple:
            assert image.flags.c_contiguous
            assert return_bboxes
            return package.faces

    package = types.ModuleType("face_alignment")
    package.__version__ = "1.5.0"
    package.LandmarksType = types.SimpleNamespace(TWO_D=1)
    package.FaceAlignment = FaceAlignment
    folder = "https://www.adrianbulat.com/downloads/python-fan/"
    package.api = types.SimpleNamespace(models_urls={"2DFAN-4": folder + "2DFAN4-11f355bf06.pth.tar"})
    sfd = types.ModuleType("face_alignment.detection.sfd")
    sfd.sfd_detector = types.SimpleNamespace(models_urls={"s3fd": folder + "s3fd-619a316812.pth"})
    monkeypatch.setitem(sys.modules, "face_alignment", package)
    monkeypatch.setitem(sys.modules, "face_alignment.detection", types.ModuleType("face_alignment.detection"))
    monkeypatch.setitem(sys.modules, "face_alignment.detection.sfd", sfd)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return package


def put_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    for name in ("s3fd", "2dfan4"):
        content = name.encode()
        (folder / ASSETS[name].file_name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(ASSETS, name, dataclasses.replace(ASSETS[name], sha256=digest))


def test_face_alignment_takes_the_largest_face(
    fake_face_alignment: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_weights(tmp_path / "hub" / "checkpoints", monkeypatch)
    detector = make_detector("face_alignment")
    assert fake_face_alignment.made == (1, False, False)
    points = [np.full((68, 2), float(i)) for i in range(3)]
    boxes = [np.array([0, 0, 9, 9, 0.9]), np.array([50, 50, 90, 80, 0.6]), np.array([0, 0, 1, 99, 1.0])]
    fake_face_alignment.faces = (points, None, boxes)
    found = detector.detect(np.zeros((100, 100, 3), np.uint8)[:, ::2])
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, points[1])
    fake_face_alignment.faces = (None, None, None)
    assert detector.detect(np.zeros((100, 100, 3), np.uint8)) is None


def test_face_alignment_never_fetches_by_itself(
    fake_face_alignment: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="S3FD face detector is missing"):
        FaceAlignmentDetector()
    put_weights(tmp_path / "hub" / "checkpoints", monkeypatch)
    fake_face_alignment.api.models_urls = {"2DFAN-4": "https://elsewhere/2DFAN4-0123456789.zip"}
    with pytest.raises(UserError, match="not known here"):
        FaceAlignmentDetector()
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(UserError, match=r"needs face_alignment.*pip install 'keysync_jax\[face-alignment\]'"):
        FaceAlignmentDetector()


def test_a_file_that_is_no_face_landmarker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mediapipe")
    (tmp_path / "model.task").write_bytes(b"no model" * 100)
    with pytest.raises(UserError, match=r"model\.task is not a Face Landmarker model"):
        MediaPipeDetector(tmp_path / "model.task")
    assert capfd.readouterr().err == ""


@pytest.fixture
def face_landmarker(real: Path) -> Callable[[], MediaPipeDetector]:
    pytest.importorskip("mediapipe")
    return lambda: MediaPipeDetector(real / "face_landmarker.task")


def test_mediapipe_follows_the_face_of_the_real_clip(
    real: Path, face_landmarker: Callable[[], MediaPipeDetector], capfd: pytest.CaptureFixture[str]
) -> None:
    reference = np.load(real / "demo1_landmarks.npy")
    # In 15 of these frames the model alone, shown the whole frame, finds nothing.
    frames = itertools.islice(read_frames(real / "demo1_video.mp4"), 125, 160)
    found = detect_all(frames, face_landmarker())
    assert not np.isnan(found).any()
    assert capfd.readouterr().err == ""
    distance = np.linalg.norm(found - reference[125:160], axis=-1)
    assert distance.mean() < 4
    assert distance.mean(axis=1).max() < 8


@pytest.mark.parametrize("sides", [(500, 350), (350, 500)])
def test_mediapipe_takes_the_largest_face(
    real: Path, face_landmarker: Callable[[], MediaPipeDetector], sides: tuple[int, int]
) -> None:
    face = next(read_frames(real / "demo1_video.mp4"))[500:1000, 350:850]
    canvas = np.full((520, 1000, 3), 90, np.uint8)
    for side, left in zip(sides, (10, sides[0] + 30), strict=True):
        canvas[10 : 10 + side, left : left + side] = cv2.resize(face, (side, side))
    found = face_landmarker().detect(canvas)
    assert found is not None
    assert (found[:, 0].mean() < sides[0]) == (sides[0] == 500)


def test_mediapipe_finds_small_faces_and_keeps_to_them(
    real: Path, face_landmarker: Callable[[], MediaPipeDetector]
) -> None:
    reference = np.load(real / "demo1_landmarks.npy")[0]
    frame = next(read_frames(real / "demo1_video.mp4"))
    face = frame[500:1000, 350:850]
    canvas = np.full((1080, 1920, 3), 90, np.uint8)
    canvas[700:850, 200:350] = cv2.resize(face, (150, 150), interpolation=cv2.INTER_AREA)
    small = (reference - [350, 500]) * 0.3 + [200, 700]
    detector = face_landmarker()
    found = detector.detect(canvas)
    assert found is not None
    assert np.linalg.norm(found - small, axis=-1).mean() < 3
    # A larger face does not take over while the first is followed, but a new search prefers it.
    canvas[100:600, 1200:1700] = face
    large = reference - [350, 500] + [1200, 100]
    assert np.linalg.norm(detector.detect(canvas) - small, axis=-1).mean() < 3
    assert np.linalg.norm(face_landmarker().detect(canvas) - large, axis=-1).mean() < 10
    assert detector.detect(np.full((1080, 1920, 3), 90, np.uint8)) is None
    assert np.linalg.norm(detector.detect(canvas) - small, axis=-1).mean() < 3
