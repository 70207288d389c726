"""The release as a program: its checkout, its environment, a run of `capture`, and how that can fail."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.files import copy_file, git_tree, temporary_place, write_json
from keysync_jax.parity import capture
from keysync_jax.tensorfile import TensorFile

TREES = {
    "sgm/models": ("4fbcfb9bd6",),
    "sgm/modules": ("d36a5abacf", "6fca5c3347"),
    "scripts/sampling/configs": ("eb3656596f",),
    "configs/example_training": ("1aeab7b473",),
}
"""Git's names (their beginnings) of the folders that compute what is compared, in the releases known here."""

SETTINGS = {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
"""Of its process's environment: no network, no packages of the user's, nothing written into the checkout."""

Outputs = dict[str, np.ndarray]
"""Entry -> what the release computed; views of files."""


@dataclass(frozen=True)
class Release:
    """A checkout of the release and the interpreter of its environment.

    Attributes:
      device: cpu or cuda.
      attention: xformers, or torch where its stand-in is wanted; on a CPU it is torch always.
      timeout: seconds that a run may take.
    """

    checkout: Path
    python: Path
    device: str = "cpu"
    attention: str = "xformers"
    timeout: float = 4 * 3600.0

    def check(self) -> list[str]:
        """Sentences about what differs from every release known here.

        Raises:
          UserError: the folder is no checkout of the release, or the interpreter is not there.
        """
        if shutil.which(str(self.python)) is None:
            raise UserError(
                f"{self.python}: no Python there; give the interpreter of the release's environment"
            )
        sentences = []
        for folder, known in TREES.items():
            if not (self.checkout / folder).is_dir():
                raise UserError(f"{self.checkout}: no checkout of the release (it has no folder {folder})")
            tree = git_tree(self.checkout / folder)
            if not tree.startswith(known):
                sentences.append(f"{folder} is not that of any release known here (its tree is {tree[:10]})")
        return sentences

    def run(self, request: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Outputs]:
        """Runs `capture` on a request in a new folder.

        Returns:
          What its answer says, and `NETWORK/ENTRY` -> array in the order in which they were computed.

        Raises:
          UserError: it cannot be run, failed, took too long, or left something else than was asked for.
        """
        folder.mkdir()
        whole = {"checkout": str(self.checkout.resolve()), "device": self.device, "attention": self.attention}
        write_json(folder / "request.json", whole | dict(request))
        code = self._wait(folder)
        if (folder / "failure.json").is_file():
            raise UserError(_read(folder / "failure.json")["sentence"])
        if code:
            raise UserError(_died(code, folder / "log.txt"))
        if not (folder / "answer.json").is_file():
            raise UserError("the release's process ended without an answer")
        answer = _read(folder / "answer.json")
        return answer, _outputs(answer, request, folder)

    def _wait(self, folder: Path) -> int:
        """The exit code; the process ends with this function, whatever ends it."""
        command = [str(self.python), "-s", str(Path(capture.__file__).resolve().parent), str(folder)]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment | SETTINGS
            )
            try:
                return process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                minutes = self.timeout / 60
                raise UserError(
                    f"the release took more than {minutes:.3g} minutes; --timeout gives it more"
                ) from None
            finally:
                process.kill()
                process.wait()


def own_device() -> str:
    """cuda where JAX is installed for it and is not told otherwise; asks no device."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    has_plugin = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))
    return "cuda" if has_plugin and platforms.split(",")[0] in ("", "cuda", "gpu") else "cpu"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(f"the release's process left a damaged {path.name} ({error})") from None
    return content


def _died(code: int, log: Path) -> str:
    """A sentence about a process that ended with an error that has none."""
    if code == -signal.SIGKILL:
        return "the release's process was killed; too little memory is the usual reason, try a smaller --size"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if not lines:
        return f"the release's process stopped ({by}) and printed nothing"
    kept = temporary_place("keysync-parity.log")
    copy_file(log, kept)
    return f"the release's process stopped ({by}): {lines[-1][:300]} (all that it printed is in {kept})"


def _outputs(answer: Mapping[str, Any], request: Mapping[str, Any], folder: Path) -> Outputs:
    """The arrays of an answer, all that were asked for, all finite."""
    outputs: Outputs = {}
    for part in (*request["networks"], *([request["clip"]] if request["clip"] else [])):
        network = part["network"]
        file = TensorFile(folder / f"{network}.safetensors")
        order = answer.get("orders", {}).get(network, [])
        for entry in (*part["modules"], *order):
            if entry not in file:
                raise UserError(f"the release's answer has no {network}/{entry}")
        for entry in order:
            outputs[f"{network}/{entry}"] = file[entry]
            if not np.isfinite(file[entry]).all():
                where = f"{network}/{entry}, computed in {part['precision']}"
                raise UserError(f"the release's {where}, holds numbers that are not finite")
    return outputs
