"""Training on a Ray cluster: one process of `keysync train` on each node, in a place of its own.

`python -m keysync_jax.launch.train_on_ray --nodes N --gpus G [--restarts R] -- COMMAND`, as `keysync launch
ray` submits it. The processes are children of Ray's workers, not the workers: they end with their exit code,
hold no chips afterwards, and get signals in their main thread.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for

GRACE_SECONDS = 120
"""Time that the processes have to save when the job is stopped or one of them has ended."""


class Member:
    """One process of the run, on the node where this actor is."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def place(self) -> tuple[str, int]:
        """This node's address, and a port that is free on it."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: Sequence[str], variables: dict[str, str]) -> int:
        """Runs the command to its end; returns its exit code, 128 + n where signal n ended it."""
        if self._stopped:
            return 128 + signal.SIGTERM
        self._process = subprocess.Popen(command, env=os.environ | variables)
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def stop(self, seconds: float) -> None:
        """Sends the process SIGTERM, and SIGKILL where it has not ended after these seconds."""
        self._stopped = True
        if (process := self._process) is None or process.poll() is not None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()


def train_on_ray(
    nodes: int, gpus: int, restarts: int, command: Sequence[str], grace: float = GRACE_SECONDS
) -> int:
    """Runs the command on `nodes` nodes of the Ray cluster; returns its exit code.

    A run that ends with a code that asks for another start (42, or a signal's) is started again.

    Args:
      gpus: of each node; 0: none.
      restarts: at most so many starts after the first.
    """
    with needed_for("training on Ray"):
        import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    ray.init(ignore_reinit_error=True, logging_level="warning")
    bundle = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
    try:
        ray.get(group.ready())
        for start in range(restarts + 1):
            code = _once(ray, group, nodes, gpus, command, grace)
            if code in (0, 1, 2) or start == restarts:
                break
            print(f"keysync: exit code {code}; start {start + 2} of at most {restarts + 1}", flush=True)
        return code
    finally:
        remove_placement_group(group)


def _once(ray: Any, group: Any, nodes: int, gpus: int, command: Sequence[str], grace: float) -> int:
    """One start of all processes: 0 where all end with it, else the code of the first that says why."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # A second thread of an actor stops what the first one runs.
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(Member)
    members = [
        actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote()
        for i in range(nodes)
    ]
    address, port = ray.get(members[0].place.remote())
    told = {"JAX_COORDINATOR_ADDRESS": f"{address}:{port}", "JAX_NUM_PROCESSES": str(nodes)}
    running = {
        member.run.remote(list(command), told | {"JAX_PROCESS_ID": str(i)}): member
        for i, member in enumerate(members)
    }
    codes: list[int] = []
    try:
        while running:
            # Once one has ended wrongly, the others cannot go on.
            done, _ = ray.wait(list(running), timeout=grace if any(codes) else None)
            if not done:
                break
            running.pop(done[0])
            codes.append(_code(ray, done[0]))
    finally:
        stops = [member.stop.remote(grace if not any(codes) else 0) for member in running.values()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=grace + 10)
        for member in members:
            ray.kill(member)
    ends = [code for code in codes if code in (1, 2)]
    return next(iter(ends), max(codes, default=1))


def _code(ray: Any, run: Any) -> int:
    try:
        return int(ray.get(run))
    except ray.exceptions.RayActorError:  # Its node is gone.
        return 128 + signal.SIGKILL


def main(argv: Sequence[str] | None = None) -> int:
    """The driver of a Ray job; returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="train_on_ray", description="Starts a command on nodes of Ray.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of a node")
    parser.add_argument("--restarts", type=int, default=50)
    arguments = parser.parse_args(given[:cut])
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return train_on_ray(arguments.nodes, arguments.gpus, arguments.restarts, given[cut + 1 :])
    except UserError as error:
        print(f"keysync: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
