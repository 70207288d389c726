"""Tiny speech encoders whose output depends on every part of the input: nothing fades to its bias."""

import math

import numpy as np

from keysync_jax.config import SpeechConfig
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.speech import SpeechModel
from keysync_jax.parity import rules

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 100,
}


def tiny_speech(kind, **sizes):
    """Config, graph and parameters (numpy) of a tiny encoder."""
    config = SpeechConfig(kind, **{**SIZES, **sizes})
    graph, specs = shapes(lambda rngs: SpeechModel(config, rngs=rngs))
    return config, graph, {path: parameter(path, spec.shape) for path, spec in specs.items()}


def parameter(path, shape):
    """A random parameter that keeps the size of what passes through."""
    x = rules.array(path, shape)
    match path.rpartition(".")[2]:
        case "kernel":
            return x * np.float32(1.5 / math.sqrt(math.prod(shape[:-1])))
        case "scale" | "gru_rel_pos_const":
            return 1 + np.float32(0.1) * x
        case "weight_g":
            return np.abs(x) + np.float32(0.5)
        case "bias":
            return np.float32(0.1) * x
        case _:
            return x
