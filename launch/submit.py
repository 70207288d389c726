"""`keysync launch`: writes what a scheduler is given to start `keysync train` on many machines, and submits
it.

The templates are in `launch/cluster/`, text with `@names@` for values, each of which is checked before it is
put in.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from keysync_jax.errors import UserError
from keysync_jax.files import write_text

TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
"""A TPU -> what GKE calls its nodes."""

_CHIPS = 4
"""Of a host of a slice of several hosts."""

_RAY_MODULE = "keysync_jax.launch.train_on_ray"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the schedulers as subcommands, each with its options; what follows `--` is not parsed."""
    kinds = parser.add_subparsers(dest="scheduler", metavar="SCHEDULER", required=True)
    slurm = kinds.add_parser("slurm", help="an sbatch script")
    slurm.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="of a node, a process each (default 8)"
    )
    slurm.add_argument("--cpus", type=int, default=8, metavar="N", help="of a process (default 8)")
    slurm.add_argument("--time", default="24:00:00", help="limit of one start of the job (default 24:00:00)")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--account", metavar="NAME")
    slurm.add_argument("--qos", metavar="NAME")
    slurm.add_argument("--container", metavar="IMAGE", help="run in it, where SLURM has pyxis")
    slurm.add_argument(
        "--mount", action="append", default=[], metavar="FROM:TO", help="folder that the container sees"
    )
    jobset = kinds.add_parser("jobset", help="a JobSet for Kubernetes")
    which = jobset.add_mutually_exclusive_group(required=True)
    which.add_argument("--tpu", metavar="KIND:TOPOLOGY", help="of GKE: v5e:4x8, v5p:2x2x4, v6e:4x4, v4:2x2x2")
    which.add_argument("--gpus", type=int, metavar="N", help="of a node, all of one process")
    jobset.add_argument("--slices", type=int, default=1, metavar="N", help="of the TPU (default 1)")
    ray = kinds.add_parser("ray", help="a RayJob for KubeRay, or a job of a Ray cluster that runs")
    ray.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="of a node, all of one process (default 8)"
    )
    ray.add_argument("--address", metavar="URL", help="of a cluster that runs; nothing is written then")
    for kind in (jobset, ray):
        kind.add_argument("--image", metavar="IMAGE", help="with keysync_jax (launch/cluster/Dockerfile)")
        kind.add_argument("--bucket", metavar="NAME", help="of GKE, mounted at /bucket")
        kind.add_argument("--claim", metavar="NAME", help="PersistentVolumeClaim, mounted at /shared")
    for kind in (slurm, jobset, ray):
        kind.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
        kind.add_argument("--name", default="keysync", help="of the job (default keysync)")
        kind.add_argument(
            "--restarts", type=int, default=50, metavar="N", help="starts after the first (default 50)"
        )
        kind.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="a new file (default NAME.sbatch, .yaml)"
        )
        kind.add_argument("--submit", action="store_true", help="hand it to the scheduler")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the file, and submits it where asked; returns the exit code.

    Args:
      rest: what follows `--`: the command of each process, `train ...`.

    Raises:
      UserError: a value cannot be used, the file exists, or the scheduler's program is missing or fails.
    """
    command = train_command(rest)
    check(
        "--name",
        arguments.name,
        r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
        "a small letter, then letters, digits, -",
    )
    for option in ("nodes", "restarts"):
        if getattr(arguments, option) < (option == "nodes"):
            raise UserError(
                f"--{option} {getattr(arguments, option)}: must be {int(option == 'nodes')} or more"
            )
    if arguments.scheduler == "ray" and arguments.address is not None:
        return _submit_to_ray(arguments, command)
    make: dict[str, Callable[[argparse.Namespace, Sequence[str]], str]] = {
        "slurm": slurm_script,
        "jobset": jobset,
        "ray": rayjob,
    }
    text = make[arguments.scheduler](arguments, command)
    suffix = ".sbatch" if arguments.scheduler == "slurm" else ".yaml"
    path: Path = arguments.output or Path(arguments.name + suffix)
    if path.exists():
        raise UserError(f"{path}: exists already; give another name with --output")
    write_text(path, text)
    submit = (
        ["sbatch", str(path)] if arguments.scheduler == "slurm" else ["kubectl", "apply", "-f", str(path)]
    )
    if not arguments.submit:
        print(f"wrote {path}; {shlex.join(submit)} submits it")
        return 0
    print(f"wrote {path}")
    return _run_program(submit, f"; the file is {path}")


def train_command(rest: Sequence[str]) -> list[str]:
    """The command of each process, `keysync train --multihost ...`.

    Raises:
      UserError: it is not one that trains, or has options that the scheduler sees to.
    """
    from keysync_jax.launch.train import add_arguments as add_train_arguments

    if not rest or rest[0] != "train":
        raise UserError(
            "after -- comes the command of each process: -- train --config FILE --workdir DIR ..."
        )
    parser = _Parser(prog="train", add_help=False)
    add_train_arguments(parser)
    parsed = parser.parse_args([word for word in rest[1:] if not word.startswith("--config.")])
    if parsed.config is None or parsed.workdir is None:
        raise UserError("the command after -- needs --config FILE and --workdir DIR")
    for option in ("coordinator", "processes", "process", "devices", "topology", "report"):
        if getattr(parsed, option) is not None:
            raise UserError(
                f"the command after -- has --{option}; leave it out, each process finds its place"
            )
    if parsed.dry_run:
        raise UserError("the command after -- has --dry-run, which needs one machine alone")
    return ["keysync", "train", "--multihost", *(word for word in rest[1:] if word != "--multihost")]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"the command after -- cannot be read ({message})")


def slurm_script(arguments: argparse.Namespace, command: Sequence[str]) -> str:
    """The sbatch script."""
    check("--time", arguments.time, r"(\d+-)?\d+(:\d+){0,2}", "DAYS-HOURS:MINUTES:SECONDS")
    _check_positive(arguments, "gpus", "cpus")
    directives = ""
    for option in ("partition", "account", "qos"):
        if (value := getattr(arguments, option)) is not None:
            check(f"--{option}", value, r"[\w.,-]+", "a name")
            directives += f"#SBATCH --{option}={value}\n"
    container = ""
    if arguments.container is not None:
        check("--container", arguments.container, r"[\w./:@#+-]+", "an image's name or file")
        mounts = ['"$PWD:$PWD"']
        for mount in arguments.mount:
            check("--mount", mount, r"/[\w./-]*:/[\w./-]*(:ro|:rw)?", "FROM:TO, two absolute paths")
            mounts.append(mount)
        container = (
            f" --container-image={shlex.quote(arguments.container)} --container-mounts={','.join(mounts)} "
            '--container-workdir="$PWD"'
        )
    elif arguments.mount:
        raise UserError("--mount goes with --container")
    return filled(
        "slurm.sbatch",
        name=arguments.name,
        nodes=arguments.nodes,
        tasks=arguments.gpus,
        gpus=arguments.gpus,
        cpus=arguments.cpus,
        time=arguments.time,
        directives=directives,
        container=container,
        command=shlex.join(command),
        restarts=arguments.restarts,
    )


def jobset(arguments: argparse.Namespace, command: Sequence[str]) -> str:
    """The JobSet: a replica for each slice of a TPU, or one of GPU nodes."""
    common = _pods(arguments) | {"restarts": arguments.restarts, "command": _yaml(list(command))}
    if arguments.tpu is None:
        _check_positive(arguments, "gpus")
        if arguments.slices != 1:
            raise UserError("--slices goes with --tpu")
        return filled("jobset_gpu.yaml", nodes=arguments.nodes, gpus=arguments.gpus, **common)
    _check_positive(arguments, "slices")
    accelerator, topology, hosts = tpu_slice(arguments.tpu)
    if arguments.nodes != hosts * arguments.slices:
        raise UserError(
            f"--nodes {arguments.nodes}: {arguments.slices} x {arguments.tpu} are {hosts * arguments.slices} "
            f"machines of {_CHIPS} chips"
        )
    return filled(
        "jobset_tpu.yaml",
        slices=arguments.slices,
        hosts=hosts,
        accelerator=accelerator,
        topology=topology,
        chips=_CHIPS,
        **common,
    )


def tpu_slice(text: str) -> tuple[str, str, int]:
    """`v5e:4x8` -> (GKE's name of the nodes, topology, machines of a slice).

    Raises:
      UserError: there is no such TPU.
    """
    kind, _, topology = text.partition(":")
    sizes = [int(size) for size in topology.split("x")] if re.fullmatch(r"\d+(x\d+){1,2}", topology) else []
    if kind not in TPUS or len(sizes) != (2 if kind in ("v5e", "v6e") else 3):
        raise UserError(f"--tpu {text!r}: write {', '.join(TPUS)}, and its topology: v5e:4x8, v5p:2x2x4")
    chips = 1
    for size in sizes:
        chips *= size
    if chips == 0 or chips % _CHIPS:
        raise UserError(f"--tpu {text}: {chips} chips are no whole machines of {_CHIPS}")
    return TPUS[kind], topology, chips // _CHIPS


def rayjob(arguments: argparse.Namespace, command: Sequence[str]) -> str:
    """The RayJob for KubeRay."""
    _check_positive(arguments, "gpus")
    return filled(
        "rayjob.yaml",
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        entrypoint=_yaml(shlex.join(ray_entrypoint(arguments, command))),
        **{key: value for key, value in _pods(arguments).items() if key != "annotations"},
    )


def ray_entrypoint(arguments: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """The driver's command, which starts one process a node."""
    options = [("nodes", arguments.nodes), ("gpus", arguments.gpus), ("restarts", arguments.restarts)]
    told = [word for name, value in options for word in (f"--{name}", str(value))]
    return ["python", "-m", _RAY_MODULE, *told, "--", *command]


def _submit_to_ray(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    check("--address", arguments.address, r"(https?://)?[\w.-]+(:\d+)?", "http://HOST:8265")
    _check_positive(arguments, "gpus")
    entrypoint = ray_entrypoint(arguments, command)
    submit = ["ray", "job", "submit", "--address", arguments.address, "--no-wait", "--", *entrypoint]
    if not arguments.submit:
        print(f"{shlex.join(submit)} submits it, as --submit does")
        return 0
    return _run_program(submit)


def _pods(arguments: argparse.Namespace) -> dict[str, str]:
    """What all kinds of pods have: name, image, and what is mounted, as YAML."""
    if arguments.image is None:
        raise UserError("--image is missing: one with keysync_jax, made from launch/cluster/Dockerfile")
    check("--image", arguments.image, r"[\w./:@-]+", "an image's name")
    volumes: list[object] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    annotations = {}
    if arguments.bucket is not None:
        check(
            "--bucket",
            arguments.bucket,
            r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]",
            "a bucket's name, without gs://",
        )
        driver = {
            "driver": "gcsfuse.csi.storage.gke.io",
            # Folders by their names; what others write is seen at once.
            "volumeAttributes": {"bucketName": arguments.bucket, "mountOptions": "implicit-dirs"},
        }
        volumes.append({"name": "bucket", "csi": driver})
        mounts.append({"name": "bucket", "mountPath": "/bucket"})
        annotations["gke-gcsfuse/volumes"] = "true"
    if arguments.claim is not None:
        check("--claim", arguments.claim, r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?", "a claim's name")
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": arguments.claim}})
        mounts.append({"name": "shared", "mountPath": "/shared"})
    return {
        "name": arguments.name,
        "image": arguments.image,
        "volumes": _yaml(volumes),
        "mounts": _yaml(mounts),
        "annotations": _yaml(annotations),
    }


def _yaml(value: object) -> str:
    """JSON, which is YAML, on one line."""
    return json.dumps(value)


def filled(template: str, **values: object) -> str:
    """A template of `launch/cluster`; each `@name@` in it has a value, and each value a place."""
    text = (files("keysync_jax.launch") / "cluster" / template).read_text()
    names = set(re.findall(r"@([a-z]+)@", text))
    assert names == values.keys(), names ^ values.keys()
    return re.sub(r"@([a-z]+)@", lambda found: str(values[found[1]]), text)


def check(option: str, value: str, pattern: str, what: str) -> None:
    """Refuses a value that is not of this form: it is put into a script.

    Raises:
      UserError: it is not.
    """
    if re.fullmatch(pattern, value) is None:
        raise UserError(f"{option} {value!r}: is not {what}")


def _check_positive(arguments: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} {getattr(arguments, option)}: must be 1 or more")


def _run_program(command: Sequence[str], left: str = "") -> int:
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not here, so nothing was submitted{left}")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"{shlex.join(command)} failed (exit code {code}){left}")
    return 0
