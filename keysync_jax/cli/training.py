"""Subcommands that train: train, init."""

import argparse
import sys
import time
from pathlib import Path

from keysync_jax.cli.common import Commands, add_allow_download, fetch_models, keep_compiled_programs
from keysync_jax.errors import UserError

_LAST_WORDS_SECONDS = 3


def add_train(commands: Commands) -> None:
    """`keysync train`."""
    from keysync_jax.launch.train import add_arguments

    parser = commands.add_parser("train", help="train one stage")
    add_arguments(parser)
    add_allow_download(parser)
    less = "try a smaller batch_size with optimizer.accumulate, remat=layer, or a larger mesh.fsdp"
    parser.set_defaults(run=run_train, resumable=True, less_memory=less)


def run_train(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit code. The one subcommand that takes `--config.x.y=v`."""
    from keysync_jax.launch.train import run
    from keysync_jax.train.config import TrainConfig
    from keysync_jax.train.config_file import load_config

    if arguments.allow_download and arguments.config is not None:
        config = load_config(arguments.config, arguments.overrides)
        if isinstance(config, TrainConfig):
            fetch_models(arguments, config.init.path, config.init.vae)
    return run(arguments, arguments.overrides)


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave_the_others(code: int) -> None:
    """Ends a process of several at once where it fails, maybe alone, with its own exit code.

    JAX's farewell waits for the others, which wait for this one within a step; then all abort, with a code
    that asks for another start.
    """
    if "jax" not in sys.modules or not is_one_of_several():
        return
    import jax

    from keysync_jax.train.watchdog import leave

    # With process 0 the service ends that keeps all together, and the others may have something to say.
    time.sleep(_LAST_WORDS_SECONDS if jax.process_index() == 0 else 0)
    leave(code)


def add_distill(commands: Commands) -> None:
    """`keysync distill`."""
    from keysync_jax.launch.train import add_arguments

    parser = commands.add_parser("distill", help="train a student that needs fewer network calls")
    parser.add_argument(
        "--teacher", required=True, metavar="MODEL_DIR", help="whose stage learns to do with less"
    )
    add_arguments(parser)
    add_allow_download(parser)
    less = "try a smaller batch_size with optimizer.accumulate, remat=layer, or a larger mesh.fsdp"
    parser.set_defaults(run=run_distill, resumable=True, less_memory=less)


def run_distill(arguments: argparse.Namespace) -> int:
    """Trains a student; returns the exit code. Takes `--config.x.y=v` too."""
    from keysync_jax.train.config import TrainConfig
    from keysync_jax.train.config_file import OVERRIDE, load_config

    teacher = {"init.kind": "keysync", "init.path": arguments.teacher, "init.vae": arguments.teacher}
    arguments.overrides = [
        *arguments.overrides,
        *(f"{OVERRIDE}{name}={value}" for name, value in teacher.items()),
    ]
    config = load_config(arguments.config, arguments.overrides)
    if not isinstance(config, TrainConfig) or config.distill is None:
        raise UserError(f"{arguments.config}: says nothing of a student (distill); take configs/distill_*.py")
    return run_train(arguments)


def add_init(commands: Commands) -> None:
    """`keysync init`."""
    parser = commands.add_parser("init", help="a model directory to start training from")
    parser.add_argument("--vae", type=Path, required=True, metavar="RUN", help="run that trained its VAE")
    for stage in ("keyframe", "interpolation"):
        parser.add_argument(
            f"--{stage}", type=Path, required=True, metavar="FILE", help="config of that stage's run"
        )
    parser.add_argument("--average", action="store_true", help="take the moving average of the VAE's weights")
    parser.add_argument(
        "--stages",
        type=Path,
        metavar="MODEL_DIR",
        help="begin with its stages' weights where the sizes agree",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL_DIR", help="a new folder")
    add_allow_download(parser)
    parser.set_defaults(run=_init, resumable=False, less_memory="run it on the CPU")


def _init(arguments: argparse.Namespace) -> int:
    keep_compiled_programs()
    from keysync_jax.train.config_file import load_stage_config

    fetch_models(arguments, arguments.stages)
    stages = (load_stage_config(arguments.keyframe), load_stage_config(arguments.interpolation))
    from keysync_jax.train.new_model import new_model

    new_model(arguments.vae, *stages, arguments.output, arguments.average, arguments.stages)
    print(f"wrote {arguments.output}; its stages are not trained yet")
    return 0
