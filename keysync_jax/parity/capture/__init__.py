"""What the release computes, written down in its own environment: `PYTHON -s capture FOLDER`.

It imports torch, safetensors and the release, and nothing of keysync_jax, which that environment lacks: its
files import each other by relative names. `request.json` in FOLDER, which `live.py` writes, names the files
of inputs and weights. The answer is `NETWORK.safetensors` for each network, and at last `answer.json`; where
it cannot go on, `failure.json` has one sentence. Arrays are in torch's layout; names are those of golden
files (`golden.py`).
"""
