"""`keysync export --to hub-folder`: a model directory and a model card, ready to be uploaded to the hub."""

import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keysync_jax import __version__
from keysync_jax.config import ModelConfig, StageKind, to_dict
from keysync_jax.convert import released
from keysync_jax.errors import UserError
from keysync_jax.evaluation.synth_eval import MEASURES, SETTINGS, identity
from keysync_jax.files import copy_file, new_folder, write_text
from keysync_jax.hub import PREFIX
from keysync_jax.model import Model, components, open_model
from keysync_jax.tensorfile import TensorFile

CARD = "README.md"
TAGS = ("keysync", "lip-sync", "dubbing", "audio-driven", "latent-diffusion", "jax", "flax")

_TASK = "video-to-video"


def publish(
    folder: str | Path, output: str | Path, licence: str | None = None, metrics: str | Path | None = None
) -> Path:
    """Writes a folder that holds a model directory's files and a model card (`README.md`).

    `keysync dub --model hub:OWNER/NAME` takes the same model directory, once the folder was uploaded.

    Args:
      folder: a model directory, or one on the hub whose files are in the cache.
      output: a new folder.
      licence: of the weights, as the hub names licences ("apache-2.0", "other"). None: those of the parts are
        listed, which is possible if all of them are the release's.
      metrics: `scores.json` as `keysync synth-eval` wrote it for this very model.

    Raises:
      UserError: the model or the metrics cannot be read, the metrics are another model's, the licence is not
        known, or the folder exists.
    """
    model, output = open_model(folder), Path(output)
    card = model_card(model, licence, None if metrics is None else read_metrics(Path(metrics), model))
    with new_folder(output) as partial:
        for name in ("config.json", *(f"{c}.safetensors" for c in components(model.config))):
            copy_file(model.folder / name, partial / name)
        write_text(partial / CARD, card)
    return output


def read_metrics(path: Path, model: Model) -> dict[str, Any]:
    """The model's own row of a `scores.json`: how many clips, and measure -> value.

    Raises:
      UserError: it is not such a file, or the folder says that it was begun for another model.
    """
    try:
        row = json.loads(path.read_bytes())["model"]
        values = {name: float(value) for name, value in row["values"].items()}
        found = {"clips": int(row["clips"]), "values": values}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a scores.json of keysync synth-eval") from error
    unknown = [name for name in values if name not in MEASURES]
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is no measure of keysync synth-eval")
    settings = _settings(path.with_name(SETTINGS))
    if any(settings.get(key) != value for key, value in json.loads(json.dumps(identity(model))).items()):
        raise UserError(f"{path}: was measured on another model (see {SETTINGS} beside it)")
    return found | {key: settings[key] for key in ("seed", "seconds")}


def _settings(path: Path) -> dict[str, Any]:
    """What the folder of scores was begun for, which tells whose they are."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, so nothing tells whose the scores are") from error
    if not isinstance(content, dict) or not {"seed", "seconds"} <= content.keys():
        raise UserError(f"{path}: does not say what was measured")
    return content


def model_card(model: Model, licence: str | None = None, metrics: Mapping[str, Any] | None = None) -> str:
    """A model card: YAML that the hub reads, then Markdown.

    Args:
      licence: as in `publish`.
      metrics: as `read_metrics` gives them.

    Raises:
      UserError: the licence is not known.
    """
    licences = {name: "" for name in components(model.config)} if licence else _licences(model.config)
    if not licences:
        raise UserError(
            "the licence of these weights is not known: give --licence, e.g. apache-2.0 or other "
            "(what was fine-tuned from SVD stays under Stability's licence)"
        )
    sections = [_header(licence, metrics), _ABOUT.format(version=__version__), _sizes(model)]
    sections += [_settings_of(model.config), _origins(model.config, licence, licences)]
    return "\n\n".join(sections + ([_measured(metrics)] if metrics else [])) + "\n"


_ABOUT = """# KeySync model for keysync_jax

Two-stage latent video diffusion for lip synchronisation: the mouth of a video follows another voice. A model
directory of keysync_jax {version}.

