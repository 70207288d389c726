"""The programs of a dub, compiled in threads before their inputs are there.

All follow from the model's sizes and the settings; of the clip only the number of windows counts. A program
that was lowered and compiled from shapes is what JAX finds when the same function is called with arrays of
these shapes, on the same devices and with the same settings: each is compiled once.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from jax.stages import Lowered

from keysync_jax.backend import computing
from keysync_jax.config import Dtype, ModelConfig, SpeechConfig, StageKind
from keysync_jax.model import network_shapes
from keysync_jax.nn.stages import InterpolationStage, KeyframeStage
from keysync_jax.pipeline import speech_stream
from keysync_jax.pipeline.generate import Sampling, lowered
from keysync_jax.pipeline.latents import decoder_program, encoder_program
from keysync_jax.pipeline.windows import Plan

Lower = Callable[[], Lowered]
"""Traces and lowers a program."""


def programs(
    config: ModelConfig,
    dtype: Dtype,
    sampling: Sampling,
    frames_per_call: int,
    plan: Plan,
    identities: int = KeyframeStage.reference_frames,
    decoder: str = "vae",
) -> dict[str, list[Lower]]:
    """What lowers the programs of each phase of a dub, in the order of the phases.

    Args:
      frames_per_call: of the VAE, on each device.
      plan: of the clip, of which the number of windows counts.
      identities: identity frames of a keyframe window: 1, or one for each of its frames.
      decoder: component that decodes.
    """
    vae = network_shapes(config, "vae", dtype)
    size, devices = config.keyframe.latent_size, sampling.devices
    latent = (size, size, config.vae.latent_channels)
    kinds = {config.keyframe.audio_encoder, config.interpolation.audio_encoder}
    speech = {kind: config.encoders[kind] for kind in sorted(kinds)}
    calls = sum(bool(call.kept) for call in plan.keyframe_calls)

    def stage(kind: StageKind, windows: int, references: int) -> Lower:
        network = network_shapes(config, kind, dtype)
        return partial(lowered, config.stage(kind), network, sampling, windows, references)

    return {
        "encode": [partial(encoder_program, vae, config.crop_size, frames_per_call, devices)],
        "audio": [
            lower
            for kind, encoder in speech.items()
            if isinstance(encoder, SpeechConfig)
            for lower in speech_stream.programs(encoder, network_shapes(config, f"audio_{kind}").params)
        ],
        "keyframes": [stage("keyframe", calls, identities)],
        "interpolation": [stage("interpolation", len(plan.windows), InterpolationStage.reference_frames)],
        "compose": [
            partial(decoder_program, network_shapes(config, decoder, dtype), latent, frames_per_call, devices)
        ],
    }


class Compiling(AbstractContextManager["Compiling"]):
    """Programs that are being compiled, several at a time, from when this is made on.

    At the end of the block those under way are finished, for a compiler cannot be interrupted, and the others
    left out.

    Args:
      phases: what lowers the programs of each phase; the first phase's are compiled first.
      dtype: whose precision they are compiled for.
      skipped: phases whose programs are not needed.
    """

    def __init__(
        self, phases: Mapping[str, Sequence[Lower]], dtype: Dtype, skipped: Collection[str] = ()
    ) -> None:
        self._threads = ThreadPoolExecutor(os.cpu_count(), "compile")
        self._under_way: dict[str, list[Future[Any]]] = {
            phase: [self._threads.submit(_compile, lower, dtype) for lower in lowers]
            for phase, lowers in phases.items()
            if phase not in skipped
        }

    def wait(self, phase: str) -> None:
        """Until a phase's programs are there; raises what compiling one of them raised."""
        for program in self._under_way.get(phase, ()):
            program.result()

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


def _compile(lower: Lower, dtype: Dtype) -> None:
    with computing(dtype):
        lower().compile()
