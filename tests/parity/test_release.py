"""The protocol with the release's process: each way in which it can fail is a sentence, nothing is left."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.files import git_tree
from keysync_jax.model import DEFAULT
from keysync_jax.parity import capture, engine, sizes
from keysync_jax.parity.capture import environment
from keysync_jax.parity.golden import Golden
from keysync_jax.parity.live import Request, make_golden
from keysync_jax.parity.release import Release
from tests.parity import fake_release

SILENT = lambda line: None  # noqa: E731


def run(tmp_path: Path, script: str, timeout: float = 60.0) -> Path:
    """A live run of the tiny size against a stand-in; the folder of its golden files."""
    release = Release(
        fake_release.checkout(tmp_path / "checkout"),
        fake_release.python(tmp_path / "python", script),
        timeout=timeout,
    )
    folder = tmp_path / "golden"
    folder.mkdir()
    make_golden(release, Request(sizes.tiny()), folder, exact=False, say=SILENT)
    return folder


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (fake_release.failing("no einops"), "^no einops$"),
        (
            "raise TypeError('no such argument')",
            r"stopped \(exit code 1\): TypeError: no such argument \(all",
        ),
        ("sys.exit(7)", r"stopped \(exit code 7\) and printed nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed; too little memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"stopped \(signal SIGSEGV\)"),
        ("pass", "ended without an answer"),
        ("(folder / 'answer.json').write_text('{')", "left a damaged answer.json"),
        ("(folder / 'answer.json').write_text('[]')", "left a damaged answer.json"),
        ("(folder / 'answer.json').write_text('{}')", "keyframe.safetensors: cannot be read"),
        ("answer(); open(folder / 'vae.safetensors', 'r+b').truncate(90)", "vae.safetensors: .*truncated"),
        ("answer(leave_out='block/conv_in')", "answer has no keyframe/block/conv_in"),
        (
            "answer(out__network=np.float32([1, np.inf]))",
            "keyframe/out/network, computed in fp32, holds numbers",
        ),
    ],
)
def test_what_can_go_wrong_in_the_releases_process_is_a_sentence(
    tmp_path: Path, script: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, script)


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    script = f"Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    with pytest.raises(UserError, match=r"took more than 0\.05 minutes; --timeout gives it more"):
        run(tmp_path, script, timeout=3.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_an_interrupted_run_leaves_neither_process_nor_folder(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    checkout = fake_release.checkout(tmp_path / "checkout")
    script = f"Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    python = fake_release.python(tmp_path / "python", script)
    command = [sys.executable, "-m", "keysync_jax.cli", "parity", "--reference", str(checkout)]
    command += ["--python", str(python), "--device", "cpu", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "keysync: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"alive", "checkout", "python"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_an_answer_becomes_golden_files(tmp_path: Path) -> None:
    folder = run(tmp_path, "answer(out__network=np.ones((2, 3), np.float32))")
    golden = Golden(folder / "live")
    assert golden.outputs("keyframe")[-1] == "keyframe/out/network"
    assert golden.stored["keyframe/out/network"].shape == (2, 3)
    assert golden.stage_config("interpolation") == sizes.tiny().interpolation
    assert golden.vae_config() == sizes.tiny().vae
    assert golden.precision == dict.fromkeys(("keyframe", "interpolation", "vae", "clip"), "fp32")
    assert {path.name for path in folder.iterdir()} == {"live.manifest.json", "live.safetensors"}
    notes = json.loads((folder / "live.manifest.json").read_text())["release"]["notes"]
    assert len(notes) == 4
    assert notes[0].startswith("sgm/models is not that of any release known here")


LIVE = ["--reference", "{checkout}", "--python", "{python}"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--reference", "{checkout}"], "needs --python"),
        (["--reference", "{checkout}", "--python", "nowhere"], "nowhere: no Python there"),
        (["--reference", "{tmp}", "--python", "{python}"], "no checkout of the release"),
        (["--golden", "x", "--layers"], "--layers goes with --reference"),
        ([*LIVE, "--dtype", "tf32"], "tf32: TF32 is a way in which GPUs multiply"),
        ([*LIVE, "--as-released", "train"], "train: TF32 is a way in which GPUs multiply"),
        ([*LIVE, "--as-released", "train", "--dtype", "fp32"], "give no --dtype"),
        ([*LIVE, "--as-released", "inference", "--no-exact"], "inference: we have no TF32 on a CPU"),
        ([*LIVE, "--device", "cuda"], "JAX computes on cpu"),
        ([*LIVE, "--model", str(DEFAULT)], "keyframe: the release's norms have 32 groups, this model's 8"),
        ([*LIVE, "--clip", "x.mp4"], "parity on a clip needs --clip, --voice and --model"),
        (
            [*LIVE, "--model", str(DEFAULT), "--clip", "x.mp4", "--voice", "x.wav"],
            "the release's pipeline takes 512 pixels",
        ),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"tmp": tmp_path, "checkout": fake_release.checkout(tmp_path / "checkout")}
    places["python"] = fake_release.python(tmp_path / "python", "pass")
    assert main(["parity", *(option.format(**places) for option in options)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folders_name_is_gits(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for name in ("a.py", "a/b.py", "a-b", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True) if name != "a/b.py" else None
        if name != "a/b.py":
            (tmp_path / name).write_text(name)
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "link").symlink_to("run.sh")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    wanted = subprocess.run([*git, "rev-parse", "HEAD^{tree}"], check=True, capture_output=True, text=True)
    subprocess.run(["rm", "-rf", str(tmp_path / ".git")], check=True)
    (tmp_path / "deep/__pycache__").mkdir()
    assert git_tree(tmp_path) == wanted.stdout.strip()


# --- capture, without the release --------------------------------------------------------------


def test_it_asks_for_what_its_environment_lacks_and_needs_nothing_of_ours(tmp_path: Path) -> None:
    """A Python without any package."""
    (tmp_path / "request.json").write_text("{}")
    folder = Path(capture.__file__).parent
    command = [sys.executable, "-S", "-E", str(folder), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (3, "")
    sentence = json.loads((tmp_path / "failure.json").read_text())["sentence"]
    assert " has no torch, safetensors, numpy, " in sentence
    assert "pip install torch safetensors numpy einops omegaconf pytorch-lightning" in sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "ran out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})(), "ran out of the GPU's memory"),
        (
            NotImplementedError("No operator found for `memory_efficient_attention_forward`"),
            "--attention torch",
        ),
        (
            ModuleNotFoundError("No module named 'some_thing'", name="some_thing.inner"),
            "pip install some-thing",
        ),
        (ValueError("a defect"), ""),
    ],
)
def test_errors_of_the_release_that_have_a_sentence(error: Exception, sentence: str) -> None:
    said = environment.sentence_of(error)
    assert sentence in said
    assert bool(sentence) == bool(said)


def test_every_layer_has_its_module(golden: Path) -> None:
    """Names of the release's modules, from those of its tensors at full size."""
    full = json.loads((golden / "manifest_full.json").read_text())["tensors"]
    for config in (sizes.full().keyframe, sizes.full().interpolation):
        held = {key.rpartition(".")[0] for key in full[config.kind]} - {"model"}
        layers = engine.layers(config)
        assert set(layers.values()) == held
        blocks = engine.blocks(config)
        assert blocks["block/down_blocks.2.attentions.1"] == "model.diffusion_model.input_blocks.8.1"
        assert blocks["block/up_blocks.1.upsamplers.0"] == "model.diffusion_model.output_blocks.5.2.conv"
        assert len(blocks) == 47
    shapes = {k: list(v) for k, v in engine.torch_shapes(sizes.full().vae).items()}
    assert shapes == full["first_stage"]


def test_the_quant_convolution_is_no_module_of_the_engine() -> None:
    with_it = dataclasses.replace(sizes.tiny().vae, quant_conv=True)
    assert "first_stage_model.quant_conv.weight" in engine.torch_shapes(with_it)
    assert engine.layers(with_it) == engine.layers(sizes.tiny().vae)
