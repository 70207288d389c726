"""The capture as a program: from a request to an answer, or to a sentence."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .clip import clip_entries
from .entries import stage_entries, vae_entries
from .environment import (
    check_packages,
    choose_device,
    import_release,
    machine,
    sentence_of,
    unusable_packages,
)
from .networks import Book, Inputs, build
from .precision import computing, make_exact
from .training import train_entries


def capture(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs every network of the request; returns what `answer.json` is to say."""
    check_packages()
    from safetensors.numpy import save_file

    began, checkout = time.time(), Path(request["checkout"])
    device = choose_device(request["device"])
    stand_ins = unusable_packages("torch" if device == "cpu" else request["attention"])
    if request["exact"]:
        make_exact()
    import_release(checkout, stand_ins)
    orders = {}
    for part in request["networks"]:
        name, precision = part["network"], part["precision"]
        x, book = Inputs(Path(request["inputs"]), name, device), Book()
        network = build(checkout, part, device)
        with computing(precision, device):
            if name == "vae":
                vae_entries(network, part, x, book)
            else:
                stage_entries(network, part, x, book)
                if part["gradients"]:
                    train_entries(network, part, x, book, checkout)
        del network
        save_file({k: tensor.numpy() for k, tensor in book.tensors.items()}, folder / f"{name}.safetensors")
        orders[name] = list(book.tensors)
    if request.get("clip"):
        parts = {part["network"]: part for part in request["networks"] if part["network"] != "vae"}
        engines = {name: build(checkout, part, device) for name, part in parts.items()}
        x, book = Inputs(Path(request["inputs"]), "clip", device), Book()
        clip_entries(request["clip"], engines, x, book, folder / "clip")
        save_file({k: tensor.numpy() for k, tensor in book.tensors.items()}, folder / "clip.safetensors")
        orders["clip"] = list(book.tensors)
    return {"orders": orders, "stand_ins": stand_ins, "seconds": round(time.time() - began, 1)} | machine(
        device
    )


def main(folder: Path) -> int:
    """Captures what the folder's request asks for; the exit code is 3 where a sentence says why not."""
    request = json.loads((folder / "request.json").read_text())
    write: Callable[[str, Any], Any] = lambda name, x: (folder / name).write_text(json.dumps(x))  # noqa: E731
    try:
        answer = capture(folder, request)
    except Exception as error:
        sentence = sentence_of(error)
        if not sentence:
            raise
        write("failure.json", {"sentence": sentence})
        return 3
    write("answer.json", answer)
    return 0
