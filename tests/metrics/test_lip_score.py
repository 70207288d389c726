"""LipScore's encoder beside the same layers in PyTorch, its checkpoint's two layouts, and its crop."""

from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.backend import computing
from keysync_jax.convert.scorers import lip_reader_table, scorer_shapes
from keysync_jax.media.lip_crop import MEAN_FACE, STABLE, cut_lips, lip_track
from keysync_jax.metrics import lip_score as scoring
from keysync_jax.metrics.meter import Moment, Subject
from keysync_jax.metrics.registry import Bench
from keysync_jax.model import Network
from keysync_jax.nn import functional as F
from keysync_jax.nn.lip_reader import HALO, LipReader, LipReaderConfig
from keysync_jax.parity import rules
from tests.metrics.judges import by_rule

TINY = LipReaderConfig(stem=4, trunk=(4, 6, 8, 10), width=16, heads=2, feed_forward=24, layers=2, kernel=5)
FRAMES = 7


def tiny_tensors() -> dict[str, np.ndarray]:
    """A state dict in the repository's layout."""
    _, abstract = F.shapes(lambda rngs: LipReader(TINY, rngs=rngs))
    table = lip_reader_table(TINY, ["frontend."])
    found = table.to_torch({path: np.zeros(x.shape, np.float32) for path, x in abstract.items()})
    return {key: by_rule(f"lip.{key}", x.shape) for key, x in found.items()}


