"""What `keysync launch` writes: run by a fake SLURM, read as Kubernetes reads it, refused where it is "
"wrong."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keysync_jax.cli import main
from keysync_jax.launch.submit import tpu_slice

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--config", "configs/keyframe.py", "--workdir", "runs/a b", "--config.seed=3"]

SRUN = """#!{python}
# Two nodes of two tasks; exits as srun does: the highest code, that of the tasks that it killed too.
import os, signal, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("--"):
    print("srun has", words.pop(0), flush=True)
tasks = []
for rank in range(4):
    told = dict(SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="4", SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank % 2), SLURM_NODEID=str(rank // 2), SLURM_STEP_TASKS_PER_NODE="2(x2)",
        SLURM_GPUS_ON_NODE="2")
    tasks.append(subprocess.Popen(words, env=os.environ | told, start_new_session=True))
if os.environ["MODE"] == "term":
    while len(os.listdir(os.environ["READY"])) < 4:
        time.sleep(0.02)
    for task in tasks:
        os.killpg(task.pid, signal.SIGTERM)
codes = [task.wait() for task in tasks]
sys.exit(137 if os.environ["MODE"] == "2" else max(codes))
"""

KEYSYNC = """#!{python}
# `keysync train --multihost` up to the line of detection; then it ends as MODE says.
import os, signal, sys, time
from keysync_jax.launch.detect import detect
cluster = detect(os.environ)
print(cluster.name, cluster.coordinator, cluster.process, "of", cluster.processes, cluster.local_devices,
      sys.argv[1:], flush=True)
mode = os.environ["MODE"]
if mode == "term":
    def save(*_):
        time.sleep(0.3)
        open(os.environ["READY"] + "/saved%d" % cluster.process, "w").close()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    open(os.environ["READY"] + "/%d" % cluster.process, "w").close()
    time.sleep(60)
sys.exit(int(mode) if cluster.process == 1 else 0)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH but what bash needs, with a fake SLURM; the work is done beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = {
        "srun": SRUN.format(python=sys.executable),
        "keysync": KEYSYNC.format(python=sys.executable),
        "scontrol": '#!/bin/bash\necho "$@" >requeued\n',
        "sbatch": '#!/bin/bash\nSLURM_JOB_ID=77 bash "$1"\n',
        "kubectl": '#!/bin/bash\necho "kubectl $@"\n',
    }
    for name, text in fake.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "ready").mkdir()
    monkeypatch.setenv("READY", str(tmp_path / "ready"))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "JAX_COORD", "CUDA_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def slurm(*options: str) -> int:
    return main(["launch", "slurm", "--nodes", "2", "--gpus", "2", "--name", "run", *options, "--", *TRAIN])


def submitted(mode: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, bool]:
    """Exit code of the job, what it printed, and whether it asked to be queued again."""
    environment = os.environ | {"MODE": mode, "SLURM_JOB_ID": "77"}
    run = subprocess.run(["bash", "run.sbatch"], env=environment, capture_output=True, text=True, timeout=60)
    again = Path("requeued").exists()
    Path("requeued").unlink(missing_ok=True)
    assert not list(Path().glob("*.ended"))
    return run.returncode, run.stdout + run.stderr, again


