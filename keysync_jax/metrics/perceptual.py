"""LPIPS of a clip against the truth, by the network of `nn.lpips` with AlexNet, as everybody scores it."""

from pathlib import Path

import jax
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.convert.lpips import load_lpips
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.metrics.pictures import Square
from keysync_jax.model import Network
from keysync_jax.nn import functional as F


class LPIPSNetwork:
    """The distance, compiled for pictures of one size."""

    def __init__(self, network: Network) -> None:
        graphdef, self._params = network
        self._distance = jax.jit(lambda params, a, b: F.bind(graphdef, params)(a, b))

    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        """Of two pictures, uint8 RGB `[H, W, 3]`."""
        x, y = (picture[None].astype(np.float32) / 127.5 - 1 for picture in (a, b))
        with computing("fp32"):
            return float(self._distance(self._params, x, y)[0])


class _Meter:
    def __init__(self, network: LPIPSNetwork, subject: Subject) -> None:
        self._network, self._square = network, Square(subject.boxes)
        self._found: list[float] = []

    def update(self, moment: Moment) -> None:
        assert moment.truth is not None  # `Metric.needs` says so.
        self._square.next()
        pictures = (self._square.shown(picture) for picture in (moment.frame, moment.truth))
        self._found.append(self._network.distance(*pictures))

    def result(self) -> Found:
        return {"lpips": float(np.mean(self._found)) if self._found else Unavailable("there is no frame")}


def open_lpips(weights: Path) -> Start:
    """LPIPS with AlexNet, v0.1."""
    network = LPIPSNetwork(load_lpips(weights / "alexnet-owt-7be5be79.pth", weights / "alex.pth"))
    return lambda subject: _Meter(network, subject)
