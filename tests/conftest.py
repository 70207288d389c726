"""Places of the test data, the reasons for which a test is skipped, and a store of compiled programs."""

import os
from pathlib import Path

import jax
import pytest

from keysync_jax.convert.checkpoint import Checkpoints, convert
from tests.tiny_model import HEAD_DIM, write_checkpoints

GOLDEN = Path(__file__).parent / "golden"

# Most of the tests' time is compiling: processes, and commands that tests start, share what they compiled.
COMPILED = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
jax.config.update("jax_compilation_cache_dir", COMPILED)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference's golden numbers that travels with the project."""
    return GOLDEN


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of the real clip, beside the project; its tests skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("the real clip (../shared/real) is not here")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A tiny checkpoint set in the release's containers."""
    pytest.importorskip("torch")
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), GOLDEN)


@pytest.fixture(scope="session")
def tiny_model(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint set, converted. Tests that alter it copy it first."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    convert(checkpoints, folder, head_dim=HEAD_DIM)
    return folder
