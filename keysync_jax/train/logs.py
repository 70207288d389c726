"""What a run tells: JSON lines, TensorBoard, W&B where asked for, a progress bar, preview videos.

Only process 0 writes. JSON lines are the record; the others are conveniences, and W&B may fail without
the run noticing.
"""

import io
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from keysync_jax.config import to_dict
from keysync_jax.errors import UserError
from keysync_jax.extras import require
from keysync_jax.files import write_text
from keysync_jax.train.config import AnyTrainConfig, TrainConfig
from keysync_jax.typing import Frames

require("tensorboardX")  # It imports torch where that is installed: seconds, so not here.

PREVIEW_FPS = 25
PREVIEW_ROWS = 256
"""Rows of a preview in TensorBoard; the mp4 keeps all."""


class Logs:
    """The records of a run. A context manager, which closes them.

    Args:
      workdir: of the run; `metrics.jsonl`, `tensorboard/` and `previews/` are made in it.
      start: steps done before; what an interrupted run logged after that is dropped, it comes again.
      active: whether this process writes; false makes every call do nothing.
      show: draw a progress bar on stderr.
    """

    def __init__(self, workdir: Path, config: AnyTrainConfig, start: int, active: bool, show: bool = True):
        self._workdir, self._active = workdir, active
        self._bar = tqdm(
            total=config.steps,
            initial=start,
            desc=f"train {config.stage.kind if isinstance(config, TrainConfig) else 'VAE'}",
            unit=" step",
            disable=not (active and show),
            file=sys.stderr,
        )
        if not active:
            return
        from tensorboardX import SummaryWriter

        self._lines = workdir / "metrics.jsonl"
        try:
            _keep_until(self._lines, start)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written ({error.strerror or error})") from error
        self._wandb = _open_wandb(workdir, config) if config.log.wandb else None

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records the metrics of a step.

        Raises:
          UserError: the line cannot be written.
        """
        if not self._active:
            return
        self._bar.set_postfix({"loss": f"{values['loss']:.4g}"} if "loss" in values else {})
        try:
            with self._lines.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:
            raise UserError(f"{self._lines}: cannot be written ({error.strerror or error})") from error
        self._to_wandb(values, step)

    def preview(self, step: int, frames: Frames) -> None:
        """Records a preview video, uint8 RGB `[T, H, W, 3]`: an mp4, and an animated picture in TensorBoard.

        Raises:
          UserError: the file cannot be written.
        """
        if not self._active:
            return
        folder = self._workdir / "previews"
        folder.mkdir(exist_ok=True)
        _write_mp4(folder / f"{step:08d}.mp4", frames)
        self._animation("preview", step, frames)

    def _animation(self, tag: str, step: int, frames: Frames) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        small = frames[:, :: -(-frames.shape[1] // PREVIEW_ROWS), :: -(-frames.shape[1] // PREVIEW_ROWS)]
        _, height, width, _ = small.shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=animated_png(small)
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._board.file_writer.add_summary(summary, step)
        self._board.flush()

    def _to_wandb(self, values: Mapping[str, float], step: int) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log(dict(values), step=step)
        # It talks to a service; whatever goes wrong there is no reason to lose the run.
        except Exception as error:
            logging.getLogger(__name__).warning("W&B is left out from step %d on: %s", step, error)
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._active:
            self._board.close()


def animated_png(frames: Frames) -> bytes:
    """An animated PNG of uint8 RGB frames `[T, H, W, 3]`, which plays in a browser without end."""
    import av

    buffer = io.BytesIO()
    # Pillow's GIFs have 256 colours and moviepy is a large dependency; PyAV is here anyway.
    with av.open(buffer, "w", format="apng", options={"plays": "0"}) as container:
        stream: Any = container.add_stream("apng", rate=PREVIEW_FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _write_mp4(path: Path, frames: Frames) -> None:
    from keysync_jax.media.writer import VideoWriter

    _, height, width, _ = frames.shape
    with VideoWriter(path, width, height, fps=PREVIEW_FPS) as writer:
        for frame in frames:
            writer.write(frame)


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a last one that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def _open_wandb(workdir: Path, config: AnyTrainConfig) -> Any:
    """A W&B run that goes on where this workdir's was, or None where there cannot be one."""
    try:
        import wandb

        name = workdir.absolute().name
        return wandb.init(
            project="keysync",
            name=name,
            id=_wandb_id(workdir),
            dir=str(workdir),
            config=to_dict(config),
            resume="allow",
        )
    except Exception as error:
        logging.getLogger(__name__).warning("W&B is left out: %s", error)
        return None


def _wandb_id(workdir: Path) -> str:
    import uuid

    path = workdir / "wandb_id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text()
