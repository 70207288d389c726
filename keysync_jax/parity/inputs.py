"""Inputs of a live comparison: functions of their names and shapes, as all weights by the rule are."""

import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.parity import rules
from keysync_jax.parity.sizes import STAGES, Networks

LEVELS = (0.034, 1.789, 54.5)
"""Noise levels at which D_theta is compared: of the last steps, the middle, the second."""

FRAME = 5
"""The frame that the RGB loss looks at."""

SCALE_FACTOR = np.float32(0.18215)


def inputs(networks: Networks) -> dict[str, np.ndarray]:
    """Every input, `NETWORK/in/NAME` -> array in torch's layout, float32."""
    made: dict[str, np.ndarray] = {}
    for kind in STAGES:
        config = networks[kind]
        assert isinstance(config, StageConfig)
        side = config.latent_size * networks.vae.factor
        arrays = _conditions(config, networks.clips) | _noise(config, networks.clips)
        arrays |= _training(config, networks.clips, side)
        made |= {f"{kind}/in/{name}": x for name, x in arrays.items()}
    size, factor = networks.keyframe.latent_size, networks.vae.factor
    made["vae/in/frames"] = np.tanh(rules.array("live/vae/frames", (2, 3, size * factor, size * factor)))
    made["vae/in/z"] = rules.array("live/vae/z", (4, networks.vae.latent_channels, size, size))
    return {name: np.ascontiguousarray(x, np.float32) for name, x in made.items()}


def _conditions(config: StageConfig, n: int) -> dict[str, np.ndarray]:
    c, t, s, tag = config.unet.out_channels, config.frames, config.latent_size, f"live/{config.kind}"
    reference = (n, c, s, s) if config.kind == "keyframe" else (n, c, 2, s, s)
    return {
        "gt": rules.array(f"{tag}/gt", (n, c, t, s, s)),
        "masks": rules.array(f"{tag}/masks", (n, 1, t, s, s)) > 0,
        "audio_emb": rules.array(f"{tag}/audio", (n, t, 2, config.audio_dim)),
        "cond_frames": rules.array(f"{tag}/cond", reference) * SCALE_FACTOR,
    }


def _noise(config: StageConfig, n: int) -> dict[str, np.ndarray]:
    c, t, s, tag = config.unet.out_channels, config.frames, config.latent_size, f"live/{config.kind}"
    return {
        "x": rules.array(f"{tag}/x", (n * t, c, s, s)),
        "noise": rules.array(f"{tag}/noise", (n * t, c, s, s)),
        "c_noise": np.repeat(np.resize((-1.5, 1.6), n), t),
        "denoiser_sigmas": np.array(LEVELS),
    }


def _training(config: StageConfig, n: int, side: int) -> dict[str, np.ndarray]:
    """A batch's frames and draws; every second reference is dropped, a keyframe sample's frame by frame."""
    drops = n * config.frames if config.kind == "keyframe" else n
    frames = rules.array(f"live/{config.kind}/frames", (n, 3, config.frames, side, side))
    return {
        "train_sigmas": np.resize((1.3, 0.4), n),
        "original_frames": np.tanh(frames),
        "frame_index": np.array([FRAME]),
        "keep_reference": np.arange(drops) % 2 == 0,
        "keep_audio": np.arange(n) < max(1, n - 1),
    }
