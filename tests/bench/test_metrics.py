"""What metrics cost: every measure alone, over clips that stand as dubs of themselves."""

from pathlib import Path

import numpy as np
import pytest

from keysync_jax.bench.metrics import NOTHING, foot_lines, measure_metrics, row_line, synthetic_clips
from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.evaluation.cliplist import ListedClip
from keysync_jax.pipeline.phases import peak_bytes
from keysync_jax.processes import Workers


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[ListedClip]:
    return synthetic_clips(2, 0.56, tmp_path_factory.mktemp("clips"))


def test_a_measure_is_timed_alone_and_an_absent_network_is_a_sentence(clips: list[ListedClip]) -> None:
    rows = list(measure_metrics(["vl", "mar_open", "mar_std", "lpips"], clips, None))
    vl, mar, lpips, nothing = rows
    assert [row.name for row in rows] == ["vl", "mar_std", "lpips", NOTHING]
    assert mar.metrics[:2] == ("mar_std", "mar_open")
    assert "lip_leak" in mar.metrics
    for row in (vl, mar, nothing):
        assert row.timing is not None
        assert row.timing.calls == 1  # The first clip opens and compiles.
        assert 0 < row.timing.median < 30
        assert row.cpu > 0
        assert len(row.host_bytes) == 2
        assert row.host_bytes[0] <= row.host_bytes[1]
        assert not row.random
    assert lpips.timing is None
    assert lpips.fault.startswith("not available: needs torchvision's AlexNet, alexnet-owt-7be5be79.pth in a")
    assert row_line(lpips) == f"lpips               {lpips.fault}"
    assert row_line(vl, {"vl": vl.timing.median / 2}).endswith("   2.00")  # type: ignore[union-attr]
    assert foot_lines(rows).startswith("2 clips, 256 x 256; ")
    assert "mar_std: also mar_open" in foot_lines(rows)
    assert "random" not in foot_lines(rows)


def test_random_weights_stand_for_a_network_of_ours_and_the_table_says_so(clips: list[ListedClip]) -> None:
    row, _ = measure_metrics(["active_speaker"], clips[:1], None)
    assert row.random
    assert row.timing is not None
    assert foot_lines([row]).endswith("random weights: active_speaker")


def test_the_peak_of_a_process_is_its_own() -> None:
    held = np.ones(2**26)  # 512 MiB, touched.
    with Workers(_peak, 1) as workers:
        assert workers.submit(0).result() < held.nbytes < peak_bytes()


def _peak(_: int) -> int:
    return peak_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["unet", "--clips", "2"], "--clips goes with bench metrics"),
        (["metrics", "--clips", "0"], "--clips takes 1 or more, not 0"),
        (["metrics", "--pairs", "x", "--seconds", "2"], "--seconds is of synthetic clips"),
        (["unet", "--seconds", "2"], "--seconds goes with bench dub and bench metrics"),
    ],
)
def test_bad_arguments_get_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["bench", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(clips: list[ListedClip], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no metric named fidd"):
        list(measure_metrics(["fidd"], clips, None))
    bare = ListedClip("bare", tmp_path / "bare.mp4", tmp_path / "bare.mp4", "bare")
    with pytest.raises(UserError, match="bare: has no landmarks"):
        list(measure_metrics(["vl"], [bare], None))
