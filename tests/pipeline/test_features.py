"""Audio features of whole clips: exact piece by piece, whatever the length, without a new compilation."""

import jax
import numpy as np
import pytest

from keysync_jax.config import SpeechConfig
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import bind
from keysync_jax.pipeline.features import audio_features, normalise_wave, stretch_nearest
from keysync_jax.pipeline.speech_stream import Moments, Pieces, hidden_states
from tests.tiny_speech import tiny_speech

SMALL = Pieces(front=8, block=16)


def tiny(kind, **sizes):
    """A tiny config, its whole-pass function and parameters."""
    config, graph, params = tiny_speech(kind, **sizes)
    return config, jax.jit(lambda p, x: bind(graph, p)(x)), params


def noise(samples, seed=0):
    """A wave that is louder at its end, so that statistics of a part are not those of the whole."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(samples) * np.linspace(0.2, 2.0, samples) + 0.3).astype(np.float32)


def samples_for(vectors, extra=0):
    return 400 + 320 * (vectors - 1) + extra


class CompileCount:
    """Counts the programs that jax compiles, of any function."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


class TestStreaming:
    @pytest.mark.parametrize(
        ("kind", "lengths"),
        [("hubert", ((1, 160), (8, 319), (16, 0), (33, 5))), ("wavlm", ((8, 0), (15, 319), (17, 0)))],
    )
    def test_equals_the_whole_pass_around_the_edges_of_pieces(self, kind, lengths):
        config, whole, params = tiny(kind)
        for vectors, extra in lengths:
            wave = noise(samples_for(vectors, extra), vectors)
            found = hidden_states(config, params, wave, pieces=SMALL)
            wanted = np.asarray(whole(params, wave[None]))[0]
            assert found.shape == wanted.shape == (vectors, 32)
            assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()

    def test_equals_the_whole_pass_with_an_odd_kernel_and_biased_convolutions(self):
        config, whole, params = tiny("wav2vec2", num_conv_pos_embeddings=7, conv_bias=True)
        wave = noise(samples_for(37))
        wanted = np.asarray(whole(params, wave[None]))[0]
        found = hidden_states(config, params, wave, pieces=SMALL)
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()

    def test_equals_the_whole_pass_on_a_minute(self):
        config, whole, params = tiny("wavlm")
        wave = noise(65 * 16000)
        wanted = np.asarray(whole(params, wave[None]))[0]
        found = hidden_states(config, params, wave, pieces=Pieces(front=100, block=128))
        assert len(found) == 3249
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()

    @pytest.mark.parametrize("kind", ["hubert", "wavlm"])
    def test_a_longer_clip_compiles_nothing_new(self, kind):
        config, _, params = tiny(kind, hidden_size=40)
        compiled = CompileCount()
        audio_features(config, params, noise(3 * 640), 3, pieces=SMALL)
        first = compiled.count
        audio_features(config, params, noise(70 * 640 + 11), 70, pieces=SMALL)
        audio_features(config, dict(params), noise(50 * 640), 81, pieces=SMALL)
        assert first > 0
        assert compiled.count == first

    def test_a_wave_shorter_than_one_vector_is_refused(self):
        config, _, params = tiny("hubert")
        with pytest.raises(ValueError, match="399 samples"):
            hidden_states(config, params, noise(399))


class TestAudioFeatures:
    def test_hubert_normalises_the_clip_and_ends_in_a_zero_vector(self):
        config, whole, params = tiny("hubert")
        wave = noise(20 * 640)
        features = audio_features(config, params, wave, 20, pieces=SMALL)
        normalised = (wave - wave.mean()) / np.sqrt(wave.var(ddof=1) + 1e-7)
        wanted = np.asarray(whole(params, normalised[None]))[0]
        assert features.shape == (20, 2, 32)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features.reshape(40, 32)[:39], wanted, atol=2e-5 * np.abs(wanted).max())
        assert not features[19, 1].any()

    def test_wavlm_repeats_its_first_vector_and_takes_the_wave_as_it_is(self):
        config, whole, params = tiny("wavlm", normalise_wave=False)
        wave = noise(20 * 640)
        features = audio_features(config, params, wave, 20, pieces=SMALL).reshape(40, 32)
        wanted = np.asarray(whole(params, wave[None]))[0]
        np.testing.assert_allclose(features[1:], wanted, atol=1e-5 * np.abs(wanted).max())
        np.testing.assert_array_equal(features[0], features[1])

    def test_the_wave_is_trimmed_or_filled_up_to_whole_frames(self):
        config, _, params = tiny("wavlm", normalise_wave=False)
        wave = noise(5 * 640)
        wanted = audio_features(config, params, wave, 5, pieces=SMALL)
        trimmed = audio_features(config, params, np.append(wave, noise(300)), 5, pieces=SMALL)
        np.testing.assert_array_equal(trimmed, wanted)
        filled = audio_features(config, params, wave[:-100], 5, pieces=SMALL)
        with_zeros = audio_features(config, params, np.append(wave[:-100], np.zeros(100)), 5, pieces=SMALL)
        np.testing.assert_array_equal(filled, with_zeros)
        assert not np.array_equal(filled, wanted)

    def test_one_frame(self):
        config, _, params = tiny("hubert")
        assert audio_features(config, params, noise(640), 1).shape == (1, 2, 32)

    def test_empty_wave_and_foreign_encoder_are_refused(self):
        config, _, params = tiny("hubert")
        with pytest.raises(UserError, match="no samples"):
            audio_features(config, params, noise(0), 1)
        other = SpeechConfig("hubert", conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,))
        with pytest.raises(UserError, match="50 vectors"):
            audio_features(other, {}, noise(640), 1)


def test_normalise_wave_is_exact_far_from_zero_and_on_silence():
    wave = (1000 + np.random.default_rng(0).standard_normal(3 << 20)).astype(np.float32)
    found = normalise_wave(wave)
    exact = wave.astype(np.float64)
    wanted = (exact - exact.mean()) / np.sqrt(exact.var(ddof=1) + 1e-7)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-4
    assert not normalise_wave(np.zeros(640, np.float32)).any()


def test_normalise_wave_divides_by_the_unbiased_deviation():
    np.testing.assert_allclose(normalise_wave(np.array([1, 2, 3], np.float32)), [-1, 0, 1], atol=1e-6)


def test_moments_merge_to_those_of_the_whole():
    x = 100 + np.random.default_rng(0).standard_normal((1000, 3))
    moments = Moments()
    for piece in np.split(x, [1, 10, 700]):
        moments = moments.merge(len(piece), piece.mean(0), ((piece - piece.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.variance, x.var(0), rtol=1e-12)


@pytest.mark.parametrize("frames", [1, 2, 25, 500, 15000])
def test_stretch_nearest_equals_torch(frames):
    torch = pytest.importorskip("torch")
    vectors = np.arange(2 * frames - 1, dtype=np.float32)[:, None]
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(vectors.T[None]), size=2 * frames, mode="nearest"
    )
    np.testing.assert_array_equal(stretch_nearest(vectors, 2 * frames)[:, 0], resized[0, 0].numpy())
