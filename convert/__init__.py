"""PyTorch's checkpoints to a model directory, and back.

`keysync_jax.convert(checkpoints, output, ...)` is `keysync_jax.convert.checkpoint.convert`.
"""

from keysync_jax.public import make_callable

make_callable(__name__)
