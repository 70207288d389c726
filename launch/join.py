"""Joining the other processes of a run, and the line that tells how it went."""

import glob
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

from keysync_jax.errors import UserError
from keysync_jax.launch.detect import Cluster, detect, given, proxies
from keysync_jax.train.hosts import HostsLostError

JOIN_SECONDS = 300
"""How long the others are waited for; hosts of a pool start minutes apart."""

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_METADATA_SECONDS = 5


def join_hosts(
    multihost: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    heartbeat: int = 60,
    seconds: int = JOIN_SECONDS,
) -> Cluster | None:
    """Connects this process with the run's other ones; does nothing for a run on one host.

    Args:
      multihost: find the others in the environment (`detect`).
      coordinator: `HOST:PORT` of process 0, with how many `processes` there are and which `process` this is;
        these count before anything in the environment.
      heartbeat: seconds without a sign of life after which a process counts as dead.
      seconds: how long to wait for the others.

    Returns:
      The cluster, where there is one; its line has been printed on stderr.

    Raises:
      UserError: what was told is not enough, or wrong.
      HostsLostError: the others do not answer.
    """
    told = [x is not None for x in (coordinator, processes, process)]
    if any(told) and not all(told):
        raise UserError("--coordinator, --processes and --process go together")
    if not multihost and not any(told):
        return None
    import jax

    if jax.distributed.is_initialized():
        cluster = Cluster("joined before (Ray)", None, jax.process_count(), jax.process_index())
    elif coordinator is not None and processes is not None and process is not None:
        cluster = given(coordinator, processes, process)
    else:
        chips = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
        has_tpu = chips and (find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ)
        cluster = detect(os.environ, has_tpu, find_spec("kubernetes") is not None, _metadata)
    notes = list(cluster.notes)
    if not jax.distributed.is_initialized():
        if through := proxies(os.environ):
            names = ", ".join(through)
            notes.append(f"{names} set: where the join hangs, unset them or add the hosts to no_proxy")
        _initialize(cluster, heartbeat, seconds)
    print(f"keysync: {_line(cluster)}", file=sys.stderr, flush=True)
    for note in notes + _few_devices(cluster):
        print(f"keysync: note: {note}", file=sys.stderr, flush=True)
    return cluster


def _initialize(cluster: Cluster, heartbeat: int, seconds: int) -> None:
    import jax

    if cluster.coordinator is not None and cluster.process != 0:
        _wait_for_name(cluster.coordinator.rpartition(":")[0].strip("[]"), seconds)
    # Known is enough: JAX's own detection would let a scheduler around it decide on the devices.
    known = cluster.coordinator is not None
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process if known else None,
            None if cluster.local_devices is None else list(cluster.local_devices),
            cluster_detection_method="deactivate" if known else None,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=heartbeat,
            # One that fails alone waits so long for the farewell of the others, who wait for it.
            shutdown_timeout_seconds=max(heartbeat, 10),
        )
    except (ValueError, RuntimeError) as error:
        where = f"process {cluster.process} of {cluster.processes} on {socket.gethostname()}"
        sentence = f"{where} cannot join the others at {cluster.coordinator}: {_first_line(error)}"
        if any(word in str(error) for word in ("DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED", "CANCELLED")):
            raise HostsLostError(sentence) from error
        raise UserError(sentence) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _wait_for_name(host: str, seconds: int) -> None:
    """Waits until the name of process 0's host is known: those of pods appear after the pods."""
    ends = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > ends:
                raise HostsLostError(
                    f"{socket.gethostname()} does not know the host of process 0, {host} ({error.strerror})"
                ) from error
        time.sleep(1)


def _line(cluster: Cluster) -> str:
    """`SLURM, process 3 of 16 on node07: 1 of 16 devices (NVIDIA H100 80GB HBM3), 1 slice`."""
    import jax

    devices = jax.devices()
    slices = len({getattr(device, "slice_index", None) for device in devices})
    return (
        f"{cluster.name}, process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {len(devices)} devices ({devices[0].device_kind}), "
        f"{slices} slice{'s' if slices > 1 else ''}"
    )


def _few_devices(cluster: Cluster) -> list[str]:
    """Says where a scheduler gave this host more GPUs than its processes use."""
    import jax

    on_node, tasks = os.environ.get("SLURM_GPUS_ON_NODE", ""), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if cluster.name != "SLURM" or not on_node.isdigit() or not tasks.partition("(")[0].isdigit():
        return []
    used = jax.local_device_count() * int(tasks.partition("(")[0])
    if jax.default_backend() == "gpu" and used < int(on_node):
        return [f"{used} of this node's {on_node} GPUs are used"]
    return []


def _metadata(key: str) -> str | None:
    """An attribute of this machine, where it is one of Google's cloud."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    # The server is on the link itself; a proxy does not know it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_METADATA_SECONDS) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, TimeoutError, OSError):
        return None
