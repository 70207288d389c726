"""Places of the test data, and the reasons for which a test is skipped."""

from pathlib import Path

import pytest

from keysync_jax.convert.checkpoint import Checkpoints, convert
from tests.tiny_model import HEAD_DIM, write_checkpoints

GOLDEN = Path(__file__).parent / "golden"


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