def test_slurm_runs_the_script(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm() == 0
    assert "sbatch run.sbatch submits it" in capfd.readouterr().out
    subprocess.run(["bash", "-n", "run.sbatch"], check=True)
    code, told, again = submitted("0", capfd)
    assert (code, again) == (0, False), told
    port = 61440 + 77
    command = ["train", "--multihost", *TRAIN[1:]]
    for rank in range(4):
        assert f"SLURM n1:{port} {rank} of 4 ({rank % 2},) {command}" in told
    assert "srun has --kill-on-bad-exit=1" in told
    script = Path("run.sbatch").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--requeue", "--signal=TERM@300"):
        assert f"#SBATCH {line}\n" in script
    assert "@" not in script.replace("TERM@300", "").replace('"$@"', "")


@pytest.mark.parametrize(
    ("mode", "code", "again"), [("42", 42, True), ("2", 137, False), ("term", 143, True)]
)
def test_slurm_starts_again_what_may_be(
    programs: Path, capfd: pytest.CaptureFixture[str], mode: str, code: int, again: bool
) -> None:
    assert slurm() == 0
    found, told, requeued = submitted(mode, capfd)
    assert (found, requeued) == (code, again), told
    # The shells around them waited until all had saved.
    saved = [path.name for path in Path(os.environ["READY"]).glob("saved*")]
    assert len(saved) == (4 if mode == "term" else 0)


def test_slurm_gives_up_after_so_many_starts(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm("--restarts", "3") == 0
    os.environ["SLURM_RESTART_COUNT"] = "3"
    try:
        assert submitted("42", capfd)[::2] == (42, False)
    finally:
        del os.environ["SLURM_RESTART_COUNT"]


def test_a_container_of_pyxis(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm("--container", "keysync.sqsh", "--mount", "/data:/data:ro", "--partition", "long") == 0
    script = Path("run.sbatch").read_text()
    assert "#SBATCH --partition=long\n" in script
    _, told, _ = submitted("0", capfd)
    here = Path.cwd()
    assert "srun has --container-image=keysync.sqsh" in told
    assert f"srun has --container-mounts={here}:{here},/data:/data:ro" in told


def test_submitting(
    programs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", "0")
    assert slurm("--submit") == 0
    assert "SLURM n1:" in capfd.readouterr().out
    before = Path("run.sbatch").read_bytes()
    assert slurm("--submit") == 2
    assert "run.sbatch: exists already" in capfd.readouterr().err
    assert Path("run.sbatch").read_bytes() == before
    monkeypatch.setenv("MODE", "3")
    assert slurm("--submit", "-o", "other.sbatch") == 2
    assert "sbatch other.sbatch failed (exit code 3); the file is other.sbatch" in capfd.readouterr().err
    (programs / "sbatch").unlink()
    assert slurm("--submit", "-o", "third.sbatch") == 2
    assert "sbatch is not here, so nothing was submitted; the file is third.sbatch" in capfd.readouterr().err
    assert pods("jobset", "--gpus", "8", "--submit") == 0
    assert "kubectl apply -f run.yaml" in capfd.readouterr().out
    ray = ["launch", "ray", "--nodes", "2", "--address", "http://head:8265"]
    assert main([*ray, "--submit", "--", *TRAIN]) == 2
    assert "ray is not here, so nothing was submitted" in capfd.readouterr().err
    (programs / "ray").symlink_to(programs / "kubectl")
    assert main([*ray, "--submit", "--", *TRAIN]) == 0
    assert "job submit --address http://head:8265 --no-wait -- python -m keysync_jax.launch.train_on_ray" in (
        capfd.readouterr().out
    )


def pods(kind: str, *options: str) -> int:
    shared = ["--nodes", "4", "--name", "run", "--image", "keysync:1", "--bucket", "clips", "--claim", "work"]
    return main(["launch", kind, *shared, *options, "--", *TRAIN])


def read_yaml(path: str = "run.yaml") -> Any:
    return pytest.importorskip("yaml").safe_load(Path(path).read_text())


def check_pod(pod: Any, command: list[str] | None) -> None:
    """What the API asks of a pod, and what a run does."""
    (container,) = pod["containers"]
    assert container["image"] == "keysync:1"
    if command is not None:
        assert container["command"] == command
        assert pod["terminationGracePeriodSeconds"] == 120
        assert pod["restartPolicy"] == "Never"
    names = [volume["name"] for volume in pod["volumes"]]
    assert names == [mount["name"] for mount in container["volumeMounts"]] == ["shm", "bucket", "shared"]
    assert [len(volume) for volume in pod["volumes"]] == [2, 2, 2]  # A name, and one kind each.
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/bucket", "/shared"]


def check_jobset(content: Any, replicas: int, parallelism: int) -> Any:
    """The pod of a JobSet whose restarts follow the exit codes."""
    assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert content["metadata"]["name"] == "run"
    spec = content["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 50
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (jobs,) = spec["replicatedJobs"]
    assert jobs["replicas"] == replicas
    job = jobs["template"]["spec"]
    assert job["parallelism"] == job["completions"] == parallelism
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    (failure,) = job["podFailurePolicy"]["rules"]
    assert failure == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [1, 2]},
    }
    pod = job["template"]["spec"]
    assert pod["containers"][0]["name"] == "train"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    check_pod(pod, ["keysync", "train", "--multihost", *TRAIN[1:]])
    return pod


def test_jobset_for_tpus(programs: Path) -> None:
    assert pods("jobset", "--tpu", "v5e:2x4", "--slices", "2") == 0
    pod = check_jobset(read_yaml(), replicas=2, parallelism=2)
    selector = {"accelerator": "tpu-v5-lite-podslice", "topology": "2x4"}
    assert pod["nodeSelector"] == {f"cloud.google.com/gke-tpu-{name}": v for name, v in selector.items()}
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_for_gpus_can_be_joined(programs: Path) -> None:
    from keysync_jax.launch.detect import Cluster, detect

    assert pods("jobset", "--gpus", "8") == 0
    pod = check_jobset(read_yaml(), replicas=1, parallelism=4)
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    # What Kubernetes adds to the pods of an indexed job.
    variables |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    assert detect(variables) == Cluster("variables", "run-workers-0-0.run:55527", 4, 3)


def test_rayjob(programs: Path) -> None:
    assert pods("ray", "--gpus", "8") == 0
    content = read_yaml()
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    command = ["keysync", "train", "--multihost", *TRAIN[1:]]
    told = ["--nodes", "4", "--gpus", "8", "--restarts", "50", "--", *command]
    assert shlex.split(content["spec"]["entrypoint"]) == [
        "python",
        "-m",
        "keysync_jax.launch.train_on_ray",
        *told,
    ]
    cluster = content["spec"]["rayClusterSpec"]
    check_pod(cluster["headGroupSpec"]["template"]["spec"], None)
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    check_pod(group["template"]["spec"], None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["slurm", "--nodes", "0"], "--nodes 0: must be 1 or more"),
        (["slurm", "--nodes", "1", "--name", "a b"], "--name 'a b': is not a small letter"),
        (["slurm", "--nodes", "1", "--time", "1h\n#SBATCH x"], "is not DAYS-HOURS:MINUTES:SECONDS"),
        (["slurm", "--nodes", "1", "--partition", "a;b"], "--partition 'a;b': is not a name"),
        (["slurm", "--nodes", "1", "--container", "$(x)"], "--container '$(x)': is not an image's"),
        (["slurm", "--nodes", "1", "--mount", "/a:/b"], "--mount goes with --container"),
        (["slurm", "--nodes", "1", "--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["jobset", "--nodes", "1", "--gpus", "8"], "--image is missing"),
        (
            ["jobset", "--nodes", "2", "--gpus", "8", "--slices", "2", "--image", "x"],
            "--slices goes with --tpu",
        ),
        (
            ["jobset", "--nodes", "4", "--tpu", "v5e:4x8", "--image", "x"],
            "1 x v5e:4x8 are 8 machines of 4 chips",
        ),
        (["jobset", "--nodes", "1", "--tpu", "v9:4x8", "--image", "x"], "--tpu 'v9:4x8': write v4, v5e"),
        (
            ["jobset", "--nodes", "1", "--tpu", "v5e:1x2", "--image", "x"],
            "2 chips are no whole machines of 4",
        ),
        (["ray", "--nodes", "1", "--address", "a b"], "--address 'a b': is not http://HOST:8265"),
    ],
)
def test_values_that_do_not_belong_into_a_script(
    programs: Path, capfd: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["launch", *options, "--", *TRAIN]) == 2
    assert sentence in capfd.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "after -- comes the command of each process"),
        (["dub", "a.mp4"], "after -- comes the command of each process"),
        (["train", "--config", "c.py"], "needs --config FILE and --workdir DIR"),
        ([*TRAIN, "--wrkdir", "x"], "cannot be read (unrecognized arguments: --wrkdir x)"),
        ([*TRAIN, "--process", "3"], "has --process; leave it out"),
        ([*TRAIN, "--dry-run"], "has --dry-run"),
    ],
)
def test_commands_that_do_not_train(
    programs: Path, capfd: pytest.CaptureFixture[str], command: list[str], sentence: str
) -> None:
    assert main(["launch", "slurm", "--nodes", "2", "--", *command]) == 2
    assert sentence in capfd.readouterr().err


def test_slices() -> None:
    assert tpu_slice("v5p:2x2x4") == ("tpu-v5p-slice", "2x2x4", 4)
    assert tpu_slice("v6e:16x16") == ("tpu-v6e-slice", "16x16", 64)
