"""Speech encoders against the reference's numbers and against transformers; their conversion."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from keysync_jax.config import SpeechConfig
from keysync_jax.convert.speech import (
    microsoft_table,
    speech_config_from_microsoft,
    speech_config_from_transformers,
    speech_table,
    transformers_table,
)
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.relative_bias import block_bias, buckets
from keysync_jax.nn.speech import SpeechModel
from keysync_jax.parity import rules
from keysync_jax.pipeline.features import audio_features
from tests.tiny_speech import tiny_speech

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("hubert", "wav2vec2", "wavlm")
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (24,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def network(config):
    graph, specs = shapes(lambda rngs: SpeechModel(config, rngs=rngs))
    return graph, {path: spec.shape for path, spec in specs.items()}


def relative_error(found, wanted):
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def wavlm_golden():
    """Config, state dict by the rule, and the stored arrays."""
    manifest = json.loads((GOLDEN / "dev.wavlm.json").read_text())

    def weight(key, shape):
        name = f"wavlm.{key}"
        if key.endswith("weight_g"):
            return np.abs(rules.array(name, shape)) + np.float32(0.5)
        if key.endswith("grep_a"):
            return np.float32(1) + np.float32(0.1) * rules.array(name, shape)
        return rules.weight(name, shape)

    tensors = {key: weight(key, shape) for key, shape in manifest["keys"].items()}
    return manifest["config"], tensors, load_file(GOLDEN / "dev.wavlm.safetensors")


def torch_model(kind):
    """A random tiny model of transformers and its state dict; no parameter is left at its trivial start."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prefix = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}[kind]
    config = getattr(transformers, f"{prefix}Config")(
        **{k: list(v) if k == "conv_dim" else v for k, v in TINY.items()}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}
    return model, config.to_dict(), tensors


class TestAgainstReference:
    def test_wavlm_golden_hidden_states(self):
        values, tensors, golden = wavlm_golden()
        config = speech_config_from_microsoft(values)
        graph, sizes = network(config)
        params = microsoft_table(config).to_jax(tensors, sizes)
        wave = golden["in/raw_audio_frames"].reshape(1, -1)
        hidden = jax.jit(lambda p, x: bind(graph, p)(x))(params, wave)
        assert relative_error(hidden, golden["out/hidden"]) < 1e-5

    def test_wavlm_golden_features_of_frames(self):
        values, tensors, golden = wavlm_golden()
        config = speech_config_from_microsoft(values)
        params = microsoft_table(config).to_jax(tensors, network(config)[1])
        features = audio_features(config, params, golden["in/raw_audio_frames"].reshape(-1), 25)
        assert features.shape == (25, 2, 48)
        assert relative_error(features, golden["out/frames"]) < 1e-5

    @pytest.mark.parametrize("kind", KINDS)
    def test_transformers_at_several_lengths(self, kind):
        torch = pytest.importorskip("torch")
        model, values, tensors = torch_model(kind)
        config = speech_config_from_transformers(values)
        graph, sizes = network(config)
        params = speech_table(config, tensors).to_jax(tensors, sizes)
        whole = jax.jit(lambda p, x: bind(graph, p)(x))
        for samples in (400, 16319, 40123):
            wave = np.random.default_rng(samples).standard_normal((2, samples), np.float32)
            with torch.no_grad():
                wanted = model(torch.from_numpy(wave)).last_hidden_state.numpy()
            found = whole(params, wave)
            assert found.shape == wanted.shape == (2, config.vectors(samples), config.hidden_size)
            assert relative_error(found, wanted) < 2e-5

    def test_buckets_equal_those_of_transformers(self):
        torch = pytest.importorskip("torch")
        wavlm = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
        for number, reach in ((320, 800), (32, 128), (20, 64)):
            attention = wavlm.WavLMAttention(8, 2, num_buckets=number, max_distance=reach)
            distance = np.arange(-3 * reach, 3 * reach + 1)
            wanted = attention._relative_positions_bucket(torch.from_numpy(distance)).numpy()
            found = buckets(number, reach)[np.clip(distance, -reach, reach) + reach]
            np.testing.assert_array_equal(found, wanted)


