"""Which cluster a process runs in, and which of its processes it is, from the environment alone.

Pure functions of a mapping of variables, so that every cluster can be tried on any machine. JAX detects some
of these by itself (`jax.distributed.initialize()`); read here are also the variables that it leaves out, and
its traps are walked around: inside SLURM it shows one GPU of a node with one task, and lets SLURM decide on
devices even where all else was given.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from keysync_jax.errors import UserError

Environment = Mapping[str, str]
Metadata = Callable[[str], str | None]
"""Reads an attribute of a machine of Google's cloud; None where it has none."""

TPU_PORT = 8482
KUBERNETES_PORT = 55527
_FIRST_PORT = 61440
"""Ports of jobs that nobody gave one: from here on, by the number of the job, as JAX chooses them."""


@dataclass(frozen=True)
class Cluster:
    """What is known of a run's processes before they have joined.

    Attributes:
      name: of the scheduler or the way that told.
      coordinator: `HOST:PORT` of process 0; None where only JAX's own detection can find it, as it can the
      rest. processes, process: how many there are, and which one this is.
      local_devices: numbers of the GPUs that are this process's; None: all that it sees.
      notes: what the user should know, in sentences.
    """

    name: str
    coordinator: str | None
    processes: int | None
    process: int | None
    local_devices: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def detect(
    environment: Environment,
    has_tpu: bool = False,
    has_kubernetes: bool = False,
    metadata: Metadata = lambda key: None,
) -> Cluster:
    """The cluster, the first of: explicit variables, Open MPI, SLURM, a TPU of GKE, one of GCE, Kubernetes.

    Args:
      environment: variables of the process.
      has_tpu: libtpu is installed and the machine has chips.
      has_kubernetes: the package `kubernetes` is installed, with which JAX asks the cluster.
      metadata: of the machine, for TPUs of GCE; asked only where `has_tpu`.

    Raises:
      UserError: there is no cluster, or what it says is not enough to join.
    """
    tpu_metadata = metadata if has_tpu and "TPU_SKIP_MDS_QUERY" not in environment else lambda key: None
    found = (
        _explicit(environment)
        or _open_mpi(environment)
        or _slurm(environment)
        or (_gke_tpu(environment) if has_tpu else None)
        or _gce_tpu(environment, tpu_metadata)
        or _kubernetes(environment, has_kubernetes)
    )
    if found is not None:
        return found
    raise UserError(
        "--multihost: no cluster is known here (SLURM, Open MPI, TPUs of GKE or GCE, Kubernetes); give "
        "--coordinator, --processes and --process, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID"
    )


def given(coordinator: str, processes: int, process: int) -> Cluster:
    """The cluster that options told; the scheduler around it has no say, neither on devices.

    Raises:
      UserError: the address has no port, or there is no such process.
    """
    return _checked(Cluster("as told", coordinator, processes, process))


def proxies(environment: Environment) -> list[str]:
    """Variables that send connections through a proxy, which hangs the join on some systems."""
    return sorted(name for name in environment if name.lower() in _PROXIES and environment[name])


_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def _explicit(environment: Environment) -> Cluster | None:
    """JAX_COORDINATOR_ADDRESS (or _IP) with a count and a number; xpk's and Kubeflow's names count too."""
    address = environment.get("JAX_COORDINATOR_ADDRESS") or environment.get("JAX_COORDINATOR_IP")
    processes = _first(environment, "JAX_NUM_PROCESSES", "NNODES")
    process = _first(environment, "JAX_PROCESS_ID", "NODE_RANK", "JOB_COMPLETION_INDEX")
    if address is None or processes is None:
        return None
    if process is None:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} and {processes[0]} are set, but not which process this is; "
            "set JAX_PROCESS_ID (or NODE_RANK)"
        )
    if ":" not in address:
        port = environment.get("JAX_COORDINATOR_PORT")
        if port is None:
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address} has no port; set JAX_COORDINATOR_PORT")
        address = f"{address}:{port}"
    local = environment.get("JAX_LOCAL_DEVICE_IDS")
    devices = None if local is None else tuple(_number("JAX_LOCAL_DEVICE_IDS", x) for x in local.split(","))
    return _checked(Cluster("variables", address, processes[1], process[1], devices))


