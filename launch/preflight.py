"""What can be wrong between hosts, looked for before a run begins: it would cost hours later, or give other
numbers.

Every process calls `preflight`; what one finds all are told, so all refuse with the same sentence.
"""

import importlib
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import keysync_jax
from keysync_jax.config import to_dict
from keysync_jax.errors import UserError
from keysync_jax.files import fingerprint, sources_fingerprint, write_text
from keysync_jax.train.config import AnyTrainConfig
from keysync_jax.train.hosts import gathered

SKEW_SECONDS = 60.0
"""Largest difference of two hosts' clocks: the times of files and events are compared."""

_SEEN_SECONDS = 30.0
"""How long a network file system may take to show a new file."""


@dataclass(frozen=True)
class Host:
    """What one process says of itself.

    Attributes:
      name: of its host.
      time: of its clock, seconds since 1970, right after all have met.
      code: hash of the package's sources, and the versions of JAX.
      config: hash of the run's settings.
      nonce: a name that nobody else makes.
    """

    name: str
    time: float
    code: str
    config: str
    nonce: str


def preflight(config: AnyTrainConfig, workdir: Path) -> list[str]:
    """Checks that the processes of a run can work together; returns the names of their hosts.

    A sum over all devices is right, clocks agree, code and config are the same, and what process 0 writes
    into the run's folder is seen by all.

    Raises:
      UserError: one of these does not hold; names the host.
    """
    if jax.process_count() == 1:
        return [socket.gethostname()]
    check_sum(device_sums())
    packages = ("", ".convert", ".configs", ".launch")
    code = f"{sources_fingerprint(map(_folder, packages))} jax {jax.__version__} {jax.lib.__version__}"
    here = Host(socket.gethostname(), time.time(), code, fingerprint(to_dict(config)), uuid.uuid4().hex)
    hosts = [Host(**row) for row in gathered(asdict(here))]
    check_alike(hosts)
    _check_folder(workdir, hosts)
    return [host.name for host in hosts]


def _folder(package: str) -> str:
    return str(next(iter(importlib.import_module(keysync_jax.__name__ + package).__path__)))


def device_sums() -> list[float]:
    """The sum of 1 ... n over all n devices, as each device of this process has it."""
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("all",))
    split = NamedSharding(mesh, PartitionSpec("all"))
    numbers = np.arange(1, len(devices) + 1, dtype=np.float32)
    placed = jax.make_array_from_callback(numbers.shape, split, lambda index: numbers[index])
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(placed)
    return [float(np.asarray(shard.data)) for shard in total.addressable_shards]


def check_sum(sums: Sequence[float]) -> None:
    """Refuses devices that add wrongly.

    Raises:
      UserError: one does; on every process.
    """
    count = jax.device_count()
    wanted = count * (count + 1) / 2
    rows = gathered({"name": socket.gethostname(), "sums": list(sums)})
    for row in rows:
        if wrong := [x for x in row["sums"] if x != wanted]:
            raise UserError(
                f"{row['name']}: a sum over all {count} devices is {wrong[0]:g} there, not {wanted:g}; a "
                "device or its link is faulty"
            )


def check_alike(hosts: Sequence[Host]) -> None:
    """Compares every host with process 0's.

    Raises:
      UserError: one has other code or settings, or its clock is wrong.
    """
    first = hosts[0]
    middle = float(np.median([host.time for host in hosts]))
    for number, host in enumerate(hosts):
        who = f"process {number} on {host.name}"
        if host.code != first.code:
            raise UserError(
                f"{who}: has another version of keysync_jax or JAX than process 0 on {first.name}; "
                "install the same on all hosts"
            )
        if host.config != first.config:
            raise UserError(
                f"{who}: was given another --config than process 0 on {first.name}; start the same "
                "command on all"
            )
        if abs(host.time - middle) > SKEW_SECONDS:
            raise UserError(
                f"{who}: its clock is {host.time - middle:+.0f} s off that of the others; set it (NTP), "
                "times of files and events are compared"
            )


def _check_folder(workdir: Path, hosts: Sequence[Host]) -> None:
    """Process 0 writes a file of a name that nobody has asked for before; the others look."""
    name = f"preflight-{hosts[0].nonce}"
    first = jax.process_index() == 0
    fault = ""
    if first:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_text(workdir / name, hosts[0].nonce)
        except OSError as error:
            fault = error.strerror or str(error)
    try:
        _refuse([row["fault"] for row in gathered({"fault": fault})], hosts, workdir, "cannot write it")
        seen = first or _appears(workdir, name, hosts[0].nonce)
        faults = [row["fault"] for row in gathered({"fault": "" if seen else f"of {hosts[0].name}"})]
        _refuse(faults, hosts, workdir, "does not see what process 0 writes there")
    finally:
        if first:
            with suppress(OSError):
                (workdir / name).unlink()


def _refuse(faults: Sequence[Any], hosts: Sequence[Host], workdir: Path, what: str) -> None:
    for number, fault in enumerate(faults):
        if fault:
            raise UserError(
                f"{workdir}: process {number} on {hosts[number].name} {what} ({fault}); a run's folder is "
                "one that all hosts share"
            )


def _appears(workdir: Path, name: str, content: str) -> bool:
    ends = time.monotonic() + _SEEN_SECONDS
    while True:
        with suppress(OSError):
            if (workdir / name).read_text() == content:
                return True
        if time.monotonic() > ends:
            return False
        time.sleep(0.5)
