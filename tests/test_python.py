"""`import keysync_jax as ks`: what it costs, what it gives, and that docs/python.md runs."""

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import keysync_jax as ks
from keysync_jax.config import LogMelConfig, ModelConfig, StageConfig, StageKind, UNetConfig, VAEConfig
from keysync_jax.convert import checkpoint
from keysync_jax.convert.checkpoint import Checkpoints
from keysync_jax.model import components, maker, save_model
from keysync_jax.nn.functional import shapes
from keysync_jax.public import FUNCTIONS, HOMES, load
from keysync_jax.train.start import random_weights
from tests.clips import face_landmarks, write_video, write_voice
from tests.convert.test_released import on_hub, release  # noqa: F401
from tests.data.preparing import add_clip
from tests.hub import StandIn
from tests.parity.test_parity import subset
from tests.tiny_model import HEAD_DIM

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
ROOMS = ("convert", "parity", "train")


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_the_import_is_quick_and_brings_nothing_heavy() -> None:
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time(); import keysync_jax as ks; "
        "dir(ks); print(time.process_time() - start, *sorted(set(sys.modules) - before))"
    )
    seconds, *loaded = min((fresh(code) for _ in range(3)), key=lambda text: float(text.split()[0])).split()
    assert float(seconds) < 0.2
    assert not {"jax", "flax", "numpy", "cv2", "av", "tqdm"} & {name.partition(".")[0] for name in loaded}
    assert {name for name in loaded if name.startswith("keysync_jax")} == {
        "keysync_jax",
        "keysync_jax.public",
    }


def test_every_name_is_there_and_in_the_page() -> None:
    assert sorted(HOMES) == sorted(ks.__all__) == sorted(set(dir(ks)) - {"__version__"})
    page = PAGE.read_text()
    for name in ks.__all__:
        assert callable(getattr(ks, name)), name
        assert f"ks.{name}" in page, name
    assert set(re.findall(r"\bks\.(\w+)", page)) == set(ks.__all__)
    with pytest.raises(AttributeError, match="module 'keysync_jax' has no attribute 'dubb'"):
        _ = ks.dubb  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_of_a_functions_name_is_called_like_it(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = load(room)
    package = getattr(ks, room)
    assert isinstance(package, ModuleType)
    assert package is sys.modules[f"keysync_jax.{room}"]
    assert inspect.signature(package) == inspect.signature(function)
    monkeypatch.setattr(sys.modules[function.__module__], function.__name__, lambda *a, **k: (a, k))
    assert package(1, b=2) == ((1,), {"b": 2})


@pytest.mark.parametrize("first", ["pass", "import {0} as x", "from {0} import {1} as x"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    lines = []
    for room in ROOMS:
        function = load(room)
        home, name = function.__module__, function.__name__
        lines += [first.format(home, name), "import inspect, keysync_jax as ks", f"import {home} as module"]
        lines += [f"from keysync_jax import {room} as called", "of = inspect.signature"]
        lines += [f"assert ks.{room} is called and of(called) == of(module.{name})"]
        lines += [f"assert callable(called) and ks.{home.partition('.')[2]} is module"]
    fresh("\n".join(lines))


def test_type_checkers_are_told_the_same() -> None:
    tree = ast.parse(Path(ks.__file__).read_text())
    (told,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module, alias) for node in told.body for alias in node.names]  # type: ignore[attr-defined]
    assert {alias.asname or alias.name: home for home, alias in imports} == HOMES
    assert {alias.asname: alias.name for _, alias in imports if alias.asname} == FUNCTIONS


UNET = UNetConfig(
    in_channels=8,
    block_out_channels=(16,),
    layers_per_block=1,
    attention_levels=(),
    head_dim=16,
    cross_attention_dim=8,
    addition_embed_dim=8,
    norm_groups=4,
)
VAE = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
HEARING = LogMelConfig(bands=8, context=1)


def sizes(kind: StageKind) -> StageConfig:
    unet = dataclasses.replace(UNET, in_channels=8 if kind == "keyframe" else 9)
    return StageConfig(kind, "logmel", unet, audio_dim=HEARING.hidden_size, latent_size=8)


CONFIG = """
from ml_collections import ConfigDict
from keysync_jax.config import to_dict
from keysync_jax.train.config import LossConfig, OptimizerConfig, TrainConfig
from tests.test_python import VAE, sizes

def get_config():
    settings = {{"loss": LossConfig(pixel="none"), "optimizer": OptimizerConfig(warmup=1), "remat": "none"}}
    return ConfigDict(to_dict(TrainConfig(sizes("{}"), VAE, **settings, batch_size=1, steps=1, dtype="fp32")))
"""


def smallest_model(folder: Path) -> Path:
    """A model directory that compiles in seconds and knows nothing."""
    config = ModelConfig(sizes("keyframe"), sizes("interpolation"), VAE, {"logmel": HEARING})
    weights = {c: random_weights(shapes(maker(config, c))[1], 0) for c in components(config)}
    save_model(folder, config, weights)
    return folder


@pytest.fixture
def place(
    on_hub: StandIn,  # noqa: F811
    checkpoints: Checkpoints,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder that the page speaks of, with small things under its names; and the hub."""
    monkeypatch.chdir(tmp_path)
    model = smallest_model(tmp_path / "models" / "keysync")
    on_hub.put("me/keysync", {path.name: path.read_bytes() for path in model.iterdir()})
    on_hub.put("me/stages", {"interpolation.pt": Path(checkpoints.interpolation).read_bytes()}, "v1")
    for name in ("keyframe", "vae"):
        shutil.copy(getattr(checkpoints, name), f"{name}.pt")
    shutil.copytree(checkpoints.audio["keyframe"].path, "hubert-base-ls960")
    shutil.copy(checkpoints.audio["interpolation"].path, "WavLM-Base+.pt")
    add_clip(tmp_path / "clips", "a", 13 * 13 + 1)
    write_voice(tmp_path / "voice.wav", 0.5)
    write_video(tmp_path / "talk.mp4", 14)
    np.save("landmarks.npy", face_landmarks(14))
    Path("configs").mkdir()
    for kind in ("keyframe", "interpolation"):
        Path(f"configs/{kind}.py").write_text(CONFIG.format(kind))
    Path("tests/golden").mkdir(parents=True)
    part = subset(golden, tmp_path / "tests" / "golden", "keyframe/cond")
    for file in ("manifest.json", "safetensors"):
        part.with_name(f"part.{file}").rename(part.with_name(f"tiny.{file}"))
    # The width of an attention head, which no checkpoint tells, is another at the tiny size.
    monkeypatch.setattr(checkpoint, "convert", functools.partial(checkpoint.convert, head_dim=HEAD_DIM))
    return tmp_path


def test_the_page_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "logmel 16\n" in out
    assert "13 0\n" in out
    assert "voice.wav" in out
    assert "1 prepared, 0 skipped" in out
    made = ("dubbed.mp4", "models/released", "models/mine", "models/trained", "data/clips")
    assert all((place / name).exists() for name in made)
    assert not (place / "nothing.mp4").exists()
    assert ks.open_model("models/trained").config.provenance["keyframe"] == "keyframe step 1"
