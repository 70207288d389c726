"""The metrics in tables: what each is, what computes it, and which files the user brings for it.

docs/metrics.md has the definitions, and the choices that are ours; a test holds the two together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keysync_jax.metrics.meter import Need, Record

Better = Literal["higher", "lower", "zero", "reference"]
"""Which numbers are good: "zero" is best at 0, worse to both sides; "reference" at the real video's own."""

Runs = Mapping[str, Sequence[Record]]
"""Run -> the records of its clips, in one order for all runs."""


@dataclass(frozen=True)
class Weights:
    """A file that the user brings, in the folder of the weights.

    Attributes:
      file: its name there.
      what: it is.
      get: how to get it, the end of a sentence.
      terms: its licence, or what is known of it.
    """

    file: str
    what: str
    get: str
    terms: str


@dataclass(frozen=True)
class Measure:
    """Computes metrics of one clip, all of them together.

    Attributes:
      opens: "module:function" below `keysync_jax.metrics`, a `meter.Open`; imported when it is first used.
      computed_by: network or formula, with its version.
      weights: names of `WEIGHTS`.
      packages: modules that it imports beside the project's own.
      extra: of the package, that brings them.
      noncommercial: whether a licence of these forbids commercial use; reports say so.
    """

    opens: str
    computed_by: str
    weights: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""
    noncommercial: bool = False


@dataclass(frozen=True)
class Metric:
    """A number of a clip or, where `runs` are named, of sets of clips.

    Attributes:
      name: key of the results.
      title: as tables head it.
      unit: "dB", "px", ...; empty for a number without one.
      better: which numbers are good.
      what: its definition in a line.
      measure: what computes it, of `MEASURES`.
      needs: what a clip must bring beside the output's frames.
      runs: names of the runs that a metric of sets is made of; empty for one of a clip.
      combine: the number of those runs; None for a metric of a clip. It takes the records of any choice of
        clips, so it can be bootstrapped, and raises ValueError where one lacks what it needs.
      resampling: how a metric of sets may be resampled: "bootstrap", or "halves" where drawing clips more
        than once would bias it (distances of distributions).
    """

    name: str
    title: str
    unit: str
    better: Better
    what: str
    measure: str
    needs: tuple[Need, ...] = ()
    runs: tuple[str, ...] = ()
    combine: Callable[[Runs], float] | None = None
    resampling: Literal["bootstrap", "halves"] = "bootstrap"


def _mean(run: str, name: str) -> Callable[[Runs], float]:
    """The mean over a run's clips of a metric of clips."""
    return lambda runs: float(np.mean(_column(runs[run], name)))


def _column(records: Sequence[Record], name: str) -> np.ndarray:
    """A metric of clips, float64 `[clips]`."""
    if not records or not all(name in record.values for record in records):
        raise ValueError(f"every clip needs its {name}")
    return np.array([record.values[name] for record in records])


def _lip_leak(runs: Runs) -> float:
    from keysync_jax.metrics.leakage import lip_leak_of_stds

    return lip_leak_of_stds(_column(runs["silent"], "mar_std"), _column(runs["dub"], "mar_std"))


def _features(run: str, name: str, runs: Runs) -> np.ndarray:
    """A series of all clips of a run, one after the other, `[N, D]`."""
    found = [record.series[name] for record in runs[run] if name in record.series]
    if len(found) < len(runs[run]):
        raise ValueError(f"every clip needs its features of {name}")
    return np.concatenate(found)


def _frechet(name: str) -> Callable[[Runs], float]:
    """The Fréchet distance of a series of the dubs and of the real videos."""

    def of(runs: Runs) -> float:
        from keysync_jax.metrics.distributions import frechet_distance

        return frechet_distance(_features("dub", name, runs), _features("real", name, runs))

    return of


def _cmmd(runs: Runs) -> float:
    from keysync_jax.metrics.distributions import cmmd

    return cmmd(_features("dub", "clip", runs), _features("real", "clip", runs))


