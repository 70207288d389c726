"""A batch of training samples, as the data gives it and the step takes it."""

from typing import NamedTuple

from keysync_jax.typing import Array


class Batch(NamedTuple):
    """B clips; numpy arrays from the data, device arrays in the step.

    Attributes:
      mean, logvar: posterior over raw latents of the T frames, `[B, T, h, w, 4]` fp16, as datasets store
        it. A dataset with stored samples gives the sample as mean and a logvar of -30; a run that has one
        takes all of both as fp32.
      reference_mean, reference_logvar: the same of the identity frame, `[B, 1, h, w, 4]`; `[B, 0, h, w, 4]`
        for the interpolation stage, whose references are its own first and last latents.
      audio: features `[B, T, 2, audio_dim]` fp32.
      mask: `[B, T, h, w, 1]` uint8, 1 = generate.
      frame: pixels of one frame of each clip, `[B, H, W, 3]` uint8; `[B, 0, 0, 3]` without a pixel loss.
      frame_index: which of the T frames that is, `[B]` int32.
    """

    mean: Array
    logvar: Array
    reference_mean: Array
    reference_logvar: Array
    audio: Array
    mask: Array
    frame: Array
    frame_index: Array
