"""Log-mel spectra as an audio encoder: the numbers, and a model without a file for them."""

import cmath
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.config import LogMelConfig, ModelConfig, SpeechConfig, from_dict, to_dict
from keysync_jax.convert.checkpoint import AudioSource
from keysync_jax.convert.export import export_torch
from keysync_jax.data.prepare import check, prepare
from keysync_jax.data.records import Dataset, audio_name
from keysync_jax.errors import UserError
from keysync_jax.media.audio import read_audio
from keysync_jax.model import components, maker, open_model, save_model
from keysync_jax.nn.functional import shapes
from keysync_jax.pipeline.dub import DubSettings, dub
from keysync_jax.pipeline.features import audio_features
from keysync_jax.pipeline.log_mel import log_mel
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.config import DataConfig, LossConfig, TrainConfig
from keysync_jax.train.data import Samples
from keysync_jax.train.export import export
from keysync_jax.train.fits import check_alike, check_fits
from tests.clips import face_landmarks, write_video, write_voice
from tests.train.test_export import write_run
from tests.train.tiny_training import parameters

CONFIG = LogMelConfig()
SILENCE = np.float32((math.log(CONFIG.floor) - CONFIG.mean) / CONFIG.std)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(samples) * np.geomspace(1e-4, 0.3, samples)).astype(np.float32)


def slow_vector(config: LogMelConfig, wave: np.ndarray, k: int) -> list[float]:
    """One vector without its context, by the definitions: a window, a DFT, triangles, a logarithm."""

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    hann = [0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)]
    at = [320 * k + 160 - 200 + n for n in range(400)]
    x = [h * (float(wave[i]) if 0 <= i < len(wave) else 0.0) for h, i in zip(hann, at, strict=True)]
    dft = [sum(v * cmath.exp(-2j * math.pi * f * n / 512) for n, v in enumerate(x)) for f in range(257)]
    power = [abs(c) ** 2 / sum(h * h for h in hann) for c in dft]
    lowest, highest = mel(config.lowest_hz), mel(config.highest_hz)
    edges = [lowest + (highest - lowest) * b / (config.bands + 1) for b in range(config.bands + 2)]
    hz = [700 * (10 ** (m / 2595) - 1) for m in edges]
    vector = []
    for low, peak, high in zip(hz, hz[1:], hz[2:], strict=False):
        weights = [
            max(0.0, (f - low) / (peak - low) if f <= peak else (high - f) / (high - peak))
            for f in (31.25 * i for i in range(257))
        ]
        band = sum(w * p for w, p in zip(weights, power, strict=True)) / sum(weights)
        vector.append((math.log(band + config.floor) - config.mean) / config.std)
    return vector


