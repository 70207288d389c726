"""What of the PyTorch release is on the hub, pinned: the one table of `keysync convert --released`.

Commits and digests of `toninio19/keysync` were not known when this was written (whoever has them enters them
here), so its files are taken from `main`, and what was taken stands in the model's provenance.
"""

from keysync_jax.hub import Address, File

_KEYSYNC, _SVD, _HUBERT = (
    "toninio19/keysync",
    "stabilityai/stable-video-diffusion-img2vid",
    "facebook/hubert-base-ls960",
)
_REVISIONS = {
    _KEYSYNC: "main",
    _SVD: "9cf024d5bfa8f56622af86c884f26a52f6676f2e",
    _HUBERT: "dba3bb02fda4248b6e082697eee756de8fe8aa8a",
}


def _file(
    repo: str, file: str, what: str, size: int | None, sha256: str | None = None, licence: str = ""
) -> File:
    return File(Address(repo, _REVISIONS[repo], file), what, size, sha256, licence)


# Sizes of the stages: 1,525,738,218 numbers and a decoder of 63,579,183, in fp32; the files were not seen.
_OF_STAGES = "none stated; fine-tuned from SVD"
KEYFRAME = _file(
    _KEYSYNC,
    "checkpoints/keyframe_dub.pt",
    "keyframe stage, trained on HuBERT",
    6_357_269_604,
    licence=_OF_STAGES,
)
INTERPOLATION = _file(
    _KEYSYNC,
    "checkpoints/interpolation_dub.pt",
    "interpolation stage, trained on WavLM",
    6_357_269_604,
    licence=_OF_STAGES,
)
WAVLM = _file(
    _KEYSYNC,
    "checkpoints/WavLM-Base+.pt",
    "audio encoder WavLM-Base+, Microsoft's",
    377_604_817,
    "fcbcf2a94def92e90e086bb0727275d53b75a9c0e483e2abfa560ac951986b6d",
    licence="mit",
)
HUBERT_SIZES = _file(_HUBERT, "config.json", "sizes of HuBERT", None, licence="apache-2.0")
HUBERT = _file(
    _HUBERT,
    "pytorch_model.bin",
    "audio encoder HuBERT base",
    378_000_000,
    "062249fffb353eab67547a2fbc129f7c31a2f459faf641b19e8fb007cc5c48ad",
    licence="apache-2.0",
)
# Of the two variants the one that the release encodes video with; rounding the other need not give this one.
VAE = _file(
    _SVD,
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "SVD's VAE",
    196_000_000,
    "af602cd0eb4ad6086ec94fbf1438dfb1be5ec9ac03fd0215640854e90d6463a3",
    licence="stable-video-diffusion-community",
)

FILES = (KEYFRAME, INTERPOLATION, WAVLM, HUBERT_SIZES, HUBERT, VAE)
"""All that dubbing needs. Landmark detectors have their own table, `media.assets`."""


def listed(address: Address) -> File:
    """The row of an address; for any other, a file of which nothing is known."""
    return next((file for file in FILES if file.address == address), File(address))
