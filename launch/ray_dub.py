"""`keysync dub --pairs --ray`: many dubs on however many nodes, an actor on every device.

A pair is dubbed by the function that dubs it on one machine (`pairs.dub_pair`). An actor that ends is started
again and the pair goes on where its workspace, beside the dub, had got to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keysync_jax.launch.ray_cluster import actors, connected, outcome_of, shared_out
from keysync_jax.pipeline.pairs import Outcome, Pair


def on_ray(model: Path, address: str = "") -> Callable[[Sequence[Pair]], Iterable[Outcome]]:
    """What `pairs.dub_pairs` takes as `made`, to dub on a Ray cluster.

    Args:
      model: a model directory, which every node sees.
      address: as `ray_cluster.connected` takes it.
    """

    def made(pairs: Sequence[Pair]) -> Iterator[Outcome]:
        with connected(address) as ray:
            dubbers = actors(ray, Dubber, model.absolute())
            started = shared_out(ray, dubbers, pairs, lambda dubber, pair: dubber.dub.remote(_absolute(pair)))
            for pair, outcome in started:
                yield replace(outcome_of(ray, outcome), pair=pair)

    return made


class Dubber:
    """An actor: dubs pairs with a model that stays loaded."""

    def __init__(self, folder: Path) -> None:
        from keysync_jax.backend import keep_compiled
        from keysync_jax.media.assets import cache_folder
        from keysync_jax.model import Model, open_model

        keep_compiled(cache_folder() / "compiled")
        self._opened, self._loaded = open_model(folder), dict[str, Model]()

    def dub(self, pair: Pair) -> Outcome:
        from keysync_jax.pipeline.pairs import dub_pair, loaded_for

        memory = pair.settings.memory
        if memory not in self._loaded:
            self._loaded[memory] = loaded_for(self._opened, pair.settings)
        return dub_pair(pair, self._loaded[memory])


def _absolute(pair: Pair) -> Pair:
    """The pair as a process finds it that was started in another folder."""
    from keysync_jax.media.detectors import DETECTORS

    settings, changes = pair.settings, dict[str, Any]()
    if settings.landmarks not in DETECTORS:
        changes["landmarks"] = str(Path(settings.landmarks).absolute())
    for name in ("landmark_model", "occluder"):
        if getattr(settings, name) is not None:
            changes[name] = getattr(settings, name).absolute()
    if Path(settings.identity).is_file():
        changes["identity"] = str(Path(settings.identity).absolute())
    return replace(
        pair,
        video=pair.video.absolute(),
        voice=pair.voice.absolute(),
        output=pair.output.absolute(),
        settings=replace(settings, **changes),
    )
