"""The plan and the merging of windows: the reference's exactly, and every frame covered."""

import json
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.pipeline.windows import FRAMES, HOP, make_plan, merge_windows, padded_length
from keysync_jax.tensorfile import TensorFile

LENGTHS = [14, 27, 40, 53, 100, 183, 196, 300, 365]


@pytest.mark.parametrize("frames", LENGTHS)
def test_plan_equals_the_reference(golden: Path, frames: int) -> None:
    wanted = json.loads((golden / "dev.plan.json").read_text())[str(frames)]
    plan = make_plan(frames)
    assert [s for call in plan.keyframe_calls for s in call.source] == wanted["keyframe_source_frame"]
    places = [k for call in plan.keyframe_calls for k in call.keyframe]
    assert [k is None for k in places] == wanted["drop"]
    kept = zip(wanted["keyframe_index"], wanted["drop"], strict=True)
    assert plan.keyframes == [k for k, drop in kept if not drop]
    assert [list(w) for w in plan.windows] == wanted["interpolation_window"]


@pytest.mark.parametrize("frames", range(1, 400, 7))
def test_padded_plan_covers_every_frame_once(frames: int) -> None:
    padded = padded_length(frames)
    plan = make_plan(padded)
    assert padded >= frames
    assert padded - frames < HOP + (frames == 1)
    assert plan.windows[0][0] == 0
    assert plan.windows[-1][1] == padded - 1
    assert all(a[1] == b[0] for a, b in zip(plan.windows, plan.windows[1:], strict=False))
    assert plan.keyframes == sorted({frame for window in plan.windows for frame in window})
    assert all(len(call.source) == len(call.keyframe) == FRAMES for call in plan.keyframe_calls)


def test_lengths_of_the_reference_are_not_padded() -> None:
    assert [padded_length(13 * k + 1) for k in (1, 2, 30)] == [14, 27, 391]


def test_short_clip_has_no_plan_of_its_own() -> None:
    with pytest.raises(ValueError, match="at least 14"):
        make_plan(13)


def test_merging_equals_the_reference(golden: Path) -> None:
    table = TensorFile(golden / "dev.pipeline.safetensors")
    merged = np.stack(list(merge_windows(table["segments"])))
    np.testing.assert_array_equal(merged, table["segments_merged"])


def test_merging_holds_one_window_at_a_time() -> None:
    taken = []

    def windows():
        for i in range(3):
            taken.append(i)
            yield np.full((FRAMES, 1), i, np.float32)

    frames = merge_windows(windows())
    next(frames)
    assert taken == [0]
    assert len(list(frames)) == 3 * HOP