def _lsd(reference: str) -> Callable[[Runs], float]:
    """LSD of a reference picture's two runs."""

    def of(runs: Runs) -> float:
        from keysync_jax.metrics.leakage import lip_sync_difference

        matched, mismatched = (
            [float(_column(runs[f"{reference}/{setup}"], name).mean()) for name in ("lse_c", "lse_d")]
            for setup in ("matched", "mismatched")
        )
        return lip_sync_difference(matched, mismatched)

    return of


WEIGHTS: dict[str, Weights] = {
    "syncnet": Weights(
        "syncnet.safetensors",
        "SyncNet's weights",
        "get syncnet_v2.model at https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/ and "
        "keysync convert --syncnet syncnet_v2.model -o WEIGHTS/syncnet.safetensors",
        "none stated with the file; the code beside it is MIT-style",
    ),
    "light_asd": Weights(
        "light_asd.safetensors",
        "Light-ASD's weights",
        "get weight/finetuning_TalkSet.model of https://github.com/Junhua-Liao/Light-ASD and "
        "keysync convert --light-asd finetuning_TalkSet.model -o WEIGHTS/light_asd.safetensors",
        "MIT",
    ),
    "lip_reader": Weights(
        "lip_reader.safetensors",
        "LipScore's encoder",
        "get vsr_trlrs2lrs3vox2avsp_base.pth of the model zoo of https://github.com/mpc001/auto_avsr and "
        "keysync convert --lip-reader vsr_trlrs2lrs3vox2avsp_base.pth -o WEIGHTS/lip_reader.safetensors",
        "those of its training data, LRS2 and LRS3: research",
    ),
    "alexnet": Weights(
        "alexnet-owt-7be5be79.pth",
        "torchvision's AlexNet",
        "get https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
    ),
    "lpips_heads": Weights(
        "alex.pth",
        "the heads of LPIPS",
        "get lpips/weights/v0.1/alex.pth of https://github.com/richzhang/PerceptualSimilarity",
        "BSD-2-Clause",
    ),
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "FID's Inception",
        "get it from the release v0.2.0 of https://github.com/toshas/torch-fidelity",
        "Apache-2.0",
    ),
    "clip": Weights(
        "clip-vit-large-patch14-336",
        "CLIP ViT-L/14 at 336 pixels, a folder in transformers' layout",
        "hf download openai/clip-vit-large-patch14-336 config.json model.safetensors --local-dir "
        "WEIGHTS/clip-vit-large-patch14-336",
        "MIT by its code; none stated with the files",
    ),
    "i3d": Weights(
        "i3d_torchscript.pt",
        "StyleGAN-V's I3D (a program: it runs when it is loaded)",
        "get it by the link of https://github.com/universome/stylegan-v, or auxiliary/i3d_torchscript.pt of "
        "ByteDance/LatentSync-1.5 on the hub",
        "not stated",
    ),
    "arcface": Weights(
        "w600k_r50.onnx",
        "an ArcFace network in ONNX",
        "get it from the pack buffalo_l of https://github.com/deepinsight/insightface, or put another one in "
        "its place",
        "buffalo_l: non-commercial research",
    ),
}
"""Files that metrics need, by name."""


