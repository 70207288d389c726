"""Every cluster that a run can find itself in, from the variables that its scheduler sets."""

import pytest

from keysync_jax.errors import UserError
from keysync_jax.launch.detect import Cluster, detect, given, proxies

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[012-013,020],other7",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
    "SLURM_GPUS_ON_NODE": "8",
}
PORT = 61440 + 70001 % 4096


def slurm(**changes: str) -> Cluster:
    return detect({name: value for name, value in (SLURM | changes).items() if value})


def test_slurm() -> None:
    eight = slurm(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert eight == Cluster("SLURM", f"gpu012:{PORT}", 32, 11, (3,))
    # Without the list of GPUs their count on the node; without both, one device a process, as JAX does.
    assert slurm().local_devices == (3,)
    assert slurm(SLURM_GPUS_ON_NODE="").local_devices == (3,)
    assert slurm(SLURM_STEP_NODELIST="a-1,b").coordinator == f"a-1:{PORT}"
    assert slurm(SLURM_STEP_NODELIST="solo").coordinator == f"solo:{PORT}"
    assert slurm(JAX_COORDINATOR_PORT="1234").coordinator == "gpu012:1234"
    assert slurm(SLURM_RESTART_COUNT="2").notes == ("SLURM has started this job again 2 times",)


def test_slurm_with_one_task_a_node_uses_all_its_gpus() -> None:
    one = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    one["SLURM_PROCID"] = "1"
    assert slurm(**one, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7").local_devices is None
    assert slurm(**one).local_devices is None
    # Two tasks share eight.
    two = {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1"}
    assert slurm(**two).local_devices == (4, 5, 6, 7)
    # The second node has another number of tasks.
    assert slurm(SLURM_STEP_TASKS_PER_NODE="8,2,8(x2)", SLURM_LOCALID="1").local_devices == (4, 5, 6, 7)


def test_slurm_with_gpus_per_task_numbers_each_from_0() -> None:
    assert slurm(CUDA_VISIBLE_DEVICES="5").local_devices is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SLURM_STEP_NODELIST": ""}, "inside SLURM's job 70001, but not started by srun"),
        ({"SLURM_PROCID": "", "SLURM_LOCALID": ""}, "SLURM_PROCID, SLURM_LOCALID is missing"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS='many' is not a whole number"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3(x4)"}, "3 processes on this host cannot share its 8 GPUs evenly"),
        ({"SLURM_STEP_TASKS_PER_NODE": "eight"}, "SLURM_STEP_TASKS_PER_NODE='eight' cannot be read"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, "does not tell the tasks of this node"),
        ({"SLURM_PROCID": "32"}, "process 32 is not one of 32: they are numbered from 0 to 31"),
    ],
)
def test_slurm_that_says_too_little(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        slurm(**changes)
    assert sentence in str(caught.value)


MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def test_open_mpi() -> None:
    port = 61440 + (1531576320 >> 12) % 4096
    assert detect(MPI) == Cluster("Open MPI", f"10.96.0.1:{port}", 4, 2, (0,))
    assert detect(MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == (0, 1)
    six = detect(MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620::2]:43370"})
    assert six.coordinator == f"[fe80::b9b]:{61440 + (1314521088 >> 12) % 4096}"
    # Open MPI comes before SLURM, which may have started it.
    assert detect(MPI | SLURM).name == "Open MPI"
    five = {name: value for name, value in MPI.items() if "orte" not in name}
    with pytest.raises(UserError, match=r"set JAX_COORDINATOR_ADDRESS=HOST:PORT of rank 0"):
        detect(five)
    assert detect(five | {"JAX_COORDINATOR_ADDRESS": "a:1"}).coordinator == "a:1"


GKE = {"TPU_WORKER_HOSTNAMES": "w-0.run,w-1.run,w-2.run,w-3.run", "TPU_WORKER_ID": "2"}


def test_tpus_of_gke() -> None:
    assert detect(GKE, has_tpu=True) == Cluster("GKE TPU", "w-0.run:8482", 4, 2)
    slices = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "s0-w0.run:8081",
    }
    assert detect(GKE | slices, has_tpu=True) == Cluster("GKE TPU", "s0-w0.run:8482", 12, 6)
    addresses = {"TPU_PROCESS_ADDRESSES": "p0:8476,p1:8476", "JAX_COORDINATOR_PORT": "9"}
    assert detect(GKE | addresses | {"TPU_WORKER_ID": "1"}, has_tpu=True) == Cluster("GKE TPU", "p0:9", 2, 1)
    # What a GPU's pod has of these is not for it; on GKE the pod is one of Kubernetes too.
    assert detect(GKE | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, has_tpu=True).name == "GKE TPU"
    with pytest.raises(UserError, match="no cluster is known here"):
        detect(GKE)


def test_tpus_of_gce() -> None:
    told = {
        "agent-worker-number": "3",
        "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2,c:2:10.0.0.3,d:3:10.0.0.4",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-32'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }
    assert detect({}, True, metadata=told.get) == Cluster("GCE TPU", "10.0.0.1:8482", 8, 7)
    names = told | {"worker-network-endpoints": "a,b,c,d", "tpu-env": ""}
    assert detect({}, True, metadata=names.get) == Cluster("GCE TPU", "a:8482", 4, 3)
    for environment, chips in (({"TPU_SKIP_MDS_QUERY": "1"}, True), ({}, False)):
        with pytest.raises(UserError, match="no cluster is known here"):
            detect(environment, chips, metadata=told.get)


def test_kubernetes() -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "5"}
    asked = detect(pod, has_kubernetes=True)
    assert (asked.name, asked.coordinator, asked.processes, asked.process) == ("Kubernetes", None, None, 5)
    with pytest.raises(UserError, match=r"set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in the pods"):
        detect(pod)
    with pytest.raises(UserError, match=r"the job must be indexed"):
        detect({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, has_kubernetes=True)
    # As `keysync launch jobset` sets them.
    told = pod | {"JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:1234", "JAX_NUM_PROCESSES": "8"}
    assert detect(told) == Cluster("variables", "run-workers-0-0.run:1234", 8, 5)


def test_variables_come_first() -> None:
    ours = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    # SLURM around it has no say, neither on devices: JAX itself would take [SLURM_LOCALID].
    assert detect(ours | SLURM | MPI) == Cluster("variables", "h:1", 2, 1, None)
    assert detect(ours | {"JAX_LOCAL_DEVICE_IDS": "2,3"}).local_devices == (2, 3)
    xpk = {"JAX_COORDINATOR_IP": "h", "JAX_COORDINATOR_PORT": "7", "NNODES": "4", "NODE_RANK": "0"}
    assert detect(xpk) == Cluster("variables", "h:7", 4, 0)
    # An address alone is another place for process 0 of what the scheduler tells.
    assert slurm(JAX_COORDINATOR_ADDRESS="h:1") == Cluster("SLURM", "h:1", 32, 11, (3,))
    with pytest.raises(UserError, match=r"not which process this is; set JAX_PROCESS_ID"):
        detect({"JAX_COORDINATOR_ADDRESS": "h:1", "NNODES": "2"})
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS=h has no port"):
        detect({"JAX_COORDINATOR_ADDRESS": "h", "NNODES": "2", "NODE_RANK": "0"})


def test_options() -> None:
    assert given("h:1", 2, 1) == Cluster("as told", "h:1", 2, 1, None)
    for address in ("h", "h:", ":1", "h:port", "h:70000"):
        with pytest.raises(UserError, match="is not HOST:PORT"):
            given(address, 2, 1)
    with pytest.raises(UserError, match="process 2 is not one of 2"):
        given("h:1", 2, 2)


def test_proxies() -> None:
    set_ = {"HTTPS_PROXY": "p:1", "http_proxy": "", "no_proxy": "x", "MY_PROXY_NAME": "y"}
    assert proxies(set_) == ["HTTPS_PROXY"]
