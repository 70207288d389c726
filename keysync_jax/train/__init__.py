"""Training: settings, step, sharding, the loop, checkpoints, and the way back to a model directory.

`keysync_jax.train(config, workdir)` is `keysync_jax.train.loop.train`.
"""

from keysync_jax.public import make_callable

make_callable(__name__)