class TestNumbers:
    @pytest.mark.parametrize(
        "config",
        [CONFIG, LogMelConfig(bands=40, context=1, lowest_hz=0, highest_hz=8000, floor=1e-6, mean=1)],
    )
    def test_equal_the_definition(self, config: LogMelConfig) -> None:
        wave = noise(6 * 640 - 50)
        features = audio_features(config, {}, wave, 6)
        assert features.shape == (6, 2, config.hidden_size)
        assert features.dtype == np.float32
        slots = features.reshape(12, 2 * config.context + 1, config.bands)
        for k in (-1, 0, 5, 11, 12):
            wanted = slow_vector(config, wave, k)
            for centre in range(max(0, k - 1), min(12, k + 2)):
                np.testing.assert_allclose(slots[centre, k - centre + config.context], wanted, atol=2e-6)

    def test_white_noise_has_its_variance_as_power(self) -> None:
        wave = 0.1 * np.random.default_rng(0).standard_normal(16000 * 20).astype(np.float32)
        config = LogMelConfig(context=0, mean=0, std=1)
        power = np.exp(log_mel(config, wave, 1000)).mean(0)
        np.testing.assert_allclose(power, 0.01, rtol=0.15)

    def test_a_tone_is_in_its_band(self) -> None:
        config = LogMelConfig(context=0)
        for band in (0, 7, 31):
            tone = 0.1 * np.sin(2 * np.pi * config.edges_hz[band + 1] / 16000 * np.arange(16000))
            assert set(log_mel(config, tone, 50)[5:45].argmax(axis=1)) == {band}

    def test_speech_has_about_zero_mean_and_unit_variance(self, real: Path) -> None:
        wave = read_audio(real / "demo1_audio.wav")
        features = audio_features(CONFIG, {}, wave, len(wave) // 640)
        assert abs(features.mean()) < 0.1
        assert abs(features.std() - 1) < 0.1


class TestAlignment:
    def test_a_click_in_the_middle_of_a_frame_is_in_its_two_vectors(self) -> None:
        wave = np.zeros(20 * 640, np.float32)
        wave[9 * 640 + 320] = 0.5
        loud = audio_features(CONFIG, {}, wave, 20).reshape(40, 11, 32)[:, :, 16] > SILENCE
        found = {(int(k), int(slot) - 5) for k, slot in np.argwhere(loud)}
        assert found == {(click - slot, slot) for click in (18, 19) for slot in range(-5, 6)}

    @pytest.mark.parametrize("half", [0, 1])
    def test_a_click_in_the_middle_of_a_half_is_in_that_vector_alone(self, half: int) -> None:
        wave = np.zeros(20 * 640, np.float32)
        wave[9 * 640 + 160 + 320 * half] = 0.5
        plain = audio_features(LogMelConfig(context=0), {}, wave, 20)
        assert np.argwhere((plain > SILENCE).any(-1)).tolist() == [[9, half]]

    def test_neighbours_share_their_context(self) -> None:
        features = audio_features(CONFIG, {}, noise(8 * 640), 8).reshape(16, 11, 32)
        np.testing.assert_array_equal(features[1:, :-1], features[:-1, 1:])


class TestAnyLength:
    def test_blocks_change_no_bit(self) -> None:
        wave = noise(640 * 300 + 123)
        whole = log_mel(CONFIG, wave, 600)
        for block in (1, 7, 64, 609):
            np.testing.assert_array_equal(log_mel(CONFIG, wave, 600, block=block), whole)

    def test_a_part_of_a_long_clip_is_the_same_alone(self) -> None:
        wave = noise(640 * 5000)
        whole = audio_features(CONFIG, {}, wave, 5000)
        for first, count in ((0, 40), (2030, 37), (4960, 40)):
            alone = audio_features(CONFIG, {}, wave[first * 640 : (first + count) * 640], count)
            # Three frames hold the six vectors whose context or window leaves the part.
            np.testing.assert_array_equal(alone[3:-3], whole[first + 3 : first + count - 3])
        np.testing.assert_array_equal(alone[3:], whole[4963:])
        np.testing.assert_array_equal(audio_features(CONFIG, {}, wave[: 640 * 40], 40)[:37], whole[:37])

    def test_silence_is_a_constant(self) -> None:
        features = audio_features(CONFIG, {}, np.zeros(10 * 640, np.float32), 10)
        np.testing.assert_array_equal(features, np.full((10, 2, 352), SILENCE))
        assert SILENCE < -1.5

    def test_a_wave_is_trimmed_or_filled_up(self) -> None:
        wave = noise(5 * 640)
        longer = audio_features(CONFIG, {}, np.append(wave, noise(3000, 1)), 5)
        np.testing.assert_array_equal(longer, audio_features(CONFIG, {}, wave, 5))
        filled = audio_features(CONFIG, {}, wave[:700], 30)
        padded = audio_features(CONFIG, {}, np.pad(wave[:700], (0, 29 * 640)), 30)
        np.testing.assert_array_equal(filled, padded)
        np.testing.assert_array_equal(filled[20:], np.full((10, 2, 352), SILENCE))
        assert audio_features(CONFIG, {}, noise(1), 1).shape == (1, 2, 352)
        with pytest.raises(UserError, match="no samples"):
            audio_features(CONFIG, {}, noise(0), 1)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"bands": 0}, "0 bands with a context of 5"),
            ({"context": -1}, "a context of -1"),
            ({"highest_hz": 9000.0}, "60 to 9000 Hz do not lie within 0 to 8000"),
            ({"floor": 0.0}, "floor and std must be positive"),
            ({"std": -1.0}, "floor and std must be positive"),
            ({"bands": 128}, "128 bands are too many"),
            ({"bands": 10**9}, "bands is 1000000000"),
        ],
    )
    def test_unusable_settings_are_refused(self, settings: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            LogMelConfig(**settings)

    @pytest.mark.parametrize("bands", [1, 24, 80, 96])
    def test_every_band_has_a_frequency(self, bands: int) -> None:
        config = LogMelConfig(bands=bands, context=0, std=1)
        assert (log_mel(config, noise(3200), 10)[3:] > math.log(config.floor) - config.mean).all()

    def test_its_hash_is_that_of_the_settings(self) -> None:
        assert LogMelConfig(lowest_hz=60, mean=-10).sha256 == CONFIG.sha256
        others = [{"bands": 33}, {"context": 4}, {"lowest_hz": 61.0}, {"floor": 1e-7}, {"mean": 0.0}]
        assert len({CONFIG.sha256, *(LogMelConfig(**other).sha256 for other in others)}) == 6  # type: ignore[arg-type]


def with_log_mel(sizes: ModelConfig, encoder: LogMelConfig = CONFIG) -> ModelConfig:
    """A model whose keyframe stage takes log-mel features."""
    keyframe = dataclasses.replace(sizes.keyframe, audio_encoder="logmel", audio_dim=encoder.hidden_size)
    encoders = {"wavlm": sizes.encoders["wavlm"], "logmel": encoder}
    return dataclasses.replace(sizes, keyframe=keyframe, encoders=encoders, provenance={})


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("logmel") / "model", tiny_model)


