"""Guidance in an interval of noise levels: exact where it covers all, and fewer network calls elsewhere."""

import argparse
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from keysync_jax.cli.common import add_guidance_interval, intervals
from keysync_jax.config import GuidanceConfig
from keysync_jax.diffusion.guidance import ClassifierFree, Separated, Stretches, Unguided, calls
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.pipeline.dub import DubSettings
from keysync_jax.pipeline.sampling import (
    Windows,
    guidance_of,
    sample_windows,
)
from keysync_jax.train.flops import training_flops
from keysync_jax.train.step import make_stage
from tests.train.smallest_config import smallest
from tests.train.tiny_training import QUICK_COMPILATION, parameters

PAPER = GuidanceConfig()
TABLE = align_your_steps()


def test_an_interval_that_covers_the_table_is_the_exact_sampler() -> None:
    """The same guidance, so the same program: equal to the last bit."""
    everywhere = guidance_of(PAPER.within((0.002, 700), (0, 1e9)), TABLE)
    assert everywhere == guidance_of(PAPER, TABLE) == Separated(5.0, 2.0)
    assert guidance_of(GuidanceConfig("cfg"), TABLE) == ClassifierFree(2.0)
    assert calls(everywhere, 11) == 33


@pytest.mark.parametrize(
    ("audio", "identity", "count"),
    [
        ((1.5, 8), (1.5, 8), 17),
        ((1.789, 7.977), (1.789, 7.977), 17),
        ((1.5, 8), (0, 0), 14),
        ((1.5, 8), None, 33),
        ((0, 0), (0, 0), 11),
    ],
)
def test_calls_of_the_paper_s_table(audio: Any, identity: Any, count: int) -> None:
    guidance = guidance_of(PAPER.within(audio, identity), TABLE)
    assert calls(guidance, len(TABLE) - 1) == count


def stage_inputs() -> tuple[Any, Any, Windows]:
    config = smallest()
    graphdef, abstract = shapes(make_stage(config))
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 1, 3, 8, 8, 4), np.float32)
    audio = rng.standard_normal((1, 3, 2, 768), np.float32)
    mask = np.ones((1, 3, 8, 8, 1), np.float32)
    return graphdef, parameters(abstract), Windows(latents[0], audio, latents[1][:, :1], latents[1], mask)


def test_branches_that_are_off_are_not_computed() -> None:
    """Operations of the traced loop, which nothing runs."""
    graphdef, params, windows = stage_inputs()

    def operations(guidance: Any) -> int:
        jaxpr = jax.make_jaxpr(partial(sample_windows, graphdef))(params, windows, guidance, TABLE).jaxpr
        return training_flops(jaxpr, [False] * len(jaxpr.invars))[0]

    one, exact = operations(Unguided()), operations(guidance_of(PAPER, TABLE))
    part = operations(guidance_of(PAPER.within((1.5, 8), (1.5, 8)), TABLE))
    assert exact / one == pytest.approx(33 / 11, rel=0.05)
    assert part / one == pytest.approx(17 / 11, rel=0.05)


def test_stretches_agree_with_steps_of_one_guidance_each() -> None:
    """Scales of 1 written out, in one loop, against stretches without the branches that cancel."""
    graphdef, params, windows = stage_inputs()
    sigmas = np.array([8.0, 2.0, 0.5, 0.0], np.float32)
    guidance = guidance_of(PAPER.within((1.5, 4), (1.5, 4)), sigmas)
    assert isinstance(guidance, Stretches)
    assert guidance.parts == (Unguided(), Separated(5.0, 2.0), Unguided())
    written = Stretches((Separated(1.0, 1.0), Separated(5.0, 2.0), Separated(1.0, 1.0)), (1, 1, 1))
    run = jax.jit(sample_windows.__wrapped__, static_argnums=0, compiler_options=QUICK_COMPILATION)
    found = run(graphdef, params, windows, guidance, sigmas)
    wanted = run(graphdef, params, windows, written, sigmas)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    exact = Stretches((Separated(5.0, 2.0),) * 3, (1, 1, 1))
    assert np.abs(found - run(graphdef, params, windows, exact, sigmas)).max() > 1e-2


def asked(*options: str) -> DubSettings:
    parser = argparse.ArgumentParser()
    add_guidance_interval(parser)
    given = [word for option in options for word in ("--guidance-interval", option)]
    audio, identity = intervals(parser.parse_args(given))
    return DubSettings(audio_interval=audio, identity_interval=identity)


def test_intervals_on_the_command_line() -> None:
    assert asked().guidance(PAPER) == PAPER
    assert asked("1.5:8").guidance(PAPER) == PAPER.within((1.5, 8), (1.5, 8))
    assert asked("audio=1.5:8").guidance(PAPER) == PAPER.within((1.5, 8), None)
    assert asked("audio=1:8", "identity=0:2").guidance(PAPER) == PAPER.within((1, 8), (0, 2))
    for wrong, sentence in (
        (["8"], "takes LOW:HIGH"),
        (["voice=1:8"], "are audio and identity, not 'voice'"),
        (["1:8", "audio=1:2"], "twice for audio"),
    ):
        with pytest.raises(UserError, match=sentence):
            asked(*wrong)
    with pytest.raises(UserError, match="audio_interval is 8 to 1"):
        asked("8:1").guidance(PAPER)
    with pytest.raises(UserError, match="not guided"):
        asked("1:8").guidance(GuidanceConfig("none"))
