"""What lies before the face: masks of a hand or a microphone, which a dub must leave as they are (eq. 7)."""

from pathlib import Path

import cv2
import numpy as np

from keysync_jax.errors import UserError


def load_occluder(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    """Object masks of a video's frames at 25 a second: `[frames, height, width]`, above 0 = object.

    Args:
      path: `.npy`, or `.npz` with the array `occluder`, of any segmentation (the paper takes SAM 2's).
      frames, height, width: of the video.

    Raises:
      UserError: the file cannot be read, or is of another video.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        masks = content["occluder"] if isinstance(content, np.lib.npyio.NpzFile) else content
    except KeyError:
        raise UserError(f"{path}: holds no array 'occluder'") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: masks of an occluder cannot be read ({error})") from error
    if masks.shape != (frames, height, width) or masks.dtype.kind not in "bui":
        raise UserError(
            f"{path}: holds {masks.dtype} {list(masks.shape)}, the video's masks are whole numbers "
            f"{[frames, height, width]} (frames at 25 a second, height, width)"
        )
    return masks


def occluded_cells(occluder: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The cells of the crop's latent grid that an object touches: uint8 `[size, size]`.

    A cell that is half object must not be generated anew, so one pixel is enough.

    Args:
      occluder: mask of one frame, `[H, W]`.
      box: of the crop, (x0, y0, x1, y1).
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    inside = (np.asarray(occluder[y0:y1, x0:x1]) > 0).astype(np.float32)
    share = cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA)
    return (share > 0).astype(np.uint8)