def write_model(folder: Path, tiny_model: Path, encoder: LogMelConfig = CONFIG) -> Path:
    """The tiny model with a keyframe stage for log-mel features."""
    config = with_log_mel(open_model(tiny_model).config, encoder)
    kept = {name: TensorFile(tiny_model / f"{name}.safetensors") for name in components(config)}
    keyframe = parameters(shapes(maker(config, "keyframe"))[1])
    save_model(folder, config, {**kept, "keyframe": keyframe})
    return folder


class TestModel:
    def test_it_has_no_file_and_opens(self, model: Path) -> None:
        opened = open_model(model)
        names = {"keyframe", "interpolation", "vae", "audio_wavlm"}
        assert {path.stem for path in model.glob("*.safetensors")} == names == set(components(opened.config))
        assert opened.config.encoders["logmel"] == CONFIG
        assert isinstance(opened.config.encoders["wavlm"], SpeechConfig)
        assert opened.hashes["audio_logmel"] == CONFIG.sha256
        assert opened.load_encoder("logmel") == {}
        assert "feature_projection.projection.kernel" in opened.load_encoder("wavlm")

    def test_its_config_survives_json(self, model: Path) -> None:
        config = open_model(model).config
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))), "config") == config

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"floor": 1e-7}, r"keyframe.safetensors: .* trained on logmel features of other settings"),
            ({"bands": 16}, "takes audio vectors of 352, the logmel encoder makes 176"),
            ({"band": 16}, r"encoders.logmel: unknown key 'band', did you mean 'bands'\?"),
            ({"bands": "32"}, "encoders.logmel.bands: '32' is not int"),
            ({"kind": "hubert"}, r"encoders.logmel: unknown key 'bands'"),
            ({"kind": "log_mel"}, "kind: 'log_mel' is not 'hubert' or .* 'logmel', did you mean 'logmel'"),
            ({"kind": None}, "kind: None is not 'hubert' or"),
            ({"kind": []}, r"kind: \[\] is not 'hubert' or"),
        ],
    )
    def test_an_edited_config_is_refused(
        self, model: Path, tmp_path: Path, change: dict[str, Any], sentence: str
    ) -> None:
        content = json.loads((model / "config.json").read_text())
        content["encoders"]["logmel"].update(change)
        (tmp_path / "config.json").write_text(json.dumps(content))
        for path in model.glob("*.safetensors"):
            (tmp_path / path.name).symlink_to(path)
        with pytest.raises(UserError, match=sentence):
            open_model(tmp_path)

    def test_a_misnamed_encoder_is_refused(self, model: Path) -> None:
        content = to_dict(open_model(model).config)
        content["encoders"]["hubert"] = content["encoders"]["wavlm"]
        with pytest.raises(UserError, match="the hubert encoder holds the settings of a wavlm encoder"):
            from_dict(ModelConfig, content, "config")

    def test_an_encoder_without_a_kind_is_refused(self, model: Path) -> None:
        content = to_dict(open_model(model).config)
        with pytest.raises(UserError, match=r"encoders\.logmel: key 'kind' is missing"):
            from_dict(ModelConfig, {**content, "encoders": {"logmel": {"bands": 32}}}, "config")
        with pytest.raises(UserError, match="3 is not SpeechConfig or LogMelConfig"):
            from_dict(ModelConfig, {**content, "encoders": {"logmel": 3}}, "config")

    def test_convert_refuses_it(self) -> None:
        with pytest.raises(UserError, match="'logmel=x' is in no PyTorch checkpoint"):
            AudioSource.parse("logmel=x")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    voice = write_voice(folder / "voice.wav", 1.2)
    (folder / "videos").mkdir()
    write_video(folder / "videos/a.mp4", 30, voice=voice)
    np.save(folder / "videos/a.npy", face_landmarks(30))
    return folder


