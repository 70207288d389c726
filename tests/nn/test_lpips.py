"""LPIPS: equal to PyTorch's arithmetic, bit-equal conversion, and a distance with a gradient."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.lpips import feature_indices, heads_table, load_lpips, lpips_config, trunk_table
from keysync_jax.errors import UserError
from keysync_jax.model import Network
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.lpips import LPIPS, LPIPSConfig, TrunkKind, unit_length
from keysync_jax.parity import rules
from keysync_jax.tensorfile import write_tensors
from keysync_jax.typing import Array, Params

WIDTHS = (4, 6, 8, 10, 12)
CONVS = {
    "vgg16": {
        0: (3, 0), 2: (3, 0), 5: (3, 1), 7: (3, 1), 10: (3, 2), 12: (3, 2), 14: (3, 2),
        17: (3, 3), 19: (3, 3), 21: (3, 3), 24: (3, 4), 26: (3, 4), 28: (3, 4),
    },
    "alexnet": {0: (11, 0), 3: (5, 1), 6: (3, 2), 8: (3, 3), 10: (3, 4)},
}  # fmt: skip
"""Of each trunk in torchvision: index among `features` -> kernel, slice."""
POOLS = {"vgg16": (4, 9, 16, 23), "alexnet": (2, 5)}
COMPARED = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}


def trunk_tensors(kind: TrunkKind) -> dict[str, np.ndarray]:
    tensors, dim = {}, 3
    for index, (size, part) in CONVS[kind].items():
        weight, bias = f"features.{index}.weight", f"features.{index}.bias"
        tensors[weight] = 2 * rules.weight(weight, (WIDTHS[part], dim, size, size))
        tensors[bias] = rules.weight(bias, (WIDTHS[part],))
        dim = WIDTHS[part]
    return {**tensors, "classifier.0.weight": np.zeros((2, 3), np.float32)}


def head_tensors() -> dict[str, np.ndarray]:
    keys = [f"lin{i}.model.1.weight" for i in range(len(WIDTHS))]
    return {k: np.abs(rules.array(k, (1, w, 1, 1))) for k, w in zip(keys, WIDTHS, strict=True)}


def images(name: str, height: int = 35, width: int = 46) -> np.ndarray:
    """`[2, H, W, 3]` in [-1, 1]; odd sizes, which poolings round down."""
    return np.tanh(rules.array(name, (2, height, width, 3)))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    trunk, heads = tmp_path / "vgg16.safetensors", tmp_path / "lin.safetensors"
    write_tensors(trunk, trunk_tensors("vgg16"), {})
    write_tensors(heads, head_tensors(), {})
    return trunk, heads


@partial(jax.jit, static_argnums=0)
def compiled(graphdef: nnx.GraphDef, params: Params, a: Array, b: Array) -> tuple[Array, Array]:
    """Distances, and the gradient of their sum in `a`."""
    distances, back = jax.vjp(lambda a: bind(graphdef, params)(a, b), a)
    return distances, back(jnp.ones_like(distances))[0]


def distance(network: Network, a: Array, b: Array) -> Array:
    return compiled(*network, a, b)[0]


def torch_distance(kind: TrunkKind, weights: dict[str, Any], a: Any, b: Any) -> Any:
    """The definition once more, in torch, layer by layer of `features`; images `[N, 3, H, W]`."""
    import torch
    from torch.nn import functional as F

    def features(x: Any) -> list[Any]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found = (x - shift[:, None, None]) / scale[:, None, None], []
        for index in range(COMPARED[kind][-1] + 1):
            if index in CONVS[kind]:
                weight, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
                first = kind == "alexnet" and index == 0
                stride, padding = (4, 2) if first else (1, weight.shape[-1] // 2)
                x = F.conv2d(x, weight, bias, stride, padding)
            elif index in POOLS[kind]:
                x = F.max_pool2d(x, 2 if kind == "vgg16" else 3, 2)
            else:
                x = F.relu(x)
            if index in COMPARED[kind]:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    parts = [
        F.conv2d((x - y) ** 2, weights[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
        for i, (x, y) in enumerate(zip(features(a), features(b), strict=True))
    ]
    assert all((part > 1e-3).all() for part in parts)  # every slice has its say
    return sum(parts)


@pytest.mark.parametrize("kind", ["vgg16", "alexnet"])
def test_distance_and_gradient_are_torchs(kind: TrunkKind, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    trunk, heads = trunk_tensors(kind), head_tensors()
    as_torch = {k: torch.from_numpy(v) for k, v in {**trunk, **heads}.items()}
    torch.save({k: as_torch[k] for k in trunk}, tmp_path / "trunk.pth")
    torch.save({k: as_torch[k] for k in heads}, tmp_path / "lin.pth")
    network = load_lpips(tmp_path / "trunk.pth", tmp_path / "lin.pth")
    a, b = images("a"), images("b")
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2) for i in (a, b))
    expected = torch_distance(kind, as_torch, x.requires_grad_(), y)
    expected.sum().backward()
    found, gradient = compiled(*network, a, b)
    assert found.shape == (2,)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    wanted = x.grad.permute(0, 2, 3, 1).numpy()
    # Rounding can put an activation on the other side of a ReLU's kink, so elements differ a little.
    assert np.linalg.norm(gradient - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_the_distance_is_zero_to_itself_symmetric_and_grows(files: tuple[Path, Path]) -> None:
    network, a, b = load_lpips(*files), images("a"), images("b")
    np.testing.assert_allclose(distance(network, a, a), 0, atol=1e-12)
    np.testing.assert_allclose(distance(network, a, b), distance(network, b, a), rtol=1e-6)
    steps = [distance(network, a, a + t * (b - a)).sum() for t in (0.0, 0.1, 0.3, 1.0)]
    assert all(near < far for near, far in itertools.pairwise(steps))


def test_a_step_down_the_gradient_shortens_the_distance(files: tuple[Path, Path]) -> None:
    network, a, b = load_lpips(*files), images("a"), images("b")
    _, gradient = compiled(*network, a, b)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max(axis=(1, 2)) > 0).all()
    step = 0.1 / jnp.linalg.norm(gradient)
    assert distance(network, a - step * gradient, b).sum() < distance(network, a, b).sum()


def test_a_pixel_without_features_has_a_finite_gradient() -> None:
    x = jnp.zeros((3, 4)).at[1].set(jnp.array([3.0, 0.0, 0.0, 4.0]))
    np.testing.assert_allclose(unit_length(x)[1], [0.6, 0, 0, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(unit_length(x)[0], 0)
    assert np.isfinite(jax.grad(lambda x: unit_length(x).sum())(x)).all()


def test_bf16_is_near_and_its_result_fp32(files: tuple[Path, Path]) -> None:
    exact, rounded = (load_lpips(*files, dtype) for dtype in ("fp32", "bf16"))
    a, b = images("a"), images("b")
    found = distance(rounded, a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, distance(exact, a, b), rtol=0.05)
    assert (found != distance(exact, a, b)).all()


def test_images_that_are_too_small_are_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"images of \(8, 32\) pixels are too small for vgg16"):
        distance(load_lpips(*files), images("a", 8, 32), images("b", 8, 32))


@pytest.mark.parametrize("kind", ["vgg16", "alexnet"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_conversion_is_bit_equal_both_ways(kind: TrunkKind, dtype: Any) -> None:
    config = LPIPSConfig(kind, WIDTHS)
    wanted = {k: v.shape for k, v in shapes(lambda rngs: LPIPS(config, rngs=rngs))[1].items()}
    assert list(itertools.chain(*feature_indices(kind))) == list(CONVS[kind])
    converted = []
    for table, tensors in (
        (trunk_table(config), trunk_tensors(kind)),
        (heads_table(config), head_tensors()),
    ):
        tensors = {k: v.astype(dtype) for k, v in tensors.items()}
        ours = table.to_jax(tensors, {row.path: wanted[row.path] for row in table.rows})
        back = table.to_torch(ours)
        assert back.keys() == tensors.keys() - {"classifier.0.weight"}
        assert all(back[k].dtype == dtype and back[k].tobytes() == tensors[k].tobytes() for k in back)
        converted += list(ours)
    assert sorted(converted) == sorted(wanted)


def test_full_size_has_the_shapes_of_the_released_files() -> None:
    sizes = {k: v.shape for k, v in shapes(lambda rngs: LPIPS(LPIPSConfig(), rngs=rngs))[1].items()}
    assert sizes["slices.4.2.kernel"] == (3, 3, 512, 512)
    trunk = sum(int(np.prod(shape)) for path, shape in sizes.items() if path.startswith("slices."))
    assert trunk == 14_714_688  # VGG16 without its classifier
    assert sum(int(np.prod(shape)) for shape in sizes.values()) - trunk == 1472


def test_missing_surplus_and_misshapen_tensors_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    trunk, heads = trunk_tensors("vgg16"), head_tensors()
    bad = tmp_path / "bad.safetensors"

    def refused(tensors: dict[str, np.ndarray], match: str, as_heads: bool = False) -> None:
        write_tensors(bad, tensors, {})
        with pytest.raises(UserError, match=match):
            load_lpips(*((files[0], bad) if as_heads else (bad, files[1])))

    def without(tensors: dict[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
        return {k: v for k, v in tensors.items() if k != key}

    for key in ("features.0.weight", "features.10.weight", "features.12.bias"):
        refused(without(trunk, key), f"bad.safetensors: tensor '{key}' is missing")
    misshapen = {**trunk, "features.7.weight": trunk["features.7.weight"][:, 1:]}
    refused(misshapen, r"tensor 'features.7.weight' has shape \[6, 5, 3, 3\], the network needs \[6, 6, 3, 3")
    refused(
        {**trunk, "features.1.running_mean": np.zeros(4, np.float32)}, r"'features.1.running_mean' is not"
    )
    key = "lin3.model.1.weight"
    refused(without(heads, key), f"bad.safetensors: tensor '{key}' is missing", as_heads=True)
    refused({**heads, key: heads[key][:, 1:]}, rf"'{key}' has shape \[1, 9, 1, 1\]", as_heads=True)
    refused({**heads, key: -heads[key]}, f"tensor '{key}' has a weight below 0", as_heads=True)


def test_the_trunk_is_told_by_its_tensors(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert lpips_config(open_tensors(files[0])) == LPIPSConfig("vgg16", WIDTHS)
    write_tensors(tmp_path / "alex.safetensors", trunk_tensors("alexnet"), {})
    assert lpips_config(open_tensors(tmp_path / "alex.safetensors")) == LPIPSConfig("alexnet", WIDTHS)
