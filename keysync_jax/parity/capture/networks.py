"""The release's networks with given weights, their inputs, and a book of what they compute."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .environment import Refused


class Book:
    """What was captured of one network, in the order in which it was computed."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def put(self, name: str, x: Any) -> None:
        import torch

        self.tensors[name] = x.detach().to("cpu", torch.get_default_dtype(), copy=True).contiguous()

    @contextlib.contextmanager
    def hooked(self, root: Any, modules: dict[str, str]) -> Iterator[None]:
        """Notes the first output of modules (entry -> its name below `root`) while the block runs."""
        handles = []
        for entry, name in modules.items():

            def note(module: Any, inputs: Any, out: Any, entry: str = entry) -> None:
                if entry not in self.tensors:
                    self.put(entry, out[0] if isinstance(out, tuple) else out)

            handles.append(root.get_submodule(name).register_forward_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def build(checkout: Path, part: dict[str, Any], device: str) -> Any:
    """One network of the release with all its weights; nothing may be missing or of another shape."""
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    params = OmegaConf.load(checkout / part["config"]).model.params
    for path, value in part["settings"].items():
        OmegaConf.update(params, path, value, force_add=True)
    if part["network"] == "vae":
        import torch

        network = torch.nn.Module()
        network.first_stage_model = instantiate_from_config(params.first_stage_config)
    else:
        from sgm.models.diffusion import DiffusionEngine

        network = DiffusionEngine(**{k: v for k, v in params.items() if k != "ckpt_path"})
    load(network, [Path(name) for name in part["weights"]])
    return network.to(device)


def load(network: Any, files: list[Path]) -> None:
    """Strict loading, but for a VAE's encoder beside a stage, which uses none."""
    tensors = {name: x for file in files for name, x in load_tensors(file).items()}
    wanted = network.state_dict()
    for name, x in wanted.items():
        if name not in tensors:
            raise Refused(f"the release's network has a tensor {name!r} that the weights lack")
        if tensors[name].shape != x.shape:
            shapes = f"{list(x.shape)}, the weights have {list(tensors[name].shape)}"
            raise Refused(f"the release's tensor {name!r} has shape {shapes}")
    surplus = [n for n in tensors if n not in wanted and not n.startswith("first_stage_model.")]
    if surplus:
        raise Refused(f"the weights have a tensor {surplus[0]!r} that the release's network lacks")
    network.load_state_dict({name: tensors[name] for name in wanted})


def load_tensors(file: Path) -> dict[str, Any]:
    """A file's tensors. Through numpy: safetensors asks torch what fp32 is, which `make_exact` changes."""
    import torch
    from safetensors.numpy import load_file

    return {name: torch.from_numpy(x) for name, x in load_file(file).items()}


class Inputs:
    """The inputs of one network, by name, on its device."""

    def __init__(self, file: Path, network: str, device: str):
        prefix = f"{network}/in/"
        self.tensors = {k[len(prefix) :]: x for k, x in load_tensors(file).items() if k.startswith(prefix)}
        self.device = device

    def __getitem__(self, name: str) -> Any:
        import torch

        return self.tensors[name].to(self.device, torch.get_default_dtype(), copy=True)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors
