"""Collectives in a schedule, against counts and times by hand."""

from dataclasses import dataclass

import numpy as np
import pytest

from keysync_jax.ahead.chips import Chip
from keysync_jax.ahead.hlo import Cost, Program
from keysync_jax.ahead.links import Traffic, groups_of, played

CHIP = Chip(peak=1e9, bandwidth=1e6, hbm=2**30, link=1e3)
"""A chip that computes and moves in no time beside what its links take."""


@dataclass(frozen=True)
class Device:
    coords: tuple[int, int, int]
    slice_index: int | None = None


LINE = [Device((x, 0, 0)) for x in range(4)]
SQUARE = [Device((x, y, 0)) for y in range(2) for x in range(2)]

FUSIONS = """\
%begin (s: bf16[25]) -> (bf16[25], bf16[100], u32[]) {
  %s = bf16[25]{0} parameter(0)
  %g = bf16[100]{0} all-gather(%s), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (bf16[25]{0}, bf16[100]{0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (s.1: bf16[25], b.1: bf16[100], x.1: bf16[50,10], w.1: bf16[10,50]) -> (bf16[50,50], bf16[25], bf16[100]) {
  %s.1 = bf16[25]{0} parameter(0)
  %b.1 = bf16[100]{0} parameter(1)
  %x.1 = bf16[50,10]{1,0:S(1)} parameter(2)
  %w.1 = bf16[10,50]{1,0:S(1)} parameter(3)
  %g.1 = bf16[100]{0} all-gather(%s.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %y = bf16[50,50]{1,0:S(1)} dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[50,50]{1,0:S(1)}, bf16[25]{0}, bf16[100]{0}) tuple(%y, %s.1, %g.1)
}

%end (s.2: bf16[25], b.2: bf16[100]) -> bf16[100] {
  %s.2 = bf16[25]{0} parameter(0)
  %b.2 = bf16[100]{0} parameter(1)
  %g.2 = bf16[100]{0} all-gather(%s.2), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = bf16[100]{0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[25], x: bf16[50,10], w: bf16[10,50]) -> bf16[100] {
  %p = bf16[25]{0} parameter(0)
  %x = bf16[50,10]{1,0:S(1)} parameter(1)
  %w = bf16[10,50]{1,0:S(1)} parameter(2)
  %start = (bf16[25]{0}, bf16[100]{0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %e0 = bf16[25]{0} get-tuple-element(%start), index=0
  %e1 = bf16[100]{0} get-tuple-element(%start), index=1
  %run = (bf16[50,50]{1,0:S(1)}, bf16[25]{0}, bf16[100]{0}) fusion(%e0, %e1, %x, %w), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%beside
  %f0 = bf16[25]{0} get-tuple-element(%run), index=1
  %f1 = bf16[100]{0} get-tuple-element(%run), index=2
  ROOT %done = bf16[100]{0} fusion(%f0, %f1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""  # noqa: E501

LOOP = """\
%body (c: (s32[], f32[50])) -> (s32[], f32[50]) {
  %c = (s32[], f32[50]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[50]{0} get-tuple-element(%c), index=1
  %ps = (f32[50]{0}, f32[50]{0}, u32[], u32[]) collective-permute-start(%v), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %pd = f32[50]{0} collective-permute-done(%ps)
  ROOT %n = (s32[], f32[50]{0}) tuple(%i, %pd)
}

%until (c.1: (s32[], f32[50])) -> pred[] {
  %c.1 = (s32[], f32[50]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (start: (s32[], f32[50]), q: f32[100], r: f32[8]) -> f32[100] {
  %start = (s32[], f32[50]{0}) parameter(0)
  %q = f32[100]{0} parameter(1)
  %r = f32[8]{0} parameter(2)
  %sum = f32[100]{0} all-reduce(%q), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %loop = (s32[], f32[50]{0}) while(%start), condition=%until, body=%body
  %as = f32[100]{0} all-reduce-start(%sum), channel_id=3, replica_groups={}, to_apply=%add
  %swap = f32[8]{0} all-to-all(%r), channel_id=4, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  ROOT %ad = f32[100]{0} all-reduce-done(%as)
}
"""  # noqa: E501


def test_what_a_fusion_runs_beside_an_all_gather_hides_it() -> None:
    """Each of four chips in a line sends 3 shards of 50 bytes, those at the ends over one link of 1 kB/s."""
    idle = played(Program(FUSIONS), Chip(1e12, 1e12, 2**30, 1e3), LINE).traffic["all-gather"]
    assert (idle.count, idle.bytes, idle.seconds) == (1, 150, pytest.approx(0.15))
    assert idle.waited == pytest.approx(0.15, rel=1e-3)
    # The product takes 50 kFLOP: 0.1 s at this peak.
    half = played(Program(FUSIONS), Chip(5e5, 1e12, 2**30, 1e3), LINE)
    assert half.traffic["all-gather"].waited == pytest.approx(0.05, rel=1e-3)
    assert half.traffic["all-gather"].hidden == pytest.approx(2 / 3, rel=1e-3)
    assert half.seconds == pytest.approx(0.15, rel=1e-3)
    assert played(Program(FUSIONS), Chip(5e4, 1e12, 2**30, 1e3), LINE).total.waited == 0
    # In a square each chip has two neighbours.
    assert played(Program(FUSIONS), CHIP, SQUARE).total.seconds == pytest.approx(0.075)


def test_what_a_collective_takes_along_is_moved_once() -> None:
    """The shard is read and the whole is written by its first step; the others pass both on."""
    found = Program(FUSIONS).by_kind()
    assert found["collectives"] == Cost(0, 50 + 200 + 4, 50 + 200)
    product = 2 * (500 + 500 + 2500)
    assert found["products"] == Cost(2 * 50 * 10 * 50, product, 0)


def test_loops_groups_and_turns_by_hand() -> None:
    found = played(Program(LOOP), CHIP, LINE).traffic
    # Pairs (0, 2) and (1, 3) are no neighbours: one link.
    sums = [Traffic(1, 400, 0.4, 0.4), Traffic(1, 2 * 3 / 4 * 400, 0.6, 0.6)]
    assert found["collective-permute"].count == 5
    assert found["collective-permute"].bytes == 5 * 200
    assert found["collective-permute"].waited == pytest.approx(5 * 0.2)
    assert found["all-reduce"].count == 2
    assert found["all-reduce"].bytes == sum(t.bytes for t in sums)
    assert found["all-reduce"].seconds == pytest.approx(1.0)
    # The exchange waits for the links, which the sum has until then: the sum is to blame.
    assert found["all-reduce"].waited == pytest.approx(1.0)
    assert found["all-to-all"] == Traffic(1, 16, pytest.approx(0.016), pytest.approx(0.016))
    assert played(Program(LOOP), CHIP, LINE).seconds == pytest.approx(0.4 + 1.0 + 0.6 + 0.016)


SLICES = """\
ENTRY %main (p: f32[25], q: f32[8]) -> f32[25] {
  %p = f32[25]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %t = token[] after-all()
  %recv = (f32[25]{0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send = (f32[25]{0}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %swap = f32[8]{0} all-to-all(%q), channel_id=4, replica_groups={{0,1},{2,3}}, dimensions={0}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %got = (f32[25]{0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %r = f32[25]{0} get-tuple-element(%got), index=0
}
"""  # noqa: E501


def test_what_slices_send_one_another() -> None:
    """As libtpu 0.0.42 writes it: `send` and `recv` through the hosts, by the name of the collective."""
    chip = Chip(peak=1e12, bandwidth=1e12, hbm=2**30, link=1e3, dcn=100.0)
    found = played(Program(SLICES), chip, LINE)
    # An all-reduce among four slices of 100 bytes a chip.
    assert found.traffic["all-reduce (DCN)"].bytes == 2 * 3 / 4 * 100
    assert found.traffic["all-reduce (DCN)"].seconds == pytest.approx(1.5)
    assert found.traffic["all-to-all"].bytes == 16
    assert found.seconds == pytest.approx(1.5 + 0.016)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_to_write_groups(text: str, groups: list[list[int]]) -> None:
    found = groups_of(f"all-gather(%x), channel_id=3, replica_groups={text}, dimensions={{0}}", 4)
    np.testing.assert_array_equal(found, groups)


def test_groups_that_are_not_known_are_no_guess() -> None:
    with pytest.raises(ValueError, match="replica groups that are not known"):
        groups_of("all-gather(%x), replica_groups=mesh['a'=2,'b'=2] {'z'}, dimensions={0}", 4)


def test_the_ends_of_a_long_side_are_neighbours_too() -> None:
    text = FUSIONS.replace("{{0,1,2,3}}", "{}").replace("25]", "16]")
    long = [Device((x, 0, 0)) for x in range(16)]
    sheet = {"peak": 1e12, "bandwidth": 1e12, "hbm": 2**30, "link": 1e3}
    assert played(Program(text), Chip(**sheet), long).total.seconds == pytest.approx(15 * 32 / 1e3)
    assert played(Program(text), Chip(**sheet, ring=16), long).total.seconds == pytest.approx(15 * 32 / 2e3)


def test_between_slices_there_is_the_network_alone() -> None:
    """Slices have the same places, and their chips are no neighbours for that."""
    two = [Device((x, 0, 0), number) for number in range(2) for x in range(2)]
    chip = Chip(peak=1e12, bandwidth=1e12, hbm=2**30, link=1e3, dcn=10.0)
    found = played(Program(LOOP), chip, two).traffic
    # The sum of (0, 2) and (1, 3) goes between slices, as the one of all does.
    assert "all-reduce" not in found
    assert found["all-reduce (DCN)"].bytes == 400 + 2 * 3 / 4 * 400
    assert found["all-reduce (DCN)"].seconds == pytest.approx((400 + 600) / 10)
    within = played(Program(FUSIONS.replace("{{0,1,2,3}}", "{{0,1},{2,3}}")), chip, two)
    assert list(within.traffic) == ["all-gather"]
    assert within.total.seconds == pytest.approx(50 / 1e3)
