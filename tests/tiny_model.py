"""A tiny KeySync checkpoint set, every tensor by the rule of its name, in the release's containers."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from keysync_jax import files
from keysync_jax.config import SpeechConfig
from keysync_jax.convert.checkpoint import AudioSource, Checkpoints
from keysync_jax.convert.speech import microsoft_table, transformers_table
from keysync_jax.convert.table import Table
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.speech import SpeechModel
from keysync_jax.parity import rules
from keysync_jax.tensorfile import TensorFile
from tests.convert.checkpoints import save_deepspeed, save_microsoft

HEAD_DIM = 16

# The width that the tiny stages take is the full encoders'; everything else is small.
_SIZES = {"num_hidden_layers": 1, "intermediate_size": 96, "conv_dim": (24,) * 7}
HUBERT = SpeechConfig("hubert", **_SIZES)
WAVLM = SpeechConfig("wavlm", normalise_wave=False, **_SIZES)


def rule_tensors(shapes_of: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Every tensor by the rule; scales of weight norm are positive, as trained ones are."""
    tensors = {}
    for key, shape in shapes_of.items():
        tensor = rules.weight(key, shape)
        positive = key.endswith(("weight_g", "original0"))
        tensors[key] = np.abs(tensor) + np.float32(0.5) if positive else tensor
    return tensors


def speech_tensors(config: SpeechConfig, table: Table) -> dict[str, np.ndarray]:
    """An encoder's state dict in the table's layout."""
    _, abstract = shapes(lambda rngs: SpeechModel(config, rngs=rngs))
    zeros = {name: np.zeros(leaf.shape, np.float32) for name, leaf in abstract.items()}
    return rule_tensors({key: list(x.shape) for key, x in table.to_torch(zeros).items()})


def write_hubert(folder: Path, config: SpeechConfig = HUBERT) -> Path:
    """A transformers folder."""
    from safetensors.numpy import save_file

    folder.mkdir()
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    kind, _, _ = values.pop("kind"), values.pop("normalise_wave"), values.pop("num_buckets")
    del values["max_bucket_distance"]
    architecture = {"model_type": kind, "feat_extract_norm": "group", "do_stable_layer_norm": False}
    architecture |= {"hidden_act": "gelu", "feat_extract_activation": "gelu", "feat_proj_layer_norm": True}
    (folder / "config.json").write_text(json.dumps(architecture | values))
    save_file(speech_tensors(config, transformers_table(config)), folder / "model.safetensors")
    return folder


def write_wavlm(path: Path, config: SpeechConfig = WAVLM) -> Path:
    """Microsoft's `.pt`."""
    conv = [*zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)]
    cfg = {
        "extractor_mode": "default",
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": "gelu",
        "layer_norm_first": False,
        "conv_feature_layers": str(conv),
        "conv_bias": config.conv_bias,
        "normalize": False,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "relative_position_embedding": True,
        "num_buckets": config.num_buckets,
        "max_distance": config.max_bucket_distance,
        "gru_rel_pos": True,
    }
    tensors = speech_tensors(config, microsoft_table(config))
    save_microsoft(path, tensors | {"mask_emb": np.zeros(config.hidden_size, np.float32)}, cfg)
    return path


def write_checkpoints(folder: Path, golden: Path) -> Checkpoints:
    """The whole set: two stages as DeepSpeed wrote them, with their surplus, a VAE, two encoders."""
    tensors = json.loads((golden / "tiny.manifest.json").read_text())["tensors"]
    decoder = {k: v for k, v in tensors["first_stage"].items() if ".decoder." in k}
    surplus = {**decoder, "conditioner.embedders.0.encoder.layers.0.weight": [4, 4]}
    for kind in ("keyframe", "interpolation"):
        save_deepspeed(folder / f"{kind}.pt", rule_tensors({**tensors[kind], **surplus}))
    save_deepspeed(folder / "vae.pt", rule_tensors(tensors["first_stage"]))
    return Checkpoints(
        folder / "keyframe.pt",
        folder / "interpolation.pt",
        folder / "vae.pt",
        {
            "keyframe": AudioSource("hubert", write_hubert(folder / "hubert")),
            "interpolation": AudioSource("wavlm", write_wavlm(folder / "wavlm.pt")),
        },
    )


def main() -> None:
    """Writes the tiny model directory that docs/training.md starts from."""
    import sys
    import tempfile

    from keysync_jax.convert.checkpoint import convert

    with tempfile.TemporaryDirectory() as folder:
        convert(write_checkpoints(Path(folder), Path(__file__).parent / "golden"), sys.argv[1], HEAD_DIM)


def tensors(model: Path, component: str) -> dict[str, np.ndarray]:
    return dict(TensorFile(model / f"{component}.safetensors"))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(b[k]).tobytes()
        for k, x in a.items()
    )


class Hashed:
    """Bytes that are hashed, by file name."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.bytes: Counter[str] = Counter()
        hashed = files.sha256_of

        def counted(path: Path, progress: Callable[[int], object] | None = None) -> str:
            self.bytes[Path(path).name] += Path(path).stat().st_size
            return hashed(path, progress)

        patch.setattr(files, "sha256_of", counted)


if __name__ == "__main__":
    main()
