"""`python -m keysync_jax.cli`: the command without its script."""

import sys

from keysync_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
