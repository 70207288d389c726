"""Comparison with the PyTorch reference's numbers.

`keysync_jax.parity(prefix, dtype)` is `keysync_jax.parity.compare.compare`.
"""

from keysync_jax.public import make_callable

make_callable(__name__)