```sh
pip install 'keysync_jax[hub,landmarks]'
keysync dub talk.mp4 voice.wav -o dubbed.mp4 --model hub:OWNER/NAME --allow-download
```"""


def _licences(config: ModelConfig) -> dict[str, str]:
    """Component -> licence, where every component comes from a file of the release's table; else empty."""
    found = {}
    for component in components(config):
        origin = config.provenance.get(component, "")
        for file in released.FILES:
            at = file.address
            if origin.startswith(f"{PREFIX}{at.repo}@") and f"/{at.file} sha256:" in origin:
                found[component] = file.licence
    return found if found.keys() == set(components(config)) else {}


def _header(licence: str | None, metrics: Mapping[str, Any] | None) -> str:
    # A JSON value is one of YAML, whatever is in it.
    lines = ["---", f"license: {json.dumps(licence or 'other')}"]
    if licence is None:
        lines.append('license_name: "of-each-part"')
    lines += ['library_name: "keysync_jax"', f'pipeline_tag: "{_TASK}"', f"tags: {json.dumps(TAGS)}"]
    if metrics is not None:
        result = {
            "task": {"type": _TASK, "name": "lip synchronisation"},
            "dataset": {"type": "synthetic", "name": _world(metrics)},
            "metrics": [
                {"type": name, "name": MEASURES[name][0], "value": round(value, 4)}
                for name, value in metrics["values"].items()
            ],
        }
        lines.append(f"model-index: {json.dumps([{'name': 'keysync_jax model', 'results': [result]}])}")
    return "\n".join([*lines, "---"])


def _sizes(model: Model) -> str:
    rows = []
    for component in components(model.config):
        path = model.folder / f"{component}.safetensors"
        numbers = sum(math.prod(shape) for shape in TensorFile(path).shapes.values())
        sha256 = model.hashes[path.name]
        rows.append((f"`{component}`", f"{numbers:,}", f"{path.stat().st_size:,}", f"`{sha256}`"))
    return "## Sizes\n\n" + _table(("component", "parameters", "bytes", "SHA-256"), rows)


def _settings_of(config: ModelConfig) -> str:
    rows = []
    for kind in typing.get_args(StageKind):
        stage = config.stage(kind)
        rows.append((kind, stage.audio_encoder, ", ".join(map(str, stage.unet.block_out_channels))))
    scales = to_dict(config.guidance).items()
    guidance = ", ".join(f"{name} {value}" for name, value in scales if value is not None)
    steps = f"Steps: {config.steps}"
    if config.sigmas:
        steps = f"Noise levels: {', '.join(map(str, config.sigmas))}"
    return (
        "## Stages\n\nEach hears through the encoder that it was trained on; another loses the sync.\n\n"
        + _table(("stage", "audio encoder", "widths of the U-Net"), rows)
        + f"\n\nCrops of {config.crop_size} pixels, 25 frames a second, {config.keyframe.frames} a call. "
        f"Mask: {config.mask}. Guidance: {guidance}. {steps}."
    )


def _origins(config: ModelConfig, licence: str | None, licences: Mapping[str, str]) -> str:
    origins = {name: config.provenance.get(name, "not noted") for name in components(config)}
    if licence is not None:
        table = _table(("component", "origin"), [(f"`{n}`", origin) for n, origin in origins.items()])
        return f"## Provenance and licence\n\n{table}\n\nLicence, as its publisher states it: {licence}."
    rows = [(f"`{name}`", origin, licences[name]) for name, origin in origins.items()]
    return "## Provenance and licence\n\n" + _table(("component", "origin", "licence"), rows)


def _measured(metrics: Mapping[str, Any]) -> str:
    rows = [
        (f"`{name}`", f"{value:.3f}", str(MEASURES[name][1] or ""), MEASURES[name][0])
        for name, value in metrics["values"].items()
    ]
    return (
        "## Measured\n\nBy `keysync synth-eval` in a drawn world, where the truth is known "
        f"({_world(metrics)}). Nothing here was measured on real faces.\n\n"
        + _table(("measure", "value", "bar", "what"), rows)
    )


def _world(metrics: Mapping[str, Any]) -> str:
    clips, seconds, seed = (metrics[key] for key in ("clips", "seconds", "seed"))
    return f"{clips} clips of {seconds:g} s, seed {seed}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])