def before(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same in the layout that the release reads."""

    def renamed(key: str) -> str:
        if key.startswith("frontend."):
            return f"encoder.{key}"
        return key.replace("proj_encoder", "encoder.embed.0")

    return {renamed(key): x for key, x in tensors.items()}


@pytest.fixture(scope="module")
def tiny() -> Network:
    graphdef, abstract = F.shapes(lambda rngs: LipReader(TINY, rngs=rngs))
    wanted = {path: x.shape for path, x in abstract.items()}
    tensors = tiny_tensors()
    return Network(graphdef, lip_reader_table(TINY, tensors).to_jax(tensors, wanted))


def torch_encoder(sd: dict[str, Any], mouths: Any) -> Any:
    """The encoder once more, as Auto-AVSR and ESPnet write it: `[T, 88, 88]` to `[T, D]`."""
    import torch
    from torch.nn import functional as TF

    def norm(x: Any, key: str) -> Any:
        parts = (sd[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return TF.batch_norm(x, *parts)

    def layer_norm(x: Any, key: str) -> Any:
        return TF.layer_norm(x, x.shape[-1:], sd[f"{key}.weight"], sd[f"{key}.bias"], 1e-12)

    def linear(x: Any, key: str) -> Any:
        return TF.linear(x, sd[f"{key}.weight"], sd.get(f"{key}.bias"))

    def feed_forward(x: Any, key: str) -> Any:
        return linear(TF.relu(linear(x, f"{key}.w_1")), f"{key}.w_2")

    def block(x: Any, key: str, stride: int) -> Any:
        y = TF.silu(norm(TF.conv2d(x, sd[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn1"))
        y = norm(TF.conv2d(y, sd[f"{key}.conv2.weight"], padding=1), f"{key}.bn2")
        if f"{key}.downsample.0.weight" in sd:
            x = norm(TF.conv2d(x, sd[f"{key}.downsample.0.weight"], stride=stride), f"{key}.downsample.1")
        return TF.silu(x + y)

    def attention(x: Any, positions: Any, key: str) -> Any:
        frames = len(x)
        q, k, v, p = (
            linear(y, f"{key}.linear_{name}").view(len(y), TINY.heads, -1)
            for name, y in (("q", x), ("k", x), ("v", x), ("pos", positions))
        )
        content = torch.einsum("ihd,jhd->hij", q + sd[f"{key}.pos_bias_u"], k)
        moved = torch.einsum("ihd,mhd->him", q + sd[f"{key}.pos_bias_v"], p)
        padded = TF.pad(moved, (1, 0)).view(TINY.heads, 2 * frames, frames)
        moved = padded[:, 1:].reshape(TINY.heads, frames, 2 * frames - 1)[:, :, :frames]
        weights = torch.softmax((content + moved) / np.sqrt(q.shape[-1]), dim=-1)
        return linear(torch.einsum("hij,jhd->ihd", weights, v).reshape(x.shape), f"{key}.linear_out")

    def convolution(x: Any, key: str) -> Any:
        def conv(y: Any, name: str, **kwargs: int) -> Any:
            return TF.conv1d(y, sd[f"{key}.{name}.weight"], sd[f"{key}.{name}.bias"], **kwargs)

        y = TF.glu(conv(x.T[None], "pointwise_cov1"), dim=1)
        y = conv(y, "depthwise_conv", padding=TINY.kernel // 2, groups=TINY.width)
        return conv(TF.silu(norm(y, f"{key}.norm")), "pointwise_cov2")[0].T

    x = TF.conv3d(mouths[None, None], sd["frontend.frontend3D.0.weight"], stride=(1, 2, 2), padding=(2, 3, 3))
    x = TF.max_pool3d(TF.silu(norm(x, "frontend.frontend3D.1")), (1, 3, 3), (1, 2, 2), (0, 1, 1))
    x = x[0].transpose(0, 1)
    for stage in range(4):
        for i in range(2):
            x = block(x, f"frontend.trunk.layer{stage + 1}.{i}", 2 if stage and not i else 1)
    x = linear(x.mean((2, 3)), "proj_encoder") * np.sqrt(TINY.width)
    angle = torch.outer(
        torch.arange(FRAMES - 1, -FRAMES, -1.0),
        torch.exp(torch.arange(0, TINY.width, 2) * -(np.log(10_000.0) / TINY.width)),
    )
    positions = torch.zeros(2 * FRAMES - 1, TINY.width)
    positions[:, 0::2], positions[:, 1::2] = torch.sin(angle), torch.cos(angle)
    for i in range(TINY.layers):
        key = f"encoder.encoders.{i}"
        x = x + 0.5 * feed_forward(layer_norm(x, f"{key}.norm_ff_macaron"), f"{key}.feed_forward_macaron")
        x = x + attention(layer_norm(x, f"{key}.norm_mha"), positions, f"{key}.self_attn")
        x = x + convolution(layer_norm(x, f"{key}.norm_conv"), f"{key}.conv_module")
        x = x + 0.5 * feed_forward(layer_norm(x, f"{key}.norm_ff"), f"{key}.feed_forward")
        x = layer_norm(x, f"{key}.norm_final")
    return layer_norm(x, "encoder.after_norm")


def test_the_encoder_is_torchs(tiny: Network) -> None:
    torch = pytest.importorskip("torch")
    mouths = rules.array("lip/mouths", (FRAMES, 88, 88))
    sd = {key: torch.from_numpy(x) for key, x in tiny_tensors().items()}
    expected = torch_encoder(sd, torch.from_numpy(mouths)).numpy()
    with computing("fp32"):
        found = jax.jit(lambda params, x: F.bind(tiny.graphdef, params)(x))(tiny.params, mouths)
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)

    # In pieces of the first part, and filled up in the second, as `LipReaderNetwork` gives them.
    @jax.jit
    def in_parts(params: Any, x: Any, frames: Any) -> Any:
        network = F.bind(tiny.graphdef, params)
        x = jnp.pad(x, ((HALO, HALO), (0, 0), (0, 0)))
        whole = jnp.concatenate([network.project(x[:8]), network.project(x[4:]), jnp.ones((6, TINY.width))])
        return network.encode(whole, frames)

    with computing("fp32"):
        found = in_parts(tiny.params, mouths, FRAMES)
    assert found.shape == (FRAMES + 6, TINY.width)
    np.testing.assert_allclose(found[:FRAMES], expected, atol=1e-4)


def test_both_layouts_of_the_checkpoint_are_the_same_network(tiny: Network) -> None:
    tensors = tiny_tensors()
    older = before(tensors)
    assert older.keys() != tensors.keys()
    surplus = {"decoder.embed.0.weight": np.zeros(1), "ctc.ctc_lo.bias": np.zeros(1)}
    wanted = {path: x.shape for path, x in tiny.params.items()}
    for given in (tensors, older):
        table = lip_reader_table(TINY, given)
        found = table.to_jax({**given, **surplus}, wanted)
        assert all(found[path].tobytes() == tiny.params[path].tobytes() for path in tiny.params)
        back = table.to_torch(found)
        assert back.keys() == given.keys()
        assert all(back[key].tobytes() == given[key].tobytes() for key in given)


def test_full_size_has_the_published_number_of_parameters() -> None:
    _, sizes = scorer_shapes("lip-reader")
    statistics = (".var", ".mean")
    count = sum(int(np.prod(shape)) for path, shape in sizes.items() if not path.endswith(statistics))
    assert round(count / 1e6, 1) == 182.0
    frontend = (p for p in sizes if p.startswith("frontend.") and not p.endswith(statistics))
    assert round(sum(int(np.prod(sizes[p])) for p in frontend) / 1e6, 2) == 11.18


def a_face(scale: float = 1.5, angle: float = 0.2, shift: tuple[float, float] = (60, 20)) -> np.ndarray:
    """Landmarks `[68, 2]` whose stable points are the mean face's, turned; the mouth is below the nose."""
    points = np.tile(np.array([129.0, 150.0]), (68, 1))
    points[48:68] += np.random.default_rng(0).uniform(-20, 20, (20, 2))
    points[list(STABLE)] = MEAN_FACE
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T + shift


def test_the_crop_shows_the_mouth_upright_wherever_the_face_is() -> None:
    canvas = cv2.GaussianBlur(
        np.random.default_rng(1).integers(0, 256, (256, 256, 3), dtype=np.uint8), (0, 0), 6
    )
    straight = cut_lips(canvas, a_face(1, 0, (0, 0)))
    points = a_face()
    matrix = np.column_stack(
        [1.5 * np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]), [60, 20]]
    )
    turned = cv2.warpAffine(canvas, matrix, (500, 500), flags=cv2.INTER_CUBIC)
    found = cut_lips(turned, points)
    assert found.shape == (88, 88)
    assert found.dtype == np.float32
    assert np.abs(found - straight).max() < 0.1
    x, y = (round(v - 48) + 4 for v in a_face(1, 0, (0, 0))[48:68].mean(axis=0))
    grey = canvas[y : y + 88, x : x + 88] @ np.array([0.2989, 0.587, 0.114])
    np.testing.assert_allclose(straight, (grey / 255 - 0.421) / 0.165, atol=0.02)