def _open_mpi(environment: Environment) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    processes, process = _numbers(environment, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    launcher = re.search(r"^(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and launcher is None:
        raise UserError(
            "inside Open MPI, but it does not tell where mpirun runs (version 5 does not); set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT of rank 0 (mpirun -x JAX_COORDINATOR_ADDRESS=...)"
        )
    if address is None and launcher is not None:
        # The number of a job is a multiple of 2^12.
        port = environment.get("JAX_COORDINATOR_PORT") or _port(int(launcher[1]) >> 12)
        address = f"{launcher[2] or f'[{launcher[3]}]'}:{port}"
    tasks = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    devices = _share(environment, tasks, local, None)
    return _checked(Cluster("Open MPI", address, processes, process, devices))


def _slurm(environment: Environment) -> Cluster | None:
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_STEP_NODELIST" not in environment:
        raise UserError(
            f"inside SLURM's job {job}, but not started by srun, so nothing tells which process this is; "
            "put srun in front of the command"
        )
    processes, process, local = _numbers(environment, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    host = _first_host(environment["SLURM_STEP_NODELIST"])
    port = environment.get("JAX_COORDINATOR_PORT") or _port(_number("SLURM_JOB_ID", job))
    address = environment.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{port}"
    node = _number("SLURM_NODEID", environment.get("SLURM_NODEID", "0"))
    tasks = _tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"), node)
    devices = _share(environment, tasks, local, environment.get("SLURM_GPUS_ON_NODE"))
    notes = []
    if restarts := environment.get("SLURM_RESTART_COUNT"):
        notes.append(f"SLURM has started this job again {restarts} times")
    return _checked(Cluster("SLURM", address, processes, process, devices, tuple(notes)))


def _first_host(nodes: str) -> str:
    """`node[003-007,9],other` -> `node003`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no host")
    return found[1] + (found[2] or "")


def _tasks_of_node(counts: str, node: int) -> int:
    """Tasks on the node of this number: `8(x3),4` are 8 on each of three nodes, then 4."""
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} cannot be read")
        if node < (nodes := int(found[2] or 1)):
            return int(found[1])
        node -= nodes
    raise UserError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} does not tell the tasks of this node")


def _share(environment: Environment, tasks: int, local: int, on_node: str | None) -> tuple[int, ...] | None:
    """GPUs of one of several processes of a host; None: all that it sees.

    Args:
      tasks, local: processes of this host, and which of them this one is.
      on_node: GPUs that the scheduler says the host has for the job.

    Raises:
      UserError: the processes cannot share the GPUs evenly.
    """
    if (told := environment.get("JAX_LOCAL_DEVICE_IDS")) is not None:
        return tuple(_number("JAX_LOCAL_DEVICE_IDS", x) for x in told.split(","))
    visible = next(
        (environment[n] for n in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if n in environment), ""
    )
    seen = len([x for x in visible.split(",") if x.strip()])
    if tasks == 1 or (seen == 1 and on_node != "1"):
        # Its own alone (--gpus-per-task), whose number within the task is 0, whatever it is on the host.
        return None
    count = seen or _number("SLURM_GPUS_ON_NODE", on_node or "0")
    if count == 0:
        return (local,)  # Nothing tells; on hosts without GPUs it has no effect.
    if count % tasks:
        raise UserError(
            f"{tasks} processes on this host cannot share its {count} GPUs evenly; "
            "start one for each GPU (--ntasks-per-node), or one for the host"
        )
    each = count // tasks
    return tuple(range(local * each, (local + 1) * each))


def _gke_tpu(environment: Environment) -> Cluster | None:
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        return None
    (worker,) = _numbers(environment, "TPU_WORKER_ID")
    return _tpu("GKE TPU", environment, environment.get, hosts.split(","), worker)


def _gce_tpu(environment: Environment, metadata: Metadata) -> Cluster | None:
    worker = metadata("agent-worker-number")
    endpoints = metadata("worker-network-endpoints") if worker is not None else None
    if worker is None or endpoints is None:
        return None
    told = dict(re.findall(r"^\s*(\w+):\s*'?([^'\n]*)'?\s*$", metadata("tpu-env") or "", re.MULTILINE))
    # Names, or triples name:id:ip.
    hosts = [entry.split(":")[-1] for entry in endpoints.split(",")]
    return _tpu(
        "GCE TPU",
        environment,
        lambda key: environment.get(key) or told.get(key),
        hosts,
        _number("agent-worker-number", worker),
    )


def _tpu(name: str, environment: Environment, told: Metadata, hosts: list[str], worker: int) -> Cluster:
    """Hosts of one slice, and slices by MEGASCALE's variables."""
    slices = _number("MEGASCALE_NUM_SLICES", told("MEGASCALE_NUM_SLICES") or "1")
    which = _number("MEGASCALE_SLICE_ID", told("MEGASCALE_SLICE_ID") or "0")
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        first = (told("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
        address = f"{first}:{environment.get('JAX_COORDINATOR_PORT', TPU_PORT)}"
    return _checked(Cluster(name, address, len(hosts) * slices, worker + which * len(hosts)))


def _kubernetes(environment: Environment, has_package: bool) -> Cluster | None:
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return None
    index = environment.get("JOB_COMPLETION_INDEX")
    if index is None:
        raise UserError(
            "inside Kubernetes, but this pod has no number: the job must be indexed (completionMode: Indexed)"
        )
    if not has_package:
        raise UserError(
            "inside Kubernetes, where nothing tells how many processes there are: set "
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in the pods, as keysync launch jobset does, "
            "or pip install 'jax[k8s]'"
        )
    note = "Kubernetes is asked for one Job's pods; of a JobSet, replicas must be 1"
    return Cluster("Kubernetes", None, None, _number("JOB_COMPLETION_INDEX", index), None, (note,))


def _checked(cluster: Cluster) -> Cluster:
    assert cluster.coordinator is not None
    assert cluster.processes is not None
    assert cluster.process is not None
    host, colon, port = cluster.coordinator.rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"the coordinator {cluster.coordinator!r} is not HOST:PORT")
    if not 0 <= cluster.process < cluster.processes:
        raise UserError(
            f"process {cluster.process} is not one of {cluster.processes}: they are numbered from 0 to "
            f"{cluster.processes - 1}"
        )
    return cluster


def _port(job: int) -> int:
    return _FIRST_PORT + job % 4096


def _first(environment: Environment, *names: str) -> tuple[str, int] | None:
    """The first of the variables that is set, and its number."""
    name = next((name for name in names if environment.get(name)), None)
    return None if name is None else (name, _number(name, environment[name]))


def _numbers(environment: Environment, *names: str) -> list[int]:
    if missing := [name for name in names if name not in environment]:
        raise UserError(f"{', '.join(missing)} is missing in the environment that the scheduler made")
    return [_number(name, environment[name]) for name in names]


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value!r} is not a whole number") from None
