"""What is counted in compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from keysync_jax.ahead.hlo import KINDS, Cost, Program

TPU_TEXT = """\
HloModule jit_run, is_scheduled=true, entry_computation_layout={(bf16[8,64]{1,0})->bf16[8,64]{1,0}}

%fused_update (p0: bf16[10,8,64], p1: bf16[8,64], p2: s32[]) -> bf16[10,8,64] {
  %p0 = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %b = bf16[1,8,64]{2,1,0:T(8,128)(2,1)} bitcast(%p1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dus = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %b, %p2, %zero, %zero)
}

%fused_product (p0.1: bf16[8,64], p1.1: bf16[10,64,64], p2.1: s32[]) -> bf16[8,64] {
  %p0.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1.1 = bf16[10,64,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %ds = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1.1, %p2.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,64}
  %w = bf16[64,64]{1,0:T(8,128)(2,1)} bitcast(%ds)
  ROOT %conv = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} convolution(%p0.1, %w), dim_labels=bf_io->bf, metadata={op_name="jit(run)/while/body/dot_general"}
}

%body (carry: (s32[], bf16[8,64], bf16[10,64,64], bf16[10,8,64])) -> (s32[], bf16[8,64], bf16[10,64,64], bf16[10,8,64]) {
  %carry = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[10,64,64]{2,1,0:T(8,128)(2,1)}, /*index=3*/bf16[10,8,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %weights = bf16[10,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %kept = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=3
  %product = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %weights, %i), kind=kOutput, calls=%fused_product, metadata={op_name="jit(run)/while/body/dot_general"}
  %update = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} fusion(%kept, %product, %i), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[10,64,64]{2,1,0:T(8,128)(2,1)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}) tuple(%i, %product, %weights, %update)
}

%condition (carry.1: (s32[], bf16[8,64], bf16[10,64,64], bf16[10,8,64])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[10,64,64]{2,1,0:T(8,128)(2,1)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %ten = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %ten), direction=LT
}

ENTRY %main (start: (s32[], bf16[8,64], bf16[10,64,64], bf16[10,8,64]), q: bf16[2,5,256,64]) -> bf16[8,64] {
  %start = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[10,64,64]{2,1,0:T(8,128)(2,1)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %q = bf16[2,5,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[2,5,256,64]{3,2,1,0:T(8,128)(2,1)} copy(%q), metadata={op_name="jit(run)/attention/transpose"}
  %splash_mha_fwd.1 = (f32[2,256,128]{2,1,0:T(8,128)}, bf16[2,5,256,64]{3,2,1,0:T(8,128)(2,1)}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(run)/attention/jit(_splash_attention)/splash_mha_fwd/pallas_call"}
  %loop = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[10,64,64]{2,1,0:T(8,128)(2,1)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  %normed = bf16[8,64]{1,0:T(8,128)(2,1)} add(%q, %q), metadata={op_name="jit(run)/norm/add"}
  %copy-start = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%normed)
  %copy-done = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %out = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501

X, W, Q = 2 * 8 * 64, 2 * 64 * 64, 2 * 2 * 5 * 256 * 64
"""Bytes of x, of one matrix, of the queries."""


def test_a_tpu_program_by_hand() -> None:
    found = Program(TPU_TEXT).by_kind()
    assert set(found) == set(KINDS)
    # Ten trips: x in scratch memory, one matrix of ten out of HBM, the result in scratch memory.
    assert found["products"] == Cost(10 * 2 * 8 * 64 * 64, 10 * (X + W + 4 + X), 10 * (W + 4))
    scratch = 4 * 2 * 256 * 128
    assert found["attention"] == Cost(
        2 * 2 * 2 * 5 * 256 * 256 * 64, 3 * Q + Q + scratch + 2 * Q, 3 * Q + Q + scratch + 2 * Q
    )
    assert found["norms"].bytes == Q + Q + X
    # In place: the update is read from scratch memory and written to HBM, the array itself is not moved.
    # The copy to scratch memory reads HBM and writes scratch memory.
    assert found["copies"] == Cost(0, 10 * (X + 4 + X) + 2 * X, 10 * (4 + X) + X)
    assert found["rest"] == found["convolutions"] == found["collectives"] == Cost()


NESTED_TEXT = """\
HloModule jit_run, is_scheduled=true

%piece (p0.2: bf16[42,64,64], p1.2: s32[]) -> bf16[1,64,64] {
  %p0.2 = bf16[42,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1.2 = s32[]{:T(128)} parameter(1)
  %zero.2 = s32[]{:T(128)} constant(0)
  ROOT %ds.2 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0.2, %p1.2, %zero.2, %zero.2), dynamic_slice_sizes={1,64,64}
}

%outer (p0.3: bf16[42,64,64], p1.3: s32[]) -> bf16[64,64] {
  %p0.3 = bf16[42,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1.3 = s32[]{:T(128)} parameter(1)
  %sliced = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} fusion(%p0.3, %p1.3), kind=kLoop, calls=%piece
  %flat = bf16[64,64]{1,0:T(8,128)(2,1)} bitcast(%sliced)
  ROOT %product.3 = bf16[64,64]{1,0:T(8,128)(2,1)} convolution(%flat, %flat), dim_labels=bf_io->bf, metadata={op_name="jit(run)/dot_general"}
}

ENTRY %main.3 (x: bf16[42,64,64], i: s32[], q: bf16[1,14,64,320]) -> bf16[64,64] {
  %x = bf16[42,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i.3 = s32[]{:T(128)} parameter(1)
  %q.3 = bf16[1,14,64,320]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %kernel = bf16[1,14,64,320]{3,2,1,0:T(8,128)(2,1)} custom-call(%q.3, %q.3, %q.3), custom_call_target="tpu_custom_call", metadata={op_name="jit(run)/attention/frame_attention/pallas_call"}
  ROOT %all = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%x, %i.3), kind=kOutput, calls=%outer, metadata={op_name="jit(run)/dot_general"}
}
"""  # noqa: E501


def test_a_slice_taken_within_a_fusion_of_a_fusion_and_the_kernel_of_frames() -> None:
    found = Program(NESTED_TEXT).by_kind()
    # One of 42 matrices and the place of it are read, one is written.
    assert found["products"] == Cost(2 * 64**3, 2 * 2 * 64 * 64 + 4, 2 * 2 * 64 * 64 + 4)
    tokens = 14 * 64 * 320
    assert found["attention"] == Cost(2 * 2 * 14 * tokens, 4 * 2 * tokens, 4 * 2 * tokens)


def test_the_longer_of_computing_and_moving() -> None:
    assert Cost(100.0, 5.0, 5.0).seconds(10, 1) == 10
    assert Cost(10.0, 500.0, 50.0).seconds(10, 1) == 50


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_a_loop_without_the_padding(stride: int) -> None:
    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            y = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return x + y.sum(), y

        return jax.lax.scan(step, x, length=5)[1]

    compiled = jax.jit(run).lower(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))).compile()
    flop = sum((cost.flop for cost in Program(compiled.as_text()).by_kind().values()), 0.0)
    # Along a side of 8 cells: 3 places of the kernel for each, less the one over either edge.
    along = 3 * 8 - 2 if stride == 1 else 3 * 4 - 1
    assert flop == 5 * 2 * 2 * along**2 * 3 * 4


def test_a_loop_whose_trips_are_not_known_is_no_guess() -> None:
    text = TPU_TEXT.replace("constant(10)", "parameter(1)")
    with pytest.raises(ValueError, match="trips of the loop loop are not known"):
        Program(text).by_kind()
