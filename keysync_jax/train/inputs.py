"""What a run reads, by content: a folder may hold something else tomorrow, or the same have another name.

`WORKDIR/inputs.json` has the SHA-256 of every dataset's manifest, and of the networks that only judge.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keysync_jax.config import EncoderKind, from_dict, to_dict
from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.files import write_json
from keysync_jax.model import Network
from keysync_jax.train.fits import prepared_with
from keysync_jax.typing import Params

log = logging.getLogger(__name__)

FILE = "inputs.json"
FORMAT = "keysync-inputs-1"

PLACES = (
    "data.paths",
    "init.vae",
    "init.lpips_trunk",
    "init.lpips_heads",
    "distill.trajectories",
    "distill.student",
    "teacher",
)
"""Settings that say where an input lies; they may change once the input itself is known."""


@dataclass(frozen=True)
class DatasetInput:
    """One dataset.

    Attributes:
      manifest: SHA-256 of its manifest, which has those of its shards.
      prepared_with: SHA-256 by file name of the VAE and the encoder that made what the run takes of it, where
        the dataset knows them.
    """

    manifest: str
    prepared_with: dict[str, str]


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its config and the weights that it starts from.

    Attributes:
      data: the datasets, in the order of `data.paths`.
      networks: SHA-256 by name of the values of the networks that the loss goes through.
    """

    data: tuple[DatasetInput, ...]
    networks: dict[str, str]

    def save(self, workdir: Path) -> None:
        """Stores them with a run."""
        write_json(workdir / FILE, {"format": FORMAT, **to_dict(self)}, indent=2)


def inputs_of(
    datasets: Sequence[Dataset], encoder: EncoderKind | None, networks: Mapping[str, Network | None]
) -> Inputs:
    """The inputs of a run.

    Args:
      encoder: whose features it takes; None: of none.
      networks: name -> one that the loss goes through; None: it is not there.
    """
    data = (
        DatasetInput(dataset.sha256, {} if encoder is None else prepared_with(dataset, encoder))
        for dataset in datasets
    )
    return Inputs(tuple(data), {n: digest(net.params) for n, net in networks.items() if net is not None})


def digest(params: Params) -> str:
    """SHA-256 (hex) of parameters: their paths, types, shapes and values, in whatever order."""
    whole = hashlib.sha256()
    for path in sorted(params):
        x = np.asarray(params[path])
        whole.update(f"{path} {x.dtype} {x.shape}\n".encode())
        whole.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def read_inputs(workdir: Path) -> Inputs | None:
    """The inputs that a run was started with; None where it is from before they were stored.

    Raises:
      UserError: the file is damaged.
      OSError: the system cannot read it.
    """
    path = workdir / FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not the inputs of a training run in the format {FORMAT}")
    return from_dict(Inputs, content, str(path))


def check_inputs(workdir: Path, now: Inputs, paths: Sequence[str]) -> None:
    """Refuses to go on with other datasets or networks than the run was started with.

    A run from before they were stored has nothing to compare with; a warning says so.

    Args:
      now: the inputs that were found.
      paths: the folders of the datasets, for messages.

    Raises:
      UserError: there are others.
    """
    started = read_inputs(workdir)
    if started is None:
        log.warning(
            "%s: was started when runs did not note what they read; what it finds now is taken to be what it "
            "was started with, and is noted from now on",
            workdir,
        )
        return
    check_data(workdir, started, [data.manifest for data in now.data], paths)
    for name, sha256 in started.networks.items():
        if now.networks.get(name, sha256) != sha256:
            raise UserError(
                f"{workdir}: this run was started with another {name} than config.init gives now; "
                "go on with that, or give another --workdir"
            )


def check_data(workdir: Path, started: Inputs, manifests: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses other datasets than those a run was started with.

    Args:
      manifests: SHA-256 of the manifests of those that were found in `paths`.

    Raises:
      UserError: there are others, or they come in another order.
    """
    before = [data.manifest for data in started.data]
    if list(manifests) == before:
        return
    if sorted(manifests) == sorted(before):
        raise UserError(f"{workdir}: data.paths has the datasets of this run in another order")
    if len(manifests) != len(before):
        raise UserError(f"{workdir}: was started with {len(before)} datasets, not {len(manifests)}")
    other = next(path for path, a, b in zip(paths, manifests, before, strict=True) if a != b)
    raise UserError(
        f"{other}: is not the dataset that {workdir} was started with (its manifest is another one); "
        "give the folder where that one is now"
    )
