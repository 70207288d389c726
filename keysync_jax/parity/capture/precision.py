"""What the release computes in: fp64, fp32, TF32 as its scripts have it, autocast."""

import contextlib
from collections.abc import Iterator
from typing import Any


def make_exact() -> None:
    """Everything that the release computes from now on is fp64, also where it asks for fp32."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double


@contextlib.contextmanager
def computing(precision: str, device: str) -> Iterator[None]:
    """fp64, fp32, tf32 (PyTorch's default: convolutions), medium (matrices too), bf16 or fp16 (autocast)."""
    import torch

    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "medium")
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with contextlib.ExitStack() as stack:
        if half is not None:
            stack.enter_context(torch.amp.autocast(device, dtype=half))
        if precision == "tf32" and device == "cpu":
            stack.enter_context(_tf32_convolutions())
        yield


def _tf32_convolutions() -> Any:
    """What a GPU does to the operands of its convolutions in TF32: ten bits of mantissa stay."""
    import torch
    from torch.overrides import TorchFunctionMode

    def rounded(x: Any) -> Any:
        bits = x.detach().contiguous().view(torch.int32)
        near = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
        return x + (near - x).detach()  # exactly `near`, with the gradient of x

    class Rounding(TorchFunctionMode):
        def __torch_function__(self, f: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f in (torch.conv1d, torch.conv2d, torch.conv3d):
                args = (rounded(args[0]), rounded(args[1]), *args[2:])
            return f(*args, **(kwargs or {}))

    return Rounding()
