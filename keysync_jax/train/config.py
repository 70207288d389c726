"""Everything that a training run is told, typed. `configs/*.py` fill it; `--config.x=y` overrides.

The defaults are the paper's (table 7) where it says, else the release's training scripts'.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from keysync_jax.config import (
    DecoderConfig,
    Dtype,
    EncoderKind,
    GuidanceConfig,
    MaskKind,
    Remat,
    StageConfig,
    VAEConfig,
    check_levels,
    check_sigmas,
    from_dict,
)
from keysync_jax.errors import UserError

PixelLoss = Literal["none", "l2", "l1", "lpips"]
InitKind = Literal["none", "svd", "keysync"]

FROZEN = (
    r"\.temporal_res_block\.",
    r"\.temporal_transformer_blocks\.",
    r"\.time_mixer\.",
    r"\.time_pos_embed\.",
)
"""All temporal layers: what the release freezes by the name `time_` except `time_embed`."""


def _at_least(least: int, values: dict[str, int]) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name} must be {least} or more, not {value}")


def _above_zero(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} must be above 0, not {value:g}")


def _probabilities(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is a probability, from 0 to 1, not {value:g}")


@dataclass(frozen=True)
class InitConfig:
    """Where the weights of a new run come from.

    Attributes:
      kind: "none": random; "svd": SVD's, in either layout, the new tensors initialised as the release
        does; "keysync": the stage of a model directory.
      path: the checkpoint, or the model directory.
      vae: VAE's weights, needed by the pixel loss and the preview: a model directory, or SVD's
        checkpoint in either layout; empty: random (for tests). A model directory may be on the hub.
      lpips_trunk, lpips_heads: weights of the LPIPS pixel loss: torchvision's VGG16 or AlexNet, and
        the `lpips` package's linear heads for it.
    """

    kind: InitKind = "none"
    path: str = ""
    vae: str = ""
    lpips_trunk: str = ""
    lpips_heads: str = ""


@dataclass(frozen=True)
class DataConfig:
    """What a batch is made of; a batch is a function of (seed, step) alone.

    Attributes:
      paths: dataset folders that `keysync prepare` made.
      weights: share of the samples drawn from each; equal for every clip where empty.
      mask: strategy of the masks.
      keyframe_stride: frames between the frames of a keyframe sample.
      sample_posterior: draw latents anew from the stored posterior; its mean where false.
      flip: probability of a left-right flip of a whole clip.
      pitch: probability that a sample takes the features of one of the dataset's shifted voices.
      audio_noise: standard deviation of noise added to the audio features.
      reference_noise: standard deviation of noise added to the reference latents (raw).
      workers: processes that read ahead; 0 reads in the training process.
    """

    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    mask: MaskKind = "box"
    keyframe_stride: int = 13
    sample_posterior: bool = True
    flip: float = 0.0
    pitch: float = 0.0
    audio_noise: float = 0.0
    reference_noise: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.paths):
            raise UserError(f"data.weights has {len(self.weights)} entries for {len(self.paths)} data.paths")
        _probabilities({"data.flip": self.flip, "data.pitch": self.pitch})
        _at_least(0, {"data.workers": self.workers})


@dataclass(frozen=True)
class LossConfig:
    """The loss (eq. 3 to 6) and the noise levels it is taken at.

    Attributes:
      p_mean, p_std: ln sigma ~ N(p_mean, p_std^2), one sigma a clip.
      drop_audio, drop_reference: probability that a condition is zeroed, independently.
      drop_reference_by: what one draw of `drop_reference` zeroes: the reference in all frames of a clip, or
        in one frame, which the keyframe stage alone can; auto: as the release trains (`drops_by_frame`). The
        audio is dropped by clip.
      pixel: of the RGB loss on one random frame through the decoder.
      pixel_weight: lambda_2.
    """

    p_mean: float = 1.0
    p_std: float = 1.2
    drop_audio: float = 0.2
    drop_reference: float = 0.1
    drop_reference_by: Literal["auto", "clip", "frame"] = "auto"
    pixel: PixelLoss = "l2"
    pixel_weight: float = 1.0

    def __post_init__(self) -> None:
        _above_zero({"loss.p_std": self.p_std})
        _probabilities({"loss.drop_audio": self.drop_audio, "loss.drop_reference": self.drop_reference})


@dataclass(frozen=True)
class OptimizerConfig:
    """Linear warm-up to a constant rate.

    Attributes:
      kind: "adamw" (the paper's), or "muon" (Jordan et al., 2024): the momentum of every kernel is
        orthogonalised, the rest is AdamW's with Nesterov's momentum. From random weights it takes
        fewer steps.
      clip: largest global norm of the gradient; 0: no clipping.
      accumulate: batches whose gradients make one update.
      ema: decay of the exponential moving average of the weights; 0: none.
      frozen: regular expressions; a parameter whose path one of them finds does not move.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-5
    warmup: int = 1000
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    frozen: tuple[str, ...] = FROZEN

    def __post_init__(self) -> None:
        _above_zero({"optimizer.learning_rate": self.learning_rate})
        _at_least(0, {"optimizer.warmup": self.warmup})
        _at_least(1, {"optimizer.accumulate": self.accumulate})
        if not 0 <= self.ema < 1:
            raise UserError(f"optimizer.ema must be 0 or more and below 1, not {self.ema:g}")


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid, and how parameters lie on it.

    Attributes:
      data, fsdp: sizes of the axes; -1: what is left. The batch is split over both.
      rules: (regular expression, axis name of each of the last dimensions, "" for none); the first
        that finds a parameter's path counts. A dimension that the axis does not divide is not split.
      height: parts that the rows of every picture are split into, 1, 2 or 4: for more devices than clips.
    """

    data: int = -1
    fsdp: int = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ((r".*", ("fsdp",)),)
    height: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved.

    Attributes:
      every: steps from one to the next.
      minutes: a checkpoint is also saved at the first line of metrics (`log.every`) so long after the last
        one; 0: by steps alone.
      keep: latest ones that are kept.
      keep_every: steps whose checkpoints are kept for good; 0: none.
    """

    every: int = 1000
    minutes: float = 15.0
    keep: int = 3
    keep_every: int = 10_000

    def __post_init__(self) -> None:
        if not self.minutes >= 0:
            raise UserError(f"checkpoint.minutes must be 0 or more, not {self.minutes:g}")
        _at_least(1, {"checkpoint.every": self.every, "checkpoint.keep": self.keep})
        _at_least(0, {"checkpoint.keep_every": self.keep_every})


@dataclass(frozen=True)
class LogConfig:
    """What is written while training.

    Attributes:
      every: steps between lines of metrics.
      preview_every: steps between preview videos; 0: none.
      preview_data: dataset folder of the clip that previews show, one that is not trained on; the first
        of `data.paths` where empty.
      preview_clip: number of that clip.
      wandb: send metrics to Weights & Biases too, where it is installed.
    """

    every: int = 50
    preview_every: int = 0
    preview_data: str = ""
    preview_clip: int = 0
    wandb: bool = False

    def __post_init__(self) -> None:
        _at_least(1, {"log.every": self.every})
        _at_least(0, {"log.preview_every": self.preview_every})


@dataclass(frozen=True)
class WatchConfig:
    """What ends a run that hangs, so that it can be started again.

    Attributes:
      heartbeat: seconds without a sign of life of a process after which the others of a run on several hosts
        end themselves.
      stall: seconds without a step after which a process ends itself, or 20 median steps where these are
        longer; from the first step on. 0: never.
    """

    heartbeat: int = 60
    stall: float = 600.0

    def __post_init__(self) -> None:
        _at_least(1, {"watch.heartbeat": self.heartbeat})
        if not self.stall >= 0:
            raise UserError(f"watch.stall must be 0 or more, not {self.stall:g}")


@dataclass(frozen=True)
class ProfileConfig:
    """Looks into a run's time, for XProf or TensorBoard.

    Attributes:
      port: where every process listens for a profiler; 0: nowhere. Processes of one host take the next ones.
      steps: first and last step that process 0 traces into `WORKDIR/profile`; empty: none.
    """

    port: int = 0
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _at_least(0, {"profile.port": self.port})
        if self.steps and (len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1]):
            raise UserError(f"profile.steps are a first and a last step, not {list(self.steps)}")


