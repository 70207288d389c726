"""The loss, the gradients and the update of a training step, against PyTorch's numbers and closed forms."""

import json
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keysync_jax.config import Remat, StageConfig, StageKind, UNetConfig, VAEConfig
from keysync_jax.convert.unet import stage_table
from keysync_jax.convert.vae import engine_vae_table
from keysync_jax.diffusion import loss as losses
from keysync_jax.errors import UserError
from keysync_jax.model import Network
from keysync_jax.nn.functional import bind, init, shapes
from keysync_jax.nn.lpips import LPIPS, LPIPSConfig
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.parity import rules
from keysync_jax.parity.golden import Golden, StageInputs
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.flops import batch_shapes, step_flops, training_flops
from keysync_jax.train.optimizer import learning_rate, make_optimizer, partition
from keysync_jax.train.step import (
    Clips,
    Noise,
    decoded_frame,
    denoised,
    draw_clips,
    draw_noise,
    init_state,
    make_stage,
    make_step,
    objective,
)
from tests.train.tiny_training import QUICK_COMPILATION, batch, parameters, train_config, train_step, vae

KINDS: tuple[StageKind, ...] = ("keyframe", "interpolation")
FRAME = 5
NO_WARMUP = OptimizerConfig(warmup=0, learning_rate=1e-3)


# --- the reference's numbers ---------------------------------------------------------------------


