"""Metrics of other projects: absent they are a sentence; present, what they see and what is made of it."""

import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.metrics import libraries, perceptual, registry
from keysync_jax.metrics.catalogue import MEASURES, METRICS, WEIGHTS
from keysync_jax.metrics.libraries import ARCFACE_POINTS, align_face, random_patches, resized
from keysync_jax.metrics.meter import Moment, Record, Subject
from keysync_jax.metrics.registry import Bench, provenance, unavailable

FRAMES = 40


def pictures(seed: int = 0, height: int = 60, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, height, width, 3), dtype=np.uint8)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder in which every file of the libraries' networks seems to be."""
    for name in ("inception", "i3d", "arcface", "alexnet", "lpips_heads"):
        (tmp_path / WEIGHTS[name].file).write_bytes(b"weights")
    (tmp_path / WEIGHTS["clip"].file).mkdir()
    return tmp_path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package seems to be installed."""
    monkeypatch.setattr(registry, "find_spec", lambda name: SimpleNamespace(name=name))


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A package that holds what a test needs of it."""
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


def read(metric: str, weights: Path, subject: Subject, moments: list[Moment]) -> Record:
    reading = Bench([metric], weights).start(subject)
    for moment in moments:
        reading.update(moment)
    return reading.result()


def test_a_package_that_is_absent_is_a_sentence_with_the_command(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    for name, metric in METRICS.items():
        measure = MEASURES[metric.measure]
        if measure.packages:
            expected = f"not available: needs {measure.packages[0]}; get it with "
            assert str(unavailable(name, weights)) == f"{expected}pip install 'keysync_jax[{measure.extra}]'"
    bench = Bench(["topiq", "fid"], weights)
    assert set(bench.missing) == {"topiq", "fid"}
    assert not bench.metrics


def test_a_licence_that_forbids_commercial_use_is_in_the_provenance(weights: Path) -> None:
    restricted = {name for name in METRICS if "licence" in provenance(name, weights)}
    assert restricted == {"csim", "topiq", "hyperiqa"}
    assert len(provenance("fvd", weights)["i3d_torchscript.pt"]) == 64
    (weights / WEIGHTS["clip"].file / "model.safetensors").write_bytes(b"x")
    assert len(provenance("cmmd", weights)["clip-vit-large-patch14-336/model.safetensors"]) == 64
    assert provenance("fid", weights)["torch_fidelity"] == "of an unknown version"
    assert provenance("cmmd", weights)["PIL"][0].isdigit()


@pytest.mark.usefixtures("installed")
def test_fid_keeps_inceptions_features_of_all_frames(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    class Extractor:
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            assert (name, features) == ("inception-v3-compat", ["2048"])
            assert Path(feature_extractor_weights_path).read_bytes() == b"weights"

        def __call__(self, x: Any) -> tuple[Any]:
            assert x.dtype == torch.uint8
            assert x.shape[1:] == (3, 299, 299)
            return (x.float().mean((2, 3)),)

    module(monkeypatch, "torch_fidelity")
    path = "torch_fidelity.feature_extractor_inceptionv3"
    module(monkeypatch, path, FeatureExtractorInceptionV3=Extractor)
    frames = pictures()
    boxes = np.array([[t % 5, 2, t % 5 + 30 + t % 3, 32 + t % 3] for t in range(FRAMES)])
    record = read("fid", weights, Subject(FRAMES, boxes=boxes), [Moment(x) for x in frames])
    expected = [
        resized(x[y0:y1, x0:x1], 299).mean((0, 1)) for x, (x0, y0, x1, y1) in zip(frames, boxes, strict=True)
    ]
    np.testing.assert_allclose(record.series["inception"], expected, rtol=1e-4)
    assert not record.values


@pytest.mark.usefixtures("installed")
def test_cmmd_keeps_clips_embeddings_of_middle_squares(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("PIL.Image")

    class Model:
        @classmethod
        def from_pretrained(cls, folder: Path, local_files_only: bool) -> "Model":
            assert local_files_only
            assert folder == weights / "clip-vit-large-patch14-336"
            return cls()

        def eval(self) -> "Model":
            return self

        def __call__(self, x: Any) -> Any:
            assert x.dtype == torch.float32
            assert x.shape[1:] == (3, 336, 336)
            return SimpleNamespace(image_embeds=x[:, :, ::7, ::5].flatten(1))

    module(monkeypatch, "transformers", CLIPVisionModelWithProjection=Model)
    frames = pictures()[:10]
    record = read("cmmd", weights, Subject(10), [Moment(x) for x in frames])
    square = image.fromarray(frames[3][6:54]).resize((336, 336), image.Resampling.BICUBIC)
    expected = (np.asarray(square) / 255 - libraries.CLIP_MEAN) / libraries.CLIP_STD
    np.testing.assert_allclose(
        record.series["clip"][3], expected.transpose(2, 0, 1)[:, ::7, ::5].ravel(), atol=1e-5
    )
    assert len(record.series["clip"]) == 10


@pytest.mark.usefixtures("installed")
def test_fvd_keeps_features_of_whole_clips_of_sixteen_frames(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    shown = []

    class Detector:
        def eval(self) -> "Detector":
            return self

        def __call__(self, x: Any, rescale: bool, resize: bool, return_features: bool) -> Any:
            assert rescale
            assert resize
            assert return_features
            shown.append(x.numpy())
            return x.mean((3, 4)).flatten(1)

    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: Detector())
    frames = pictures()
    record = read("fvd", weights, Subject(FRAMES), [Moment(x) for x in frames])
    assert record.series["i3d"].shape == (2, 3 * 16)  # 8 frames are left over
    assert shown[1].shape == (1, 3, 16, 224, 224)
    assert shown[1].max() > 200  # 0 to 255: the network scales it
    np.testing.assert_allclose(shown[1][0, :, 2], resized(frames[18], 224).transpose(2, 0, 1))
    short = read("fvd", weights, Subject(15), [Moment(x) for x in frames[:15]])
    assert not short.series


@pytest.mark.parametrize("metric", ["fvd", "lpips"])
def test_weights_that_are_damaged_are_a_sentence(weights: Path, metric: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(
        UserError, match=r"i3d_torchscript.pt cannot be used|alexnet-owt-7be5be79.pth: not a PyTo"
    ):
        Bench([metric], weights)


class Quality:
    """A network of pyiqa: its score is the picture's mean; a dark one has no face."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.net = SimpleNamespace(forward_patch=self)

    def __call__(self, x: Any) -> Any:
        self.asked.append(tuple(x.shape))
        assert x.min() >= 0
        assert x.max() <= 1
        assert x.mean() > 0.1
        return x.mean((1, 2, 3))[..., None]


@pytest.mark.usefixtures("installed")
def test_topiq_is_asked_once_a_second_and_hyperiqa_nine_times(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    networks: dict[str, Quality] = {}

    def create_metric(name: str, device: str) -> Quality:
        return networks.setdefault(name, Quality())

    module(monkeypatch, "pyiqa", create_metric=create_metric)
    frames = pictures()
    frames[12] = 0
    record = read("topiq", Path(), Subject(FRAMES), [Moment(x) for x in frames])
    assert networks["topiq_nr-face-v1"].asked == [(1, 3, 60, 48)] * 2
    assert record.values["topiq"] == pytest.approx(frames[37].mean() / 255, rel=1e-4)
    dark = read("topiq", Path(), Subject(FRAMES), [Moment(0 * x) for x in frames])
    assert str(dark.missing["topiq"]) == "not available: no frame has a score"
    record = read("hyperiqa", Path(), Subject(FRAMES), [Moment(x) for x in frames])
    assert networks["hyperiqa"].asked == [(3, 3, 224, 224)] * 3
    assert 0.45 < record.values["hyperiqa"] < 0.55
    again = read("hyperiqa", Path(), Subject(FRAMES), [Moment(x) for x in frames])
    assert again.values == record.values


@pytest.mark.usefixtures("installed")
def test_what_pyiqa_would_fetch_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def create_metric(name: str, device: str) -> None:
        with socket.create_connection(("127.0.0.1", 9), timeout=1):
            raise AssertionError("it was fetched")

    module(monkeypatch, "pyiqa", create_metric=create_metric)
    connect = socket.socket.connect
    bench = Bench(["topiq"])
    said = str(bench.missing["topiq"])
    assert said.startswith(
        "not available: pyiqa's files of topiq_nr-face-v1 are not in its cache; get them with"
    )
    assert "pyiqa.create_metric('topiq_nr-face-v1')" in said
    assert "something would be fetched" in said
    assert socket.socket.connect is connect


@pytest.mark.usefixtures("installed")
def test_csim_of_a_video_with_itself_is_one(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, file: str, providers: list[str]) -> None:
            assert Path(file).name == "w600k_r50.onnx"

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="input.1")]

        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            x = given["input.1"]
            assert x.dtype == np.float32
            assert x.shape == (2, 3, 112, 112)
            assert -1 <= x.min() < -0.9
            return [x.reshape(2, -1)]

    module(monkeypatch, "onnxruntime", InferenceSession=Session)
    frames = pictures(0, 120, 120)
    landmarks = np.tile(face(), (FRAMES, 1, 1))
    landmarks[3] = np.nan
    streams = frozenset({"source"})
    subject = Subject(FRAMES, streams, landmarks=landmarks, source_landmarks=landmarks)
    same = read("csim", weights, subject, [Moment(x, source=x) for x in frames])
    assert same.values["csim"] == pytest.approx(1)
    other = read("csim", weights, subject, [Moment(x, source=x[::-1]) for x in frames])
    assert abs(other.values["csim"]) < 0.2


def face() -> np.ndarray:
    """Landmarks `[68, 2]` whose five points are ArcFace's."""
    points = np.full((68, 2), 56.0)
    points[36:42], points[42:48] = ARCFACE_POINTS[0], ARCFACE_POINTS[1]
    points[[30, 48, 54]] = ARCFACE_POINTS[2:]
    return points


def test_a_face_is_laid_straight_by_five_points() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(align_face(picture, face()), picture)
    # A quarter turn about the middle of the pixels.
    turned = np.ascontiguousarray(np.rot90(picture))
    points = face()
    np.testing.assert_array_equal(
        align_face(turned, np.stack([points[:, 1], 111 - points[:, 0]], axis=1)), picture
    )


def test_patches_are_seeded_and_small_pictures_are_enlarged() -> None:
    picture = np.random.default_rng(2).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    patches = random_patches(picture)
    assert [p.shape for p in patches] == [(224, 224, 3)] * 3
    assert all((a == b).all() for a, b in zip(patches, random_patches(picture), strict=True))
    assert any((a != b).any() for a, b in zip(patches, random_patches(picture, 1), strict=True))
    assert [p.shape for p in random_patches(picture[:100])] == [(224, 224, 3)] * 3


@pytest.mark.usefixtures("installed")
def test_lpips_is_the_mean_of_the_frames_distances(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance:
        def __init__(self, network: object) -> None:
            pass

        def distance(self, a: np.ndarray, b: np.ndarray) -> float:
            assert a.shape == b.shape
            return float(np.abs(a.astype(float) - b).mean())

    monkeypatch.setattr(perceptual, "load_lpips", lambda *_: None)
    monkeypatch.setattr(perceptual, "LPIPSNetwork", Distance)
    a, b = pictures(0), pictures(1)
    streams = frozenset({"truth"})
    pairs = [Moment(x, truth=y) for x, y in zip(a, b, strict=True)]
    found = read("lpips", weights, Subject(FRAMES, streams), pairs)
    assert found.values["lpips"] == pytest.approx(np.abs(a.astype(float) - b).mean())
    boxes = np.array([[0, t % 4, 30 + t % 4, 30 + 2 * (t % 4)] for t in range(FRAMES)])
    assert read("lpips", weights, Subject(FRAMES, streams, boxes=boxes), pairs).values["lpips"] > 0
    same = [Moment(x, truth=x) for x in a]
    assert read("lpips", weights, Subject(FRAMES, streams), same).values["lpips"] == 0


@pytest.mark.usefixtures("installed")
def test_too_little_memory_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def create_metric(name: str, device: str) -> None:
        raise MemoryError("cannot allocate 2 GB")

    module(monkeypatch, "pyiqa", create_metric=create_metric)
    with pytest.raises(MemoryError):
        Bench(["topiq"])