MEASURES: dict[str, Measure] = {
    "pictures": Measure("pictures:open_pictures", "PSNR and SSIM of keysync_jax, 1"),
    "sharpness": Measure("pictures:open_sharpness", "cv2.Laplacian, kernel of size 1"),
    "mouth": Measure("landmarks:open_mouth", "MAR of 68 landmarks, keysync_jax, 1"),
    "lmd": Measure("landmarks:open_lmd", "LMD of 68 landmarks, keysync_jax, 1"),
    "lip_sync": Measure(
        "lip_sync:open_lip_sync", "SyncNet, face track of 68 landmarks, keysync_jax, 1", ("syncnet",)
    ),
    "perceptual": Measure(
        "perceptual:open_lpips",
        "LPIPS v0.1, AlexNet, keysync_jax, 1",
        ("alexnet", "lpips_heads"),
        ("torch",),
        "convert",
    ),
    "likeness": Measure(
        "libraries:open_arcface",
        "ArcFace (see the file), five points of 68 landmarks",
        ("arcface",),
        ("onnxruntime",),
        "metrics",
        noncommercial=True,
    ),
    "topiq": Measure(
        "libraries:open_topiq",
        "pyiqa's topiq_nr-face-v1, one frame a second",
        (),
        ("pyiqa", "torch"),
        "metrics-noncommercial",
        noncommercial=True,
    ),
    "hyperiqa": Measure(
        "libraries:open_hyperiqa",
        "pyiqa's hyperiqa, nine crops of 224 pixels",
        (),
        ("pyiqa", "torch"),
        "metrics-noncommercial",
        noncommercial=True,
    ),
    "inception": Measure(
        "libraries:open_inception",
        "torch-fidelity's Inception 2015-12-05, all frames, squares at 299 pixels",
        ("inception",),
        ("torch_fidelity", "torch"),
        "metrics",
    ),
    "clip": Measure(
        "libraries:open_clip",
        "CLIP ViT-L/14 at 336 pixels, all frames, middle squares",
        ("clip",),
        ("transformers", "torch", "PIL"),
        "metrics",
    ),
    "i3d": Measure(
        "libraries:open_i3d",
        "StyleGAN-V's I3D, all clips of 16 frames that do not overlap, squares at 224 pixels",
        ("i3d",),
        ("torch",),
        "metrics",
    ),
    "speaking": Measure(
        "speaking:open_speaking", "Light-ASD, face track of 68 landmarks, keysync_jax, 1", ("light_asd",)
    ),
    "lip_score": Measure(
        "lip_score:open_lip_score",
        "Auto-AVSR's encoder, crop of 68 landmarks, keysync_jax, 1",
        ("lip_reader",),
    ),
}
"""Name -> what computes metrics of a clip."""