@pytest.fixture(scope="module")
def prepared(clips: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    assert prepare(clips / "videos", folder, model).done == 1
    return folder


class TestUses:
    def test_a_dub(self, clips: Path, model: Path, tmp_path: Path) -> None:
        settings = DubSettings(landmarks=str(clips / "videos/a.npy"))
        report = dub(clips / "videos/a.mp4", clips / "voice.wav", tmp_path / "out.mp4", model, settings)
        assert report.frames == 30

    def test_a_dataset_holds_it(self, clips: Path, model: Path, prepared: Path) -> None:
        dataset = check(prepared)
        encoders = dataset.settings.encoders
        assert {kind: info.dim for kind, info in encoders.items()} == {"logmel": 352, "wavlm": 768}
        assert encoders["logmel"].sha256 == CONFIG.sha256
        records = dataset.read(0, range(30), [audio_name("logmel")])
        wave = read_audio(clips / "videos/a.mp4")
        wanted = audio_features(CONFIG, {}, wave, 30)
        np.testing.assert_array_equal([record["audio_logmel"] for record in records], wanted)

    def test_training_samples_take_it(self, model: Path, prepared: Path) -> None:
        sizes = open_model(model).config
        data = DataConfig((str(prepared),), keyframe_stride=2)
        config = TrainConfig(sizes.keyframe, sizes.vae, data=data, loss=LossConfig(pixel="none"))
        dataset = Dataset(prepared)
        check_fits(dataset, config, open_model(model).hashes)
        sample = Samples(config, [dataset])(0)
        assert sample.audio.shape == (14, 2, 352)
        assert sample.audio.std() > 0.1

    def test_other_settings_are_refused(self, model: Path, prepared: Path, tmp_path: Path) -> None:
        sizes = open_model(model).config
        config = TrainConfig(sizes.keyframe, sizes.vae)
        other = {"audio_logmel": LogMelConfig(floor=1e-7).sha256}
        with pytest.raises(UserError, match="was prepared with another audio_logmel than the model of this"):
            check_fits(Dataset(prepared), config, other)
        content = json.loads((prepared / "manifest.json").read_text())
        content["settings"]["encoders"]["logmel"]["sha256"] = other["audio_logmel"]
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        for path in prepared.glob("*.arrayrecord"):
            (tmp_path / path.name).symlink_to(path)
        datasets = [Dataset(prepared), Dataset(tmp_path)]
        check_alike(datasets, "wavlm")
        with pytest.raises(UserError, match="were prepared with different audio_logmel;"):
            check_alike(datasets, "logmel")

    def test_a_run_becomes_a_model_and_leaves_for_pytorch(
        self, model: Path, prepared: Path, tmp_path: Path
    ) -> None:
        data = DataConfig((str(prepared),))
        write_run(tmp_path / "run", model, open_model(model).config, "keyframe", 0.5, data=data)
        made = export([tmp_path / "run"], tmp_path / "model", model)
        assert open_model(tmp_path / "model").config == made
        assert made.encoders == open_model(model).config.encoders
        assert not (tmp_path / "model/audio_logmel.safetensors").exists()
        files = export_torch(tmp_path / "model", tmp_path / "torch")
        assert {path.stem for path in files} == {"keyframe", "interpolation", "vae"}
