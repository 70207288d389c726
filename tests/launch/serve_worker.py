"""By hand: the Ray Serve deployment of dub on this machine, through HTTP.

    python -m tests.launch.serve_worker FOLDER

Two requests for one replica: the second waits, both are dubbed, their states are printed as they change.
"""

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve

from keysync_jax.launch.ray_serve import app
from keysync_jax.model import DEFAULT
from tests.clips import face_landmarks, write_video, write_voice

ADDRESS = "http://127.0.0.1:8000/dubs"


def ask(path: str = "", body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(ADDRESS + path, data)) as answer:
        return json.load(answer)


def main(folder: Path) -> None:
    inputs = folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    write_voice(inputs / "v.wav", 0.6)
    write_video(inputs / "a.mp4", 20)
    np.save(inputs / "a.npy", face_landmarks(20))
    ray.init(address="local", include_dashboard=False, logging_level="warning")
    try:
        serve.run(app({"model": str(DEFAULT), "inputs": str(inputs), "folder": str(folder / "dubs")}))
        row = {"video": "a.mp4", "voice": "v.wav", "landmarks": "a.npy"}
        names = [ask(body={**row, "seed": seed})["id"] for seed in (0, 1)]
        last: list[Any] = []
        while not all(state["state"] in ("done", "failed") for state in last) or not last:
            found = [ask(f"/{name}") for name in names]
            if found != last:
                print(json.dumps(found), flush=True)
            last = found
            time.sleep(0.2)
        for name in names:
            with urllib.request.urlopen(f"{ADDRESS}/{name}/video") as answer:
                same = answer.read() == (folder / "dubs" / f"{name}.mp4").read_bytes()
            print(name, "video is the file:", same)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