def test_block_bias_is_a_block_of_the_whole_bias():
    line = np.arange(2 * 11, dtype=np.float32).reshape(2, 11)
    keys, queries = np.arange(20), np.arange(17)
    whole = line[:, np.clip(keys - queries[:, None], -5, 5) + 5]
    np.testing.assert_array_equal(block_bias(line, 0, 17, 20), whole)
    np.testing.assert_array_equal(block_bias(line, 4 - 9, 8, 7), whole[:, 9:17, 4:11])


def test_intermediates_are_named_by_part_and_end_in_the_result():
    _, graph, params = tiny_speech("wavlm")
    wave = np.random.default_rng(0).standard_normal((1, 4000), np.float32)
    found, result = jax.jit(lambda p, x: ((m := bind(graph, p)).intermediates(x), m(x)))(params, wave)
    assert sorted(found) == [
        "encoder.layer_norm",
        *(f"encoder.layers.{i}" for i in range(2)),
        "feature_extractor",
        "feature_projection",
    ]
    np.testing.assert_array_equal(found["encoder.layers.1"], result)


def test_bfloat16_stays_near_float32():
    config, graph, params = tiny_speech("wavlm")
    low, _ = shapes(lambda rngs: SpeechModel(config, dtype=jnp.bfloat16, rngs=rngs))
    wave = np.random.default_rng(0).standard_normal((1, 16000), np.float32)
    found, wanted = jax.jit(lambda p, x: (bind(low, p)(x), bind(graph, p)(x)))(params, wave)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found.astype(jnp.float32), wanted) < 0.1


class TestConversion:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("prefixed", [False, True])
    @pytest.mark.parametrize("older_names", [False, True])
    def test_transformers_layout_round_trip(self, kind, prefixed, older_names):
        _, values, tensors = torch_model(kind)
        tensors.pop("masked_spec_embed")
        if older_names:
            names = {"original0": "weight_g", "original1": "weight_v"}
            for new, old in names.items():
                stem = "encoder.pos_conv_embed.conv."
                tensors[stem + old] = tensors.pop(f"{stem}parametrizations.weight.{new}")
        if prefixed:
            tensors = {f"{kind}.{k}": v for k, v in tensors.items()}
        config = speech_config_from_transformers(values)
        table = speech_table(config, tensors)
        surplus = {"lm_head.weight": np.zeros(3), f"{kind}.masked_spec_embed": np.zeros(2)}
        self.check_bits(table, tensors, surplus, config)

    def test_microsoft_layout_round_trip(self):
        values, tensors, _ = wavlm_golden()
        mask = {"mask_emb": tensors.pop("mask_emb")}
        config = speech_config_from_microsoft(values)
        self.check_bits(speech_table(config, tensors), tensors, mask, config)

    def check_bits(self, table, tensors, surplus, config):
        back = table.to_torch(table.to_jax({**tensors, **surplus}, network(config)[1]))
        assert back.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert back[key].dtype == tensor.dtype
            np.testing.assert_array_equal(back[key], tensor)

    @pytest.mark.parametrize("kind", KINDS)
    def test_full_size_network_has_exactly_the_tables_paths(self, kind):
        config = SpeechConfig(kind)
        sizes = network(config)[1]
        assert {row.path for row in transformers_table(config).rows} == set(sizes)
        assert sizes["encoder.pos_conv_embed.conv.weight_v"] == (128, 48, 768)

    def test_missing_and_misshapen_tensors_are_named(self):
        values, tensors, _ = wavlm_golden()
        config = speech_config_from_microsoft(values)
        sizes = network(config)[1]
        key = "encoder.layers.1.self_attn.grep_a"
        without = {k: v for k, v in tensors.items() if k != key}
        with pytest.raises(UserError, match=rf"W\.pt: tensor '{key}' is missing"):
            speech_table(config, without).to_jax(without, sizes, "W.pt")
        with pytest.raises(UserError, match=rf"'{key}' has shape \[1, 5, 1, 1\].*needs \[1, 4, 1, 1\]"):
            microsoft_table(config).to_jax({**tensors, key: np.ones((1, 5, 1, 1))}, sizes)
        with pytest.raises(UserError, match=r"'encoder\.extra' is not part of this network"):
            microsoft_table(config).to_jax({**tensors, "encoder.extra": np.ones(1)}, sizes)