_METRICS = (
    Metric("psnr", "PSNR", "dB", "higher", "10 log10(255² / mean squared error), pooled over the clip's "
           "frames and pixels; infinite for equal pictures", "pictures", ("truth",)),
    Metric("psnr_inside", "PSNR inside", "dB", "higher", "PSNR of the repainted pixels",
           "pictures", ("truth", "mask")),
    Metric("psnr_outside", "PSNR outside", "dB", "higher", "PSNR of the other pixels against the source",
           "pictures", ("source", "mask")),
    Metric("ssim", "SSIM", "", "higher", "structural similarity, RGB, range 255, Gaussian window of 11 with "
           "sigma 1.5, mean of frames", "pictures", ("truth",)),
    Metric("ssim_inside", "SSIM inside", "", "higher", "mean of SSIM's map over the repainted pixels",
           "pictures", ("truth", "mask")),
    Metric("ssim_outside", "SSIM outside", "", "higher", "mean of SSIM's map over the other pixels, against "
           "the source", "pictures", ("source", "mask")),
    Metric("lpips", "LPIPS", "", "lower", "learned perceptual distance v0.1 with AlexNet, crop at 512 px, "
           "mean of frames", "perceptual", ("truth",)),
    Metric("vl", "VL", "grey²", "reference", "variance of the Laplacian of grey frames, mean of frames",
           "sharpness"),
    Metric("mar_std", "MAR std", "", "reference", "standard deviation over time of the mouth aspect ratio of "
           "the inner lips", "mouth", ("landmarks",)),
    Metric("mar_open", "open mouth", "", "reference", "share of frames with a MAR above 0.25",
           "mouth", ("landmarks",)),
    Metric("lmd", "LMD", "px", "lower", "mean distance of the 20 mouth landmarks from the truth's, both "
           "about their own mean", "lmd", ("landmarks", "truth_landmarks")),
    Metric("lmd_sum", "LMD (ATVGnet)", "px", "lower", "LMD with the 20 distances summed, as the first code "
           "of it does: 20 times LMD", "lmd", ("landmarks", "truth_landmarks")),
    Metric("lmd_eyes", "LMD / eyes", "", "lower", "LMD over the mean distance of the truth's eye centres",
           "lmd", ("landmarks", "truth_landmarks")),
    Metric("csim", "CSIM", "", "higher", "cosine of ArcFace features of output and source at the same time, "
           "mean of frames", "likeness", ("source", "landmarks", "source_landmarks")),
    Metric("topiq", "TOPIQ face", "", "higher", "quality of the face by TOPIQ, mean of one frame a second",
           "topiq"),
    Metric("hyperiqa", "HyperIQA", "", "higher", "quality by HyperIQA, three crops of the first, middle and "
           "last frame", "hyperiqa"),
    Metric("lse_c", "LSE-C", "", "higher", "SyncNet's confidence: median over 31 offsets of the mean "
           "distance, less the smallest", "lip_sync", ("voice", "landmarks")),
    Metric("lse_d", "LSE-D", "", "lower", "SyncNet's distance of lips and voice at the best offset",
           "lip_sync", ("voice", "landmarks")),
    Metric("av_offset", "AV offset", "frames", "zero", "frames of 40 ms by which the picture is late; none "
           "below an LSE-C of 1.5", "lip_sync", ("voice", "landmarks")),
    Metric("lip_score", "LipScore", "", "higher", "cosine of a lip reader's features of the output and of "
           "the video whose voice drives, mean of frames", "lip_score", ("landmarks", "speaker")),
    Metric("active_speaker", "active speaker", "", "higher", "Light-ASD's probability of speaking, mean of "
           "frames and of pieces of 1 to 6 s", "speaking", ("voice", "landmarks")),
    Metric("speaking_share", "speaking", "", "higher", "share of frames whose logit, averaged over 5, is not "
           "negative", "speaking", ("voice", "landmarks")),
    Metric("lip_leak", "LipLeak", "", "lower", "mean std of MAR with silence / mean std of MAR with "
           "speech", "mouth", ("landmarks",), ("silent", "dub"), _lip_leak),
    Metric("lip_leak_lite", "LipLeak_lite", "", "lower", "share of frames with a MAR above 0.25 with "
           "silence, mean of clips", "mouth", ("landmarks",), ("silent",), _mean("silent", "mar_open")),
    Metric("lse_c_s", "LSE-C_S", "", "lower", "LSE-C of dubs with silence against the source's own voice",
           "lip_sync", ("voice", "landmarks"), ("current/silent",), _mean("current/silent", "lse_c")),
    Metric("lse_d_s", "LSE-D_S", "", "higher", "LSE-D of dubs with silence against the source's own voice",
           "lip_sync", ("voice", "landmarks"), ("current/silent",), _mean("current/silent", "lse_d")),
    Metric("lsd_cr", "LSD-CR", "", "lower", "0.5 (|ΔLSE-C| + |ΔLSE-D|) of the means with the own and with "
           "foreign voices, current frame as reference", "lip_sync", ("voice", "landmarks"),
           ("current/matched", "current/mismatched"), _lsd("current")),
    Metric("lsd_ar", "LSD-AR", "", "lower", "the same with another frame as reference", "lip_sync",
           ("voice", "landmarks"), ("alternative/matched", "alternative/mismatched"), _lsd("alternative")),
    Metric("fid", "FID", "", "lower", "Fréchet distance of Inception's features of all frames from real ones",
           "inception", (), ("dub", "real"), _frechet("inception"), "halves"),
    Metric("cmmd", "CMMD", "", "lower", "1000 x squared discrepancy of CLIP's embeddings from real frames",
           "clip", (), ("dub", "real"), _cmmd, "halves"),
    Metric("fvd", "FVD", "", "lower", "Fréchet distance of I3D's logits of 16 frames from real clips",
           "i3d", (), ("dub", "real"), _frechet("i3d"), "halves"),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
"""Name -> metric, in the order of reports."""