@dataclass(frozen=True)
class DistillConfig:
    """What a student learns of its teacher, the model directory `init.path`.

    The student has the teacher's network and weights to begin with. At a noise level of its grid it is shown
    where the guided teacher's sampler passes, and learns where that ends.

    Attributes:
      grid: noise levels that the student is sampled at, the highest first.
      levels: noise levels at which the teacher's states are kept, the grid's among them; each is one of the
        teacher's table. Students of several grids can share trajectories.
      clips: stretches of up to 157 frames that the teacher dubs. Each is one keyframe sample, or up to 12
        interpolation samples.
      trajectories: folder of what the teacher did; made where it is not complete. Empty: in the run's folder.
      student: run folder of the keyframe stage's distillation. Every second stretch has its keyframes, which
        the interpolation stage will see in a dub; empty: all have the teacher's.
      windows_per_call: network calls' windows, of the teacher on each device.
      huber: error of a scaled latent up to which the loss is quadratic, beyond it is linear.
      decoded: weight of the absolute error of one decoded frame's mouth against the teacher's.
      truth: of the same against the true frame, where the datasets have pixels.
      shuffle_voices: the control: in the loss each sample hears another one's voice.
    """

    grid: tuple[float, ...] = (700.0, 4.248)
    levels: tuple[float, ...] = (700.0, 15.886, 4.248, 1.789)
    clips: int = 10_000
    trajectories: str = ""
    student: str = ""
    windows_per_call: int = 1
    huber: float = 0.1
    decoded: float = 0.0
    truth: float = 0.0
    shuffle_voices: bool = False

    def __post_init__(self) -> None:
        for name in ("grid", "levels"):
            levels = getattr(self, name)
            if not levels:
                raise UserError(f"distill.{name} is empty; it has one noise level a step")
            check_sigmas(levels, f"distill.{name}")
        for sigma in set(self.grid) - set(self.levels):
            raise UserError(f"distill.grid: {sigma:g} is none of distill.levels, whose states are kept")
        _at_least(1, {"distill.clips": self.clips, "distill.windows_per_call": self.windows_per_call})
        _above_zero({"distill.huber": self.huber})
        for name in ("decoded", "truth"):
            if not getattr(self, name) >= 0:
                raise UserError(f"distill.{name} must be 0 or more, not {getattr(self, name):g}")

    @property
    def decodes(self) -> bool:
        """Whether the loss goes through the VAE's decoder."""
        return self.decoded > 0 or self.truth > 0


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
      distill: learn from a teacher instead of from noised data; None: do not.
      guidance: of previews, and of the model that the run is exported to.
      batch_size: clips of a step, over all devices and hosts.
      dtype: of the computation; master weights are fp32.
      remat: what the backward pass computes again instead of keeping it.
    """

    stage: StageConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    distill: DistillConfig | None = None
    batch_size: int = 32
    steps: int = 60_000
    seed: int = 0
    dtype: Dtype = "bf16"
    remat: Remat = "block"

    def __post_init__(self) -> None:
        _at_least(1, {"batch_size": self.batch_size, "steps": self.steps})
        _at_least(0, {"seed": self.seed})
        if self.loss.drop_reference_by == "frame" and self.stage.kind != "keyframe":
            raise UserError(
                "loss.drop_reference_by=frame is for the keyframe stage, whose frames share a reference"
            )
        if self.distill is not None:
            self._check_distillation(self.distill)

    def _check_distillation(self, distill: DistillConfig) -> None:
        """Refuses settings that a distillation would not look at."""
        as_a_dub = "its samples are made as a dub makes them"
        data, pixels = self.data, "its terms on pixels are distill.decoded and distill.truth"
        given = {
            "loss.pixel": (self.loss.pixel, "none", pixels),
            "guidance.kind": (self.guidance.kind, "none", "a student is sampled without guidance"),
            "data.sample_posterior": (data.sample_posterior, False, as_a_dub),
            "data.flip": (data.flip, 0, as_a_dub),
            "data.pitch": (data.pitch, 0, as_a_dub),
            "data.audio_noise": (data.audio_noise, 0, as_a_dub),
            "data.reference_noise": (data.reference_noise, 0, as_a_dub),
            "data.weights": (data.weights, (), "clips of all datasets count alike"),
            "log.preview_every": (self.log.preview_every, 0, "keysync synth-eval judges its student"),
        }
        for name, (value, wanted, why) in given.items():
            if value != wanted:
                raise UserError(f"a distillation has {name}={wanted!r}, not {value!r}: {why}")
        if distill.student and self.stage.kind == "keyframe":
            raise UserError("distill.student is for the interpolation stage, which sees its keyframes")
        if distill.shuffle_voices and self.batch_size < 2:
            raise UserError("distill.shuffle_voices needs a batch_size of 2 or more")

    @property
    def audio_encoder(self) -> EncoderKind:
        return self.stage.audio_encoder

    @property
    def drops_by_frame(self) -> bool:
        """Whether each frame's reference is dropped alone.

        The release copies a keyframe sample's reference to its 14 frames before it drops; that of an
        interpolation sample, which it does not copy, it drops whole.
        """
        by = self.loss.drop_reference_by
        return by == "frame" or (by == "auto" and self.stage.kind == "keyframe")


@dataclass(frozen=True)
class VAEDataConfig:
    """Frames that a VAE is trained on.

    Attributes:
      paths: dataset folders that `keysync prepare` made, with pixels.
      flip: probability of a left-right flip.
      workers: processes that read ahead; 0 reads in the training process.
    """

    paths: tuple[str, ...] = ()
    flip: float = 0.5
    workers: int = 0

    def __post_init__(self) -> None:
        _probabilities({"data.flip": self.flip})
        _at_least(0, {"data.workers": self.workers})


@dataclass(frozen=True)
class VAELossConfig:
    """The loss of a VAE: absolute and squared error of the pixels, and the posterior's divergence.

    Attributes:
      l1, l2: weights of the mean absolute and the mean squared error, frames in [-1, 1].
      kl: weight of the Kullback-Leibler divergence from a standard normal, mean over numbers.
      mouth: how many times an error in the mouth's region counts.
    """

    l1: float = 1.0
    l2: float = 1.0
    kl: float = 1e-4
    mouth: float = 4.0

    def __post_init__(self) -> None:
        _above_zero({"loss.l1 + loss.l2": self.l1 + self.l2, "loss.mouth": self.mouth})


@dataclass(frozen=True)
class VAETrainConfig:
    """One run that trains a VAE on single frames, or a small decoder for one, from random weights.

    Attributes:
      vae: sizes of the VAE: the one that is trained, or whose decoder the small one learns from.
      decoder: sizes of the small decoder; None: the VAE itself is trained.
      teacher: model directory with the VAE that the small decoder is for.
      batch_size: frames of a step, over all devices and hosts.
      crop_size: side of the frames in pixels.
    """

    vae: VAEConfig
    crop_size: int
    data: VAEDataConfig = VAEDataConfig()
    loss: VAELossConfig = VAELossConfig()
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(frozen=()))
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    decoder: DecoderConfig | None = None
    teacher: str = ""
    batch_size: int = 16
    steps: int = 10_000
    seed: int = 0
    dtype: Dtype = "fp32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        _at_least(1, {"batch_size": self.batch_size, "steps": self.steps})
        _at_least(0, {"seed": self.seed})
        if self.crop_size < 1 or self.crop_size % self.vae.factor:
            raise UserError(
                f"crop_size {self.crop_size} is not a multiple of the VAE's factor {self.vae.factor}"
            )
        if self.decoder is not None:
            check_levels(self.decoder, self.vae)
        if self.log.preview_every:
            raise UserError("log.preview_every is for the stages; a VAE's run logs its PSNR instead")


AnyTrainConfig = TrainConfig | VAETrainConfig
"""Settings of any run."""


def train_config_from(values: dict[str, Any], where: str) -> AnyTrainConfig:
    """Settings from their JSON form: those of a stage where there is a key `stage`, else those of a VAE.

    Raises:
      UserError: as `keysync_jax.config.from_dict`.
    """
    if "stage" in values or "vae" not in values:
        return from_dict(TrainConfig, values, where)
    return from_dict(VAETrainConfig, values, where)
