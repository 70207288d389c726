"""Places of the test data, the reasons for which a test is skipped, and a store of compiled programs."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from keysync_jax.convert.checkpoint import Checkpoints, convert
from tests.hub import StandIn, stand_in
from tests.tiny_model import HEAD_DIM, write_checkpoints

GOLDEN = Path(__file__).parent / "golden"

# Most of the tests' time is compiling: LLVM does less of it, and processes, and commands that tests start,
# share what they compiled.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in of the hub, to which its client speaks; the client's cache and token are in `tmp_path`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with stand_in() as state:
        template = state.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": state.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            # Pieces in which a file arrives; a piece that is not whole is lost with the connection.
            "DOWNLOAD_CHUNK_SIZE": 1000,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield state
