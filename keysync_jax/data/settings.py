"""How `prepare` prepares."""

from dataclasses import dataclass
from pathlib import Path

from keysync_jax.config import Dtype, EncoderKind
from keysync_jax.data.division import check_part
from keysync_jax.data.records import LatentKind
from keysync_jax.errors import UserError
from keysync_jax.media.detectors import DETECTORS
from keysync_jax.media.pitch import check_semitones
from keysync_jax.model import DTYPES
from keysync_jax.pipeline.devices import check_count


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare. Precomputed latents refuse what is of videos alone.

    Attributes:
      encoders: audio features to compute; those of every encoder that the model has, where empty.
      pitch: semitones, up or down, by which the voice is shifted for further features of every encoder.
      landmarks: detector for the clips that have no `.npy` file of landmarks beside them.
      landmark_model: the detector's model file, where it is not in the cache.
      allow_download: fetch a detector's model file from its official address, and a model that is on the hub.
      latents: store the posterior, from which training samples anew, or one sample of it.
      seed: of stored samples.
      dtype: "fp32", "tf32" or "bf16", of the VAE's computation; audio features are fp32.
      devices: of this host that encode; all of them where None. The dataset does not depend on it beyond
        rounding.
      workers: processes that decode and look for faces; 0: this one. The dataset does not depend on it.
      shard_mib: size at which a shard is full; a clip is never split.
      crop: side of the crop of a dataset for training a VAE: frames and landmarks alone, without a model.
      retry_skipped: try the clips again that an earlier call skipped. In a complete dataset those that can be
        used now lie behind the others, in shards of their own.
      part: (number, count): of all clips those of one part, by the hash of their names; numbers begin with 0.
        Each part is a dataset of its own, in a folder of its own; `join.join` makes one of them.
    """

    encoders: tuple[EncoderKind, ...] = ()
    pitch: tuple[float, ...] = ()
    landmarks: str = "mediapipe"
    landmark_model: Path | None = None
    allow_download: bool = False
    latents: LatentKind = "posterior"
    seed: int = 0
    dtype: Dtype = "fp32"
    workers: int = 0
    devices: int | None = None
    shard_mib: int = 512
    crop: int | None = None
    retry_skipped: bool = False
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for semitones in self.pitch:
            check_semitones(semitones)
        if self.landmarks not in DETECTORS:
            raise UserError(
                f"there is no landmark detector {self.landmarks}; choose one of {', '.join(DETECTORS)}"
            )
        if self.latents not in ("posterior", "sample"):
            raise UserError(f"the latents are stored as posterior or sample, not {self.latents}")
        if self.dtype not in DTYPES:
            raise UserError(f"the dtype is one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.seed < 0:
            raise UserError(f"the seed is 0 or more, not {self.seed}")
        check_count(self.devices)
        if self.workers < 0:
            raise UserError(f"the number of workers is 0 or more, not {self.workers}")
        if self.crop is not None and self.crop < 16:
            raise UserError(f"a crop has a side of 16 pixels or more, not {self.crop}")
        if self.part is not None:
            check_part(self.part)
        if self.shard_mib < 1:
            raise UserError(f"a shard holds at least 1 MiB, not {self.shard_mib}")
