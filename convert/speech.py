"""Conversion of speech encoders: transformers' HuBERT, wav2vec2 and WavLM, and Microsoft's WavLM.

The layouts hold the same tensors under other names, so one generator of rows serves them all; a
`_Layout` gives a layout's names. Our paths are transformers' names.
"""

import ast
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keysync_jax.config import SpeechConfig, from_dict
from keysync_jax.convert.table import CONV1D, LINEAR, Op, Row, Table, affine, norm, under
from keysync_jax.errors import UserError


@dataclass(frozen=True)
class _Layout:
    """Names of the parts; those of a layer are relative to `encoder.layers.N.`."""

    conv: str = "feature_extractor.conv_layers.{}.conv"
    conv_norm: str = "feature_extractor.conv_layers.0.layer_norm"
    feature_norm: str = "feature_projection.layer_norm"
    projection: str = "feature_projection.projection"
    positions: str = "encoder.pos_conv_embed.conv"
    weight_g: str = "weight_g"
    weight_v: str = "weight_v"
    buckets: str = "encoder.layers.0.attention.rel_attn_embed"
    attention: str = "attention"
    gate_linear: str = "attention.gru_rel_pos_linear"
    gate_const: str = "attention.gru_rel_pos_const"
    attention_norm: str = "layer_norm"
    ffn_in: str = "feed_forward.intermediate_dense"
    ffn_out: str = "feed_forward.output_dense"


_WEIGHT_NORM = _Layout()
_PARAMETRISED = _Layout(
    weight_g="parametrizations.weight.original0",
    weight_v="parametrizations.weight.original1",
)
_MICROSOFT = _Layout(
    conv="feature_extractor.conv_layers.{}.0",
    conv_norm="feature_extractor.conv_layers.0.2",
    feature_norm="layer_norm",
    projection="post_extract_proj",
    positions="encoder.pos_conv.0",
    buckets="encoder.layers.0.self_attn.relative_attention_bias",
    attention="self_attn",
    gate_linear="self_attn.grep_linear",
    gate_const="self_attn.grep_a",
    attention_norm="self_attn_layer_norm",
    ffn_in="fc1",
    ffn_out="fc2",
)

_PER_HEAD = Op(drop=(0, 2, 3))
"""One number a head, [1, H, 1, 1] -> [H]."""

_HEADS_OF_TRAINING = (
    r"(?:\w+\.)?masked_spec_embed$",
    r"(?:lm_head|quantizer|project_hid|project_q|projector|classifier)\.",
    r"layer_weights$",
)
"""What pretraining or recognition adds to a checkpoint of transformers."""


def _rows(config: SpeechConfig, names: _Layout) -> Iterator[Row]:
    ours = _Layout()
    for i in range(len(config.conv_dim)):
        yield from affine(names.conv.format(i), ours.conv.format(i), CONV1D, bias=config.conv_bias)
    yield from norm(names.conv_norm, ours.conv_norm)
    yield from norm(names.feature_norm, ours.feature_norm)
    yield from affine(names.projection, ours.projection)
    yield Row(f"{names.positions}.bias", f"{ours.positions}.bias")
    yield Row(f"{names.positions}.{names.weight_g}", f"{ours.positions}.weight_g", CONV1D)
    yield Row(f"{names.positions}.{names.weight_v}", f"{ours.positions}.weight_v", CONV1D)
    yield from norm("encoder.layer_norm", "encoder.layer_norm")
    if config.kind == "wavlm":
        yield Row(f"{names.buckets}.weight", "encoder.rel_attn_embed.embedding")
    for i in range(config.num_hidden_layers):
        prefix = f"encoder.layers.{i}."
        yield from under(prefix, prefix, _layer_rows(config, names))


def _layer_rows(config: SpeechConfig, names: _Layout) -> Iterator[Row]:
    ours = _Layout()
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from affine(f"{names.attention}.{part}", f"{ours.attention}.{part}", LINEAR)
    if config.kind == "wavlm":
        yield from affine(names.gate_linear, ours.gate_linear)
        yield Row(names.gate_const, ours.gate_const, _PER_HEAD)
    yield from norm(names.attention_norm, ours.attention_norm)
    yield from affine(names.ffn_in, ours.ffn_in)
    yield from affine(names.ffn_out, ours.ffn_out)
    yield from norm("final_layer_norm", "final_layer_norm")


def transformers_table(config: SpeechConfig, prefix: str = "", parametrised: bool = True) -> Table:
    """transformers' `HubertModel`, `Wav2Vec2Model` or `WavLMModel`.

    Args:
      prefix: with its dot, e.g. `"wav2vec2."` in a checkpoint of `Wav2Vec2ForCTC`.
      parametrised: whether the positional convolution has PyTorch's newer names of weight norm
        (`parametrizations.weight.original0`) or the older ones (`weight_g`).
    """
    layout = _PARAMETRISED if parametrised else _WEIGHT_NORM
    return Table(list(under(prefix, "", _rows(config, layout))), ignore=_HEADS_OF_TRAINING)


