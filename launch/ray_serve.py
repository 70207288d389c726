"""Dubbing as a service on Ray Serve: one replica a device, a queue before them, progress while they work.

    serve run keysync_jax.launch.ray_serve:app model=MODEL_DIR inputs=DIR folder=DIR

| request | answer |
|---|---|
| `POST /dubs`, JSON `{"video": "a.mp4", "voice": "b.wav"}`, as `dub --pairs` | 202, `{"id": ...}` |
| `GET /dubs/ID` | queued (how many before it), running (phase, done, total), done, failed (reason) |
| `GET /dubs/ID/video` | the dub |

Paths are below `inputs`, which all nodes see, as they do `model` and `folder`. The id follows from the bytes
of the inputs and the settings: who asks again gets the same dub, which is made once, and goes on after an
interruption. Nothing here knows who asks: put what does before it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from keysync_jax.errors import UserError, machine_fault
from keysync_jax.launch.ray_cluster import RETRIES, device_options
from keysync_jax.pipeline.pairs import COLUMNS, Outcome, Pair, dub_pair, loaded_for, pair_of, request_of

LARGEST_BODY = 10_000

State = dict[str, Any]


class Replica:
    """Dubs pairs, one at a time, with a model that stays loaded."""

    def __init__(self, model: str) -> None:
        from keysync_jax.backend import keep_compiled
        from keysync_jax.media.assets import cache_folder
        from keysync_jax.model import open_model
        from keysync_jax.pipeline.dub import DubSettings

        keep_compiled(cache_folder() / "compiled")
        self._model = loaded_for(open_model(model), DubSettings())

    def dub(self, pair: Pair) -> Iterator[State | Outcome]:
        """Dubs a pair; yields where it is, now and then, and at last what became of it."""
        said: SimpleQueue[State | Outcome | BaseException] = SimpleQueue()

        def told(phase: str, done: int, total: int) -> None:
            said.put({"state": "running", "phase": phase, "done": done, "total": total})

        def work() -> None:
            try:
                said.put(dub_pair(pair, self._model, told))
            except BaseException as error:
                said.put(error)

        Thread(target=work, name="dub", daemon=True).start()
        while True:
            found = said.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if isinstance(found, Outcome):
                return


class Front:
    """Takes requests, knows the state of each, and waits for the replicas."""

    def __init__(self, replicas: Any, model: str, inputs: str, folder: str) -> None:
        from keysync_jax.model import open_model

        self._replicas, self._model = replicas.options(stream=True), open_model(model)
        self._inputs, self._folder = Path(inputs).resolve(), Path(folder).resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._states, self._tasks = dict[str, State](), dict[str, asyncio.Task[None]]()

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import FileResponse, JSONResponse

        path = [part for part in request.url.path.split("/") if part]
        if request.method == "POST" and path == ["dubs"]:
            status, answer = await self._asked(await request.body())
            return JSONResponse(answer, status)
        if request.method == "GET" and len(path) in (2, 3) and path[0] == "dubs" and path[1] in self._states:
            if len(path) == 2:
                return JSONResponse(self._state(path[1]))
            if path[2] == "video" and self._states[path[1]]["state"] == "done":
                return FileResponse(self._folder / f"{path[1]}.mp4", media_type="video/mp4")
        return JSONResponse({"error": "there is no such thing"}, 404)

    async def _asked(self, body: bytes) -> tuple[int, State]:
        try:
            pair = await asyncio.to_thread(self._pair, body)
        except UserError as error:
            return 400, {"error": str(error)}
        name = pair.output.stem
        if name not in self._tasks or (self._tasks[name].done() and self._states[name]["state"] == "failed"):
            self._states[name] = {"state": "queued"}
            self._tasks[name] = asyncio.create_task(self._dub(name, pair))
        return 202, {"id": name, **self._state(name)}

    def _pair(self, body: bytes) -> Pair:
        """What a request asks for; its output's name is the request's id."""
        from keysync_jax.pipeline.dub import DubSettings

        try:
            row = json.loads(body) if len(body) <= LARGEST_BODY else None
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(row) <= set(COLUMNS) - {"out"}:
            known = ", ".join(name for name in COLUMNS if name != "out")
            raise UserError(f"a request is JSON of at most {LARGEST_BODY} bytes with {known}")
        texts = {name: str(value) for name, value in row.items()}
        pair = pair_of("request", texts, self._inputs, self._folder, DubSettings())
        for file in _files(pair):
            if not file.resolve().is_relative_to(self._inputs):
                raise UserError(f"{file.name}: is not below the folder of the inputs")
        name = request_of(pair, self._model)[:32]
        return replace(pair, output=self._folder / f"{name}.mp4")

    async def _dub(self, name: str, pair: Pair) -> None:
        """Follows a dub; one whose replica ends is begun again by another, where it was."""
        for attempt in range(1 + RETRIES):
            try:
                async for said in self._said(pair):
                    self._states[name] = said
                return
            except Exception as error:
                reason = machine_fault(error) or error
                self._states[name] = {"state": "failed", "reason": f"{reason} (attempt {attempt + 1})"}

    async def _said(self, pair: Pair) -> AsyncIterator[State]:
        async for found in self._replicas.dub.remote(pair):
            if isinstance(found, Outcome):
                failed = found.state == "failed"
                yield {"state": "failed", "reason": found.reason} if failed else {"state": "done"}
            else:
                yield found

    def _state(self, name: str) -> State:
        state = self._states[name]
        if state["state"] != "queued":
            return state
        waiting = [other for other, held in self._states.items() if held["state"] == "queued"]
        return {**state, "before": waiting.index(name)}


def _files(pair: Pair) -> list[Path]:
    """Every file that a pair names."""
    settings = pair.settings
    named = [pair.video, pair.voice, settings.occluder]
    named += [Path(text) for text in (settings.landmarks, settings.identity) if "/" in text]
    return [file for file in named if file is not None]


def app(given: Mapping[str, str]) -> Any:
    """The application that `serve run` and `serve deploy` take.

    Args:
      given: `model`, `inputs`, `folder`: paths that all nodes see; `replicas`, if wanted: how many, by
        default as many as the cluster has devices.

    Raises:
      UserError: one is missing.
    """
    import ray
    from ray import serve

    for name in ("model", "inputs", "folder"):
        if name not in given:
            raise UserError(f"the service needs {name}=PATH")
    ray.init(address="auto", ignore_reinit_error=True, logging_level="warning")
    devices = device_options(ray)
    model = str(Path(given["model"]).absolute())
    replicas = serve.deployment(
        Replica,
        num_replicas=int(given.get("replicas", len(devices))),
        max_ongoing_requests=1,
        ray_actor_options=devices[0],
        health_check_timeout_s=600,
    )
    front = serve.deployment(
        Front, num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    places = (str(Path(given[name]).absolute()) for name in ("inputs", "folder"))
    return front.bind(replicas.bind(model), model, *places)