class GoldenStep:
    """The tiny networks of the golden files, and the step's loss with the reference's choices given."""

    def __init__(self, golden: Path, kind: StageKind):
        self.kind = kind
        numbers = Golden(golden / "tiny")
        inputs = StageInputs(numbers, numbers.stage_config(kind))
        self.stored = numbers.stored
        self.with_pixels = TensorFile(golden / "dev.pixel_loss.safetensors")
        self.config = TrainConfig(
            numbers.stage_config(kind), numbers.vae_config(), dtype="fp32", remat="none", loss=LossConfig()
        )
        self.graphdef, abstract = shapes(make_stage(self.config))
        wanted = {k: v.shape for k, v in abstract.items()}
        table = stage_table(self.config.stage, wanted)
        self.rows = {row.torch: row for row in table.rows}
        self.params = numbers.params(kind, table, wanted, jnp.asarray)
        self.vae = self._vae(numbers)
        frames = np.tanh(rules.array(f"dev/{kind}/frames", (2, 3, 14, 16, 16)))
        frame = np.moveaxis(frames[:, :, FRAME], 1, -1)
        index = jnp.full(2, FRAME)
        self.clips = Clips(inputs.gt, inputs.reference, inputs.audio, inputs.mask, frame, index)
        every = jnp.ones(2, bool)
        self.noise = Noise(jnp.asarray(inputs.train_sigmas), inputs.noise, every, every)

    def _vae(self, numbers: Golden) -> Network:
        graphdef, abstract = shapes(lambda rngs: VAE(self.config.vae, rngs=rngs))
        wanted = {k: v.shape for k, v in abstract.items()}
        table = engine_vae_table(self.config.vae, wanted)
        return Network(graphdef, numbers.params("first_stage", table, wanted, jnp.asarray))

    def parameters(self, compared: bool) -> dict[str, jax.Array]:
        """Those whose gradients the reference has stored, or all others."""
        keys = [k.split("/", 2)[2] for k in (*self.stored, *self.with_pixels) if f"{self.kind}/grad/" in k]
        paths = {self.rows[key].path for key in keys}
        return {k: v for k, v in self.params.items() if (k in paths) == compared}

    def loss(self, pixel_weight: jax.Array, some: Any, rest: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        # The weight is traced, so that both golden files are one compilation.
        config = replace(self.config.loss, pixel_weight=pixel_weight)  # type: ignore[arg-type]
        step = make_step(replace(self.config, loss=config), self.graphdef, self.vae)
        return step.loss({**rest, **some}, step.aids, self.clips, self.noise)

    @cached_property
    def jitted(self) -> Any:
        gradients = jax.value_and_grad(self.loss, argnums=1, has_aux=True)
        return jax.jit(gradients, compiler_options=QUICK_COMPILATION)

    def gradients(self, pixel_weight: float) -> Any:
        """((loss, its parts), gradients of the compared parameters)."""
        return self.jitted(
            jnp.float32(pixel_weight), self.parameters(compared=True), self.parameters(compared=False)
        )


@cache
def golden_step(golden: Path, kind: StageKind) -> GoldenStep:
    return GoldenStep(golden, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_latent_loss_and_its_gradients_are_the_references(golden: Path, kind: StageKind) -> None:
    step = golden_step(golden, kind)
    (loss, parts), gradients = step.gradients(0.0)
    np.testing.assert_allclose(loss, step.stored[f"{kind}/out/train_loss"][0], rtol=1e-5)
    assert loss == parts["loss_latent"]
    assert compared_gradients(step, step.stored, kind, gradients) == (7 if kind == "interpolation" else 6)


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_loss_and_its_gradients_are_the_references(golden: Path, kind: StageKind) -> None:
    step = golden_step(golden, kind)
    (loss, parts), gradients = step.gradients(1.0)
    wanted = {k: step.with_pixels[f"{kind}/out/{k}"][0] for k in ("latent_loss", "pixel_loss")}
    np.testing.assert_allclose(parts["loss_latent"], wanted["latent_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["loss_pixel"], wanted["pixel_loss"], rtol=1e-5)
    np.testing.assert_allclose(loss, sum(wanted.values()), rtol=1e-5)
    assert compared_gradients(step, step.with_pixels, kind, gradients) == 3


def compared_gradients(step: GoldenStep, stored: TensorFile, kind: str, gradients: Any) -> int:
    """How many stored gradients ours equal."""
    names = [k for k in stored if k.startswith(f"{kind}/grad/")]
    for name in names:
        row = step.rows[name.split("/", 2)[2]]
        ours, reference = row.op.to_torch(np.asarray(gradients[row.path])), stored[name]
        assert np.abs(ours - reference).max() <= 1e-3 * np.abs(reference).max(), name
    return len(names)


def test_one_frame_is_decoded_alone(golden: Path) -> None:
    step = golden_step(golden, "keyframe")

    @partial(jax.jit, compiler_options=QUICK_COMPILATION)
    def decoded(params: Any, vae_params: Any) -> jax.Array:
        clean = denoised(bind(step.graphdef, params), step.clips, step.noise)
        return decoded_frame(bind(step.vae.graphdef, vae_params), clean, step.clips.frame_index)

    frame = np.clip(np.moveaxis(np.asarray(decoded(step.params, step.vae.params)), -1, 1), -1, 1)
    reference = step.with_pixels["keyframe/out/decoded_frame"]
    np.testing.assert_allclose(frame, reference, atol=1e-4 * np.abs(reference).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_updates_on_the_references_gradients_are_torchs(golden: Path, dtype: str) -> None:
    """Weights in fp32; in fp64 the move itself too, of which fp32 weights show a few digits."""
    torch = pytest.importorskip("torch")
    stored = TensorFile(golden / "tiny.safetensors")
    gradients = {k: np.asarray(stored[k], dtype) for k in stored if "/grad/" in k}
    weights = {k: rules.weight(k.split("/", 2)[2], g.shape).astype(dtype) for k, g in gradients.items()}
    config = OptimizerConfig(warmup=0, clip=0.0)
    theirs = {k: torch.nn.Parameter(torch.tensor(w)) for k, w in weights.items()}
    options = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    torch_optimizer = torch.optim.AdamW(theirs.values(), **options)
    with jax.enable_x64(dtype == "float64"):
        optimizer = make_optimizer(config)
        ours = {k: jnp.asarray(w) for k, w in weights.items()}
        state = optimizer.init(ours)
        for scale in (1.0, -0.3):  # the second update reads the moments
            scaled = {k: g * np.asarray(scale, dtype) for k, g in gradients.items()}
            for k, parameter in theirs.items():
                parameter.grad = torch.tensor(scaled[k])
            torch_optimizer.step()
            updates, state = optimizer.update(scaled, state, ours)
            ours = optax.apply_updates(ours, updates)
            for k, weight in weights.items():
                wanted = theirs[k].detach().numpy()
                np.testing.assert_allclose(ours[k], wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
                assert np.abs(wanted - weight).max() > 5e-6
                if dtype == "float64":
                    np.testing.assert_allclose(ours[k] - weight, wanted - weight, rtol=1e-6, atol=1e-13)


# --- what a step moves ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_is_what_the_release_freezes(golden: Path, kind: StageKind) -> None:
    unet = UNetConfig(in_channels=8 if kind == "keyframe" else 9)
    _, abstract = shapes(lambda rngs: stage(StageConfig(kind, "hubert", unet), rngs=rngs))
    table = stage_table(StageConfig(kind, "hubert", unet), {k: v.shape for k, v in abstract.items()})
    full = json.loads((golden / "manifest_full.json").read_text())["tensors"][kind]
    assert {r.torch for r in table.rows} == set(full)

    def frozen_in_the_release(key: str) -> bool:
        return "time_" in key and "time_embed" not in key and not key.startswith("conditioner.")

    wanted = {r.path for r in table.rows if frozen_in_the_release(r.torch)}
    trainable, frozen = partition(OptimizerConfig(), abstract)
    assert set(frozen) == wanted
    assert set(trainable) == {r.path for r in table.rows} - wanted
    assert "audio_projection.kernel" in trainable


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((r"\.tmie_mixer\.",), r"'\\\\.tmie_mixer\\\\.' finds no parameter"),
        ((r"(",), "is not a regular expression"),
        ((r".",), "every parameter of this network is frozen"),
    ],
)
def test_frozen_names_that_cannot_be_meant(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        partition(OptimizerConfig(frozen=patterns), {"a.kernel": 0, "b.kernel": 0})


def test_steps_move_what_is_trainable_and_no_bit_of_the_rest() -> None:
    """Two batches make an update; the frozen stay as they are, the average follows each update."""
    config = train_config("interpolation", 2, optimizer=replace(NO_WARMUP, accumulate=2, ema=0.9))
    step = train_step(config)
    before = parameters(shapes(make_stage(config))[1])
    state = init_state(config, before)
    assert set(state.frozen) | set(state.params) == set(before)
    run = jax.jit(step.apply, compiler_options=QUICK_COMPILATION)
    average, seen = {k: before[k] for k in state.params}, []
    for i in range(4):
        old = state.params
        state, metrics = run(state, step.aids, batch(config, i))
        seen.append(float(metrics["loss"]))
        assert metrics["loss"] == pytest.approx(metrics["loss_latent"] + metrics["loss_pixel"])
        assert metrics["loss_pixel"] > 0
        assert metrics["learning_rate"] == np.float32(1e-3)
        assert [k for k in old if np.array_equal(old[k], state.params[k])] == ([] if i % 2 else list(old))
        if i % 2:
            average = {k: 0.9 * v + 0.1 * np.asarray(state.params[k]) for k, v in average.items()}
        else:
            kept = optax.tree.norm(state.opt_state.acc_grads)
            np.testing.assert_allclose(kept, metrics["grad_norm"], rtol=1e-5)
    assert (int(state.step), len(set(seen))) == (4, 4)
    for k, v in state.frozen.items():
        assert np.array_equal(np.asarray(v).view(np.int32), before[k].view(np.int32)), k
    assert state.ema is not None
    for k, v in state.ema.items():
        np.testing.assert_allclose(v, average[k], rtol=1e-5, atol=1e-7)
    _, repeated = run(init_state(config, before), step.aids, batch(config, 0))
    assert float(repeated["loss"]) == seen[0]


def test_accumulated_gradients_are_averaged_before_they_are_clipped() -> None:
    weights = {"a": jnp.array([1.0, -2.0])}
    gradients = [jnp.array([3.0, 0.0]), jnp.array([1.0, 4.0])]
    config = replace(NO_WARMUP, clip=0.5)
    once, twice = make_optimizer(config), make_optimizer(replace(config, accumulate=2))
    wanted, _ = once.update({"a": sum(gradients) / 2}, once.init(weights), weights)
    state = twice.init(weights)
    for gradient in gradients:
        updates, state = twice.update({"a": gradient}, state, weights)
    np.testing.assert_allclose(updates["a"], wanted["a"], rtol=1e-6)


def test_gradients_above_the_limit_are_scaled_to_it() -> None:
    optimizer = make_optimizer(replace(NO_WARMUP, clip=1.0, eps=1.0, weight_decay=0.0))
    weights = {"a": jnp.zeros(2)}
    for gradient, clipped in (([30.0, 40.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        updates, _ = optimizer.update({"a": jnp.array(gradient)}, optimizer.init(weights), weights)
        wanted = [-1e-3 * g / (g + 1.0) for g in clipped]
        np.testing.assert_allclose(updates["a"], wanted, rtol=1e-5)


def test_rate_rises_linearly_and_stays() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup=4)
    np.testing.assert_allclose(
        [learning_rate(config, jnp.int32(i)) for i in range(6)], [0.5, 1, 1.5, 2, 2, 2]
    )
    assert float(learning_rate(replace(config, warmup=0), jnp.int32(0))) == 2


# --- random choices ------------------------------------------------------------------------------


def test_conditions_are_dropped_at_their_rates_and_independently() -> None:
    n, config = 10_000, LossConfig()
    noise = draw_noise(config, (n, 1, 1, 1, 1), jax.random.key(3))
    audio, reference = ~np.asarray(noise.keep_audio), ~np.asarray(noise.keep_reference)
    for dropped, rate in ((audio, 0.2), (reference, 0.1), (audio & reference, 0.02)):
        assert abs(dropped.mean() - rate) < 3 * np.sqrt(rate * (1 - rate) / n)
    log_sigma = np.log(np.asarray(noise.sigma))
    assert abs(log_sigma.mean() - 1.0) < 3 * 1.2 / np.sqrt(n)
    assert abs(log_sigma.std() - 1.2) < 3 * 1.2 / np.sqrt(2 * n)
    assert abs(np.corrcoef(log_sigma, audio)[0, 1]) < 3 / np.sqrt(n)


def test_keyframes_lose_their_reference_frame_by_frame_as_in_the_release() -> None:
    assert train_config().drops_by_frame
    assert not train_config("interpolation").drops_by_frame
    assert not train_config(loss=LossConfig(drop_reference_by="clip")).drops_by_frame
    with pytest.raises(UserError, match="drop_reference_by=frame is for the keyframe stage"):
        train_config("interpolation", loss=LossConfig(drop_reference_by="frame"))
    n, t, rate = 2000, 14, 0.1
    noise = draw_noise(LossConfig(), (n, t, 1, 1, 1), jax.random.key(3), by_frame=True)
    dropped = ~np.asarray(noise.keep_reference)
    assert dropped.shape == (n, t)
    spread = np.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) < 3 * spread / np.sqrt(n * t)
    assert np.abs(dropped.mean(axis=0) - rate).max() < 4 * spread / np.sqrt(n)
    # Within a clip the frames are independent: the variance of their number is the binomial's.
    assert dropped.sum(axis=1).var() == pytest.approx(t * rate * (1 - rate), rel=0.15)


def test_a_step_of_the_keyframe_stage_sees_frames_with_and_without_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = train_config(batch_size=64, loss=LossConfig(drop_reference=0.5, pixel="none"))
    seen = []

    class Spied(Exception):  # noqa: N818
        """What the network was given is all that is asked."""

    def condition(self: Any, reference: jax.Array) -> jax.Array:
        seen.append(reference.shape)
        raise Spied

    monkeypatch.setattr("keysync_jax.nn.stages.KeyframeStage.condition", condition)
    step = train_step(config)
    abstract = shapes(make_stage(config))[1]
    with pytest.raises(Spied):
        jax.eval_shape(step, init_state(config, parameters(abstract)), batch(config))
    assert seen == [(64, config.stage.frames, 4, 4, 4)]


def test_a_dropped_condition_is_zero_after_its_projection() -> None:
    config = train_config(batch_size=4)
    clips = draw_clips(config, batch(config), jax.random.key(0))
    noise = draw_noise(config.loss, clips.gt.shape, jax.random.key(1))
    noise = noise._replace(
        keep_audio=jnp.array([True, False, True, False]), keep_reference=jnp.array([True, True, False, False])
    )
    seen: dict[str, np.ndarray] = {}

    class Spy:
        def project_audio(self, features: jax.Array) -> jax.Array:
            return features.mean(axis=2) + 7

        def key_value(self, audio: jax.Array) -> jax.Array:
            return audio

        def __call__(
            self, x: jax.Array, c: jax.Array, audio: jax.Array, ref: jax.Array, kv: jax.Array
        ) -> Any:
            seen.update(audio=np.asarray(audio), reference=np.asarray(ref), kv=np.asarray(kv))
            return x

    denoised(Spy(), clips, noise)
    np.testing.assert_array_equal(seen["audio"].any(axis=(1, 2)), noise.keep_audio)
    np.testing.assert_array_equal(seen["audio"], seen["kv"])
    np.testing.assert_array_equal(seen["reference"].any(axis=(1, 2, 3, 4)), noise.keep_reference)
    np.testing.assert_array_equal(seen["reference"][0], clips.reference[0])
    keep = jax.random.bernoulli(jax.random.key(2), 0.5, clips.gt.shape[:2])
    denoised(Spy(), clips, noise._replace(keep_reference=keep))
    np.testing.assert_array_equal(seen["reference"].any(axis=(2, 3, 4)), keep)


def test_latents_are_drawn_in_fp32_of_what_is_stored_in_fp16() -> None:
    """Every number that fp16 has, the smallest included, gives the bits that it gives as fp32."""
    config = train_config(batch_size=248)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    mean = np.resize(halves[np.isfinite(halves)], (248, 4, 4, 4, 4))
    given = batch(config)._replace(mean=mean, logvar=(batch(config).logvar - 10).astype(np.float16))
    wide = given._replace(mean=given.mean.astype(np.float32), logvar=given.logvar.astype(np.float32))
    draw = jax.jit(partial(draw_clips, config), compiler_options=QUICK_COMPILATION)
    for drawn, expected in zip(*(draw(x, jax.random.key(0)) for x in (given, wide)), strict=True):
        assert drawn.dtype == expected.dtype
        assert np.asarray(drawn).tobytes() == np.asarray(expected).tobytes()
    still = replace(config, data=DataConfig(sample_posterior=False))
    scaled = draw_clips(still, given, jax.random.key(0)).gt
    np.testing.assert_array_equal(scaled, wide.mean * np.float32(config.vae.scale_factor))


def test_latents_are_drawn_scaled_and_references_raw() -> None:
    config = train_config("interpolation", batch_size=2)
    given = batch(config)
    drawn = draw_clips(config, given, jax.random.key(0))
    raw = np.asarray(drawn.gt) / config.vae.scale_factor
    spread = (raw - given.mean) / np.exp(0.5 * given.logvar)
    assert abs(spread.std() - 1) < 0.1
    np.testing.assert_allclose(drawn.reference, raw[:, [0, -1]], rtol=1e-5)
    np.testing.assert_allclose(drawn.frame, given.frame / 127.5 - 1, atol=1e-6)

    still = replace(config, data=DataConfig(sample_posterior=False))
    np.testing.assert_array_equal(
        draw_clips(still, given, jax.random.key(0)).gt, given.mean * np.float32(config.vae.scale_factor)
    )
    keyframe = train_config(batch_size=64, data=DataConfig(sample_posterior=False, reference_noise=0.5))
    given = batch(keyframe)
    added = draw_clips(keyframe, given, jax.random.key(0)).reference - given.reference_mean
    assert added.shape == (64, 1, 4, 4, 4)
    assert abs(added.std() - 0.5) < 3 * 0.5 / np.sqrt(2 * added.size)


def test_pixel_losses_are_their_formulas() -> None:
    decoded = jnp.array([[[[3.0, 0.0, -0.5]]]])
    frame = jnp.array([[[[0.0, 0.25, 0.5]]]])
    sigma = jnp.array([2.0])
    l2 = losses.pixel_loss(decoded, frame, sigma, "l2")
    l1 = losses.pixel_loss(decoded, frame, sigma, "l1")
    np.testing.assert_allclose(l2, [1.25 * (1 + 0.0625 + 1) / 3], rtol=1e-6)
    np.testing.assert_allclose(l1, [1.25 * (1 + 0.25 + 1) / 3], rtol=1e-6)
    assert losses.total(jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0]), 0.5) == 3.5


@pytest.mark.parametrize("remat", ["block", "layer"])
def test_what_is_computed_again_does_not_change_the_gradients(remat: Remat) -> None:
    def gradients(remat: Remat) -> Any:
        config = replace(train_config(batch_size=2), remat=remat)
        graphdef, abstract = shapes(make_stage(config))
        decoder = Network(shapes(lambda rngs: VAE(config.vae, remat=remat, rngs=rngs))[0], vae().params)
        step = make_step(config, graphdef, decoder)
        clips = draw_clips(config, batch(config, 0), jax.random.key(0))
        noise = draw_noise(config.loss, clips.gt.shape, jax.random.key(1))

        def run(params: Any, aids: Any) -> Any:
            return jax.grad(lambda p: step.loss(p, aids, clips, noise)[0])(params)

        text = str(jax.make_jaxpr(run)(abstract, step.aids))
        assert ("remat" in text or "checkpoint" in text) == (remat != "none")
        return jax.jit(run, compiler_options=QUICK_COMPILATION)(parameters(abstract), step.aids)

    kept, again = gradients("none"), gradients(remat)
    for path, wanted in kept.items():
        bound = 1e-5 * float(np.abs(wanted).max()) + 1e-7
        np.testing.assert_allclose(again[path], wanted, atol=bound, err_msg=path)


def test_without_a_pixel_loss_no_vae_is_read() -> None:
    config = train_config(batch_size=2, loss=LossConfig(pixel="none"))
    step = make_step(config, shapes(make_stage(config))[0], vae())
    assert step.vae is None
    assert step.aids == {}


def test_pixel_losses_that_cannot_be_computed() -> None:
    config = train_config()
    graphdef, _ = shapes(make_stage(config))
    with pytest.raises(UserError, match=r"loss\.pixel=l2 needs a VAE"):
        make_step(config, graphdef)
    with pytest.raises(UserError, match=r"loss\.pixel=lpips needs its weights"):
        make_step(replace(config, loss=LossConfig(pixel="lpips")), graphdef, vae())


def test_lpips_is_a_pixel_loss_too() -> None:
    """Its distance of the clipped frame, with the weight of the noise level; others are what they were."""
    # Frames of 16 x 16: VGG16's four poolings leave one pixel of them.
    sizes = VAEConfig(block_out_channels=(32,) * 3, layers_per_block=1)
    config = replace(train_config(batch_size=2, loss=LossConfig(pixel="lpips")), vae=sizes)
    graphdef, abstract = shapes(make_stage(config))
    decoder = Network(*init(lambda rngs: VAE(sizes, rngs=rngs)))
    judge = Network(*init(lambda rngs: LPIPS(LPIPSConfig("vgg16", (4,) * 5), rngs=rngs)))
    step = make_step(config, graphdef, decoder, judge)
    clips = draw_clips(config, batch(config, 0), jax.random.key(0))
    noise = draw_noise(config.loss, clips.gt.shape, jax.random.key(1))
    params = parameters(abstract)

    @partial(jax.jit, compiler_options=QUICK_COMPILATION)
    def run(params: Any, aids: Any) -> Any:
        clean = denoised(bind(graphdef, params), clips, noise)
        frame = decoded_frame(bind(decoder.graphdef, aids["vae"]), clean, clips.frame_index)
        distance = bind(judge.graphdef, aids["perceptual"])(jnp.clip(frame, -1, 1), clips.frame)
        return step.loss(params, aids, clips, noise), distance

    (loss, parts), distance = run(params, step.aids)
    wanted = np.mean(losses.weight(noise.sigma) * distance)
    assert wanted > 0
    np.testing.assert_allclose(parts["loss_pixel"], wanted, rtol=1e-5)
    np.testing.assert_allclose(loss, parts["loss_latent"] + wanted, rtol=1e-5)


# --- cost ----------------------------------------------------------------------------------------


def test_operations_are_those_of_the_traced_gradient() -> None:
    """The count from the forward pass equals what stands in the jaxpr of the gradient itself."""
    config = train_config(batch_size=2)
    graphdef, abstract = shapes(make_stage(config))
    network = vae()
    trainable, frozen = partition(config.optimizer, abstract)

    def loss(trainable: Any, frozen: Any, vae_params: Any, given: Any) -> jax.Array:
        clips = draw_clips(config, given, jax.random.key(0))
        noise = draw_noise(config.loss, clips.gt.shape, jax.random.key(0))
        model, decoder = bind(graphdef, {**frozen, **trainable}), bind(network.graphdef, vae_params)
        return objective(config.loss, model, decoder, clips, noise)[0]

    arguments = (trainable, frozen, network.params, batch_shapes(config))
    traced = jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr
    counted, _ = training_flops(traced, [False] * len(traced.invars))
    ours = step_flops(config, graphdef, abstract, network)
    assert ours == pytest.approx(counted, rel=0.01)
    for remat in ("block", "layer"):
        recomputed = replace(config, remat=remat)
        assert step_flops(recomputed, shapes(make_stage(recomputed))[0], abstract, network) == ours
    assert step_flops(replace(config, batch_size=4), graphdef, abstract, network) > 1.9 * ours


def test_operations_of_a_loop_are_counted_as_often_as_it_runs() -> None:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    jaxpr = jax.make_jaxpr(product)(jnp.zeros((2, 3)), jnp.zeros((3, 3))).jaxpr
    once = 2 * 2 * 3 * 3
    assert training_flops(jaxpr, [False, False]) == (5 * once, [False])
    assert training_flops(jaxpr, [True, False]) == (5 * 2 * once, [True])
    # The carry depends on the weight from the first turn on.
    assert training_flops(jaxpr, [False, True]) == (5 * 3 * once, [True])