def microsoft_table(config: SpeechConfig) -> Table:
    """Microsoft's `WavLM-Base+.pt`, below its key `model`."""
    return Table(
        list(_rows(config, _MICROSOFT)), ignore=(r"mask_emb$", r"final_proj\.", r"label_embs_concat$")
    )


def speech_table(config: SpeechConfig, keys: Collection[str]) -> Table:
    """The table of the layout that these keys are in."""
    if "post_extract_proj.weight" in keys or "encoder.layers.0.fc1.weight" in keys:
        return microsoft_table(config)
    prefix = f"{config.kind}." if any(k.startswith(f"{config.kind}.") for k in keys) else ""
    parametrised = any(k.endswith("parametrizations.weight.original0") for k in keys)
    return transformers_table(config, prefix, parametrised)


_KINDS = ("hubert", "wav2vec2", "wavlm")

_NEEDED_IN_TRANSFORMERS: Mapping[str, Any] = {
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "add_adapter": False,
    "adapter_attn_dim": None,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
}

_NEEDED_BY_MICROSOFT: Mapping[str, Any] = {
    "extractor_mode": "default",
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "normalize": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}


def speech_config_from_transformers(values: Mapping[str, Any], source: str = "config.json") -> SpeechConfig:
    """The sizes from transformers' `config.json`.

    Raises:
      UserError: another network, or a variant whose arithmetic differs (large models: layer norm in
        the front end, pre-norm transformer).
    """
    kind = values.get("model_type")
    if kind not in _KINDS:
        raise UserError(f"{source}: model_type is {kind!r}, an audio encoder is one of {', '.join(_KINDS)}")
    _require(values, _NEEDED_IN_TRANSFORMERS, source)
    names = {f.name for f in dataclasses.fields(SpeechConfig)} - {"kind", "normalise_wave"}
    sizes = {name: values[name] for name in names if name in values}
    return _checked({"kind": kind, "normalise_wave": kind != "wavlm", **sizes}, source)


def speech_config_from_microsoft(cfg: Mapping[str, Any], source: str = "cfg") -> SpeechConfig:
    """The sizes from the entry `cfg` of Microsoft's WavLM checkpoint.

    Raises:
      UserError: a variant whose arithmetic differs (WavLM-Large), or an entry that is missing.
    """
    _require(cfg, _NEEDED_BY_MICROSOFT, source)
    names = {
        "hidden_size": "encoder_embed_dim",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_embed_dim",
        "conv_bias": "conv_bias",
        "num_conv_pos_embeddings": "conv_pos",
        "num_conv_pos_embedding_groups": "conv_pos_groups",
        "num_buckets": "num_buckets",
        "max_bucket_distance": "max_distance",
    }
    for key in (*names.values(), "conv_feature_layers"):
        if key not in cfg:
            raise UserError(f"{source}: entry {key!r} is missing")
    dim, kernel, stride = _conv_layers(cfg["conv_feature_layers"], source)
    sizes = {ours: cfg[theirs] for ours, theirs in names.items()}
    convs = {"conv_dim": dim, "conv_kernel": kernel, "conv_stride": stride}
    return _checked({"kind": "wavlm", "normalise_wave": False, **sizes, **convs}, source)


def _require(values: Mapping[str, Any], needed: Mapping[str, Any], source: str) -> None:
    for key, wanted in needed.items():
        found = values.get(key, wanted)
        if type(found) is not type(wanted) or found != wanted:  # A tensor has no truth.
            raise UserError(
                f"{source}: {key} is {values[key]!r}, only base models with {wanted!r} "
                "(HuBERT-base, wav2vec2-base, WavLM-Base+) can be used"
            )


def _checked(values: dict[str, Any], source: str) -> SpeechConfig:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return from_dict(SpeechConfig, values, source)


_MOST_CONVOLUTIONS = 100
_LONGEST_TEXT = 1000
"""Characters that tell the convolutions; the released file has 41."""


def _conv_layers(text: Any, source: str) -> tuple[list[int], list[int], list[int]]:
    """Widths, kernels and strides from e.g. `"[(512,10,5)] + [(512,3,2)] * 4"`, without running it."""
    try:
        if len(text) > _LONGEST_TEXT:
            raise ValueError("too long")
        layers = _literal(ast.parse(text, mode="eval").body)
        dim, kernel, stride = (list(column) for column in zip(*layers, strict=True))
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: conv_feature_layers {text!r:.80} cannot be read") from error
    return dim, kernel, stride


def _literal(node: ast.expr) -> Any:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult)):
        return ast.literal_eval(node)
    left, right = _literal(node.left), _literal(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    layers, times = (left, right) if isinstance(left, list) else (right, left)
    if len(layers) * times > _MOST_CONVOLUTIONS:
        raise ValueError("too many layers")
    return layers * times