def test_the_track_is_smoothed_about_each_frames_own_place() -> None:
    landmarks = np.tile(a_face(), (20, 1, 1))
    landmarks += np.linspace(0, 30, 20)[:, None, None]
    np.testing.assert_allclose(lip_track(landmarks), landmarks)
    jump = landmarks.copy()
    jump[10, 60] += 13
    track = lip_track(jump)
    np.testing.assert_allclose(track.mean(axis=1), jump.mean(axis=1))
    # A thirteenth of the jump, less what the mean of the points takes along.
    assert (track - landmarks)[10, 60, 0] == pytest.approx(1 - 1 / 68 + 13 / 68)
    gap = landmarks.copy()
    gap[[0, 7]] = np.nan
    assert np.isfinite(lip_track(gap)).all()


def test_a_mouth_far_from_the_mean_face_is_refused() -> None:
    points = a_face()
    points[60:68] += 600
    with pytest.raises(ValueError, match="too far from where the mean face has it"):
        cut_lips(np.zeros((300, 300, 3), np.uint8), points)
    with pytest.raises(ValueError, match="cannot be laid"):
        cut_lips(np.zeros((300, 300, 3), np.uint8), np.zeros((68, 2)))


def test_the_score_is_a_mean_of_cosines() -> None:
    x = np.array([[1.0, 0], [0, 2], [3, 4]])
    assert scoring.lip_score(x, 7 * x) == pytest.approx(1)
    assert scoring.lip_score(x, -x) == pytest.approx(-1)
    assert scoring.lip_score(x[:2], np.array([[1.0, 0], [5, 0], [9, 9]])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no frame"):
        scoring.lip_score(x[:0], x)


class _Means(scoring.LipReaderNetwork):
    """A network whose features are means of pictures, in place of the encoder."""

    def __init__(self, network: object) -> None:
        pass

    def project(self, mouths: np.ndarray) -> np.ndarray:
        assert 2 * HALO < len(mouths) <= 16 + 2 * HALO
        windows = np.lib.stride_tricks.sliding_window_view(mouths.mean(axis=(1, 2)), 2 * HALO + 1)
        return np.array(windows)

    def encode(self, x: np.ndarray) -> np.ndarray:
        return x


@pytest.mark.parametrize("frames", [12, 14, 16, 17, 18, 19, 34, 40])
def test_a_video_is_read_frame_by_frame(frames: int) -> None:
    pictures = np.random.default_rng(2).integers(0, 256, (frames, 256, 256, 3), dtype=np.uint8)
    landmarks = np.tile(a_face(1, 0, (0, 0)), (frames, 1, 1))
    video = scoring.LipVideo(_Means(None), landmarks)
    for picture in pictures:
        video.update(picture)
    mouths = [cut_lips(*pair).mean() for pair in zip(pictures, lip_track(landmarks), strict=True)]
    expected = np.lib.stride_tricks.sliding_window_view(np.pad(mouths, HALO), 2 * HALO + 1)
    np.testing.assert_allclose(video.result(), expected, atol=1e-6)


def test_the_score_through_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scoring, "load_scorer", lambda *_: None)
    monkeypatch.setattr(scoring, "LipReaderNetwork", _Means)
    (tmp_path / "lip_reader.safetensors").touch()
    bench = Bench(["lip_score"], tmp_path)
    pictures = np.random.default_rng(3).integers(0, 256, (14, 256, 256, 3), dtype=np.uint8)
    landmarks = np.tile(a_face(1, 0, (0, 0)), (14, 1, 1))
    subject = Subject(14, frozenset({"speaker"}), landmarks=landmarks, speaker_landmarks=landmarks)

    def scored(shown: int) -> Any:
        reading = bench.start(subject)
        for picture in pictures[:shown]:
            reading.update(Moment(picture, speaker=picture))
        return reading.result()

    assert scored(14).values["lip_score"] == pytest.approx(1)
    assert "needs 12 frames of both videos" in str(scored(11).missing["lip_score"])
    without = bench.start(Subject(14, landmarks=landmarks)).result()
    assert "the video whose voice drives" in str(without.missing["lip_score"])
