"""Every command that computes, in one process, with a small program in place of its work.

Prints one JSON line: command -> programs that it compiled. `python -m tests.commands_worker`
"""

import importlib
import json
from contextlib import suppress
from typing import Any

import keysync_jax.cli as cli

COMMANDS = {
    "dub": ("keysync_jax.pipeline.dub", "dub", ["v.mp4", "a.wav", "-o", "o.mp4", "--model", "m"]),
    "prepare": ("keysync_jax.data.prepare", "prepare", ["clips", "-o", "data", "--crop", "16"]),
    "init": (
        "keysync_jax.train.new_model",
        "new_model",
        ["--vae", "r", "-o", "m"]
        + [f"--{stage}=configs/{stage}_tiny.py" for stage in ("keyframe", "interpolation")],
    ),
    "train": (
        "keysync_jax.train.loop",
        "train",
        ["--config", "configs/keyframe_tiny.py", "--workdir", "run"],
    ),
    "synth-eval": ("keysync_jax.evaluation.synth_eval", "evaluate", ["-o", "eval"]),
    "demo": ("keysync_jax.evaluation.demo", "demo", ["-o", "demo"]),
    "parity": ("keysync_jax.parity.compare", "compare", ["--golden", "tiny"]),
}


class DoneError(Exception):
    """The small program has run."""


def programs(command: str, number: int) -> int:
    """Programs that XLA compiled for a command, in which they are found nowhere yet."""
    module, function, arguments = COMMANDS[command]

    def work(*_: Any, **__: Any) -> Any:
        import jax

        jax.jit(lambda x: x * number + 1)(2.0)
        raise DoneError

    # As `from MODULE import FUNCTION` finds it; the real module, and JAX with it, is imported by then.
    setattr(importlib.import_module(module), function, work)
    from keysync_jax.pipeline.phases import _Compiles

    before = _Compiles.count
    with suppress(DoneError):
        cli.main([command, *arguments])
    return _Compiles.count - before


def forget() -> None:
    """As a new process is: without a folder of compiled programs."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


def main() -> None:
    found: dict[str, int] = {}
    for number, command in enumerate(COMMANDS):
        found[command] = programs(command, number)
        forget()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