class TestConfigs:
    def test_sizes_of_microsofts_checkpoint(self):
        config = speech_config_from_microsoft(wavlm_golden()[0])
        assert (config.conv_kernel, config.conv_stride) == ((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
        assert (config.hidden_size, config.num_attention_heads, config.max_bucket_distance) == (48, 4, 800)
        assert not config.normalise_wave

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("feat_extract_norm", "layer"),
            ("do_stable_layer_norm", True),
            ("feat_proj_layer_norm", False),
            ("conv_pos_batch_norm", True),
            ("add_adapter", True),
            ("hidden_act", "gelu_new"),
        ],
    )
    def test_variants_of_transformers_are_refused(self, key, value):
        with pytest.raises(UserError, match=rf"d/config.json: {key} is {value!r}"):
            speech_config_from_transformers({"model_type": "hubert", key: value}, "d/config.json")

    def test_variants_of_microsoft_are_refused(self):
        values = wavlm_golden()[0]
        for key, value in (("extractor_mode", "layer_norm"), ("normalize", True), ("gru_rel_pos", False)):
            with pytest.raises(UserError, match=f"{key} is"):
                speech_config_from_microsoft({**values, key: value})

    def test_other_networks_and_broken_values_are_refused(self):
        with pytest.raises(UserError, match="model_type is 'whisper'"):
            speech_config_from_transformers({"model_type": "whisper"})
        with pytest.raises(UserError, match="not a multiple of its 5 heads"):
            speech_config_from_transformers({"model_type": "hubert", "num_attention_heads": 5})
        with pytest.raises(UserError, match=r"config\.json\.hidden_size"):
            speech_config_from_transformers({"model_type": "hubert", "hidden_size": "wide"})
        values = wavlm_golden()[0]
        for text in ("__import__('os')", "[(1, 2)]", "512", "[(512, 10, 5)] +"):
            with pytest.raises(UserError, match="conv_feature_layers"):
                speech_config_from_microsoft({**values, "conv_feature_layers": text})
        values.pop("num_buckets")
        with pytest.raises(UserError, match="'num_buckets' is missing"):
            speech_config_from_microsoft(values)

    @pytest.mark.parametrize(
        "text",
        [
            "[(512, 10, 5)] * 1000000000",
            "10000 * [(512, 10, 5)] * 10000",
            "'a' * 1000000000",
            "[(1, 1, 1)] + " * 5000 + "[]",
            "[(1, 1, 1)]" + " * 1" * 5000,
        ],
    )
    def test_layers_without_a_bound_are_refused_at_once(self, text):
        values = {**wavlm_golden()[0], "conv_feature_layers": text}
        begun = time.process_time()
        with pytest.raises(UserError, match=r"conv_feature_layers .* cannot be read") as error:
            speech_config_from_microsoft(values)
        assert time.process_time() - begun < 1
        assert len(str(error.value)) < 200

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", -1),
            ("num_attention_heads", 0),
            ("hidden_size", 12 << 20),
            ("num_conv_pos_embeddings", -1),
            ("conv_dim", []),
            ("conv_stride", [2] * 1000),
        ],
    )
    def test_sizes_that_no_encoder_has_are_refused_before_it_is_built(self, key, value):
        with pytest.raises(UserError, match=rf"hubert: {key} (is|has)"):
            speech_config_from_transformers({"model_type": "hubert", key: value})

    def test_a_setting_that_is_a_tensor_is_another_value(self):
        with pytest.raises(UserError, match="normalize is"):
            speech_config_from_microsoft({**wavlm_golden()[0], "normalize": np.zeros(2)})

    def test_receptive_field(self):
        config = SpeechConfig("hubert")
        assert (config.hop, config.receptive_field) == (320, 400)
        assert [config.vectors(n) for n in (399, 400, 719, 720, 25 * 640)] == [0, 1, 1, 2, 49]


def test_importing_the_encoders_does_not_import_torch():
    code = (
        "import sys, keysync_jax.pipeline.features, keysync_jax.convert.speech;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_graph_is_compiled_once_for_equal_configs():
    config = SpeechConfig("wavlm", **TINY)
    graph, sizes = network(config)
    again, _ = network(SpeechConfig("wavlm", **TINY))
    calls = []

    @jax.jit
    def traced(params, wave):
        calls.append(1)
        return bind(graph, params)(wave)

    params = {p: np.zeros(s, np.float32) for p, s in sizes.items()}
    traced(params, np.zeros((1, 800), np.float32))
    traced(dict(params), np.ones((1, 800), np.float32))
    assert graph == again
    assert len(calls) == 1
