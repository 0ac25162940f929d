"""The counts of a compiled program, on texts small enough to count by hand."""

import pytest

from hccr_jax.bench import hlo
from hccr_jax.bench.compiled import predict_seconds

PROGRAM = """HloModule jit_train_chunk, is_scheduled=true

%fused_slice (param_0.1: f32[1000], param_1.1: bf16[10]) -> bf16[10] {
  %param_0.1 = f32[1000]{0} parameter(0)
  %param_1.1 = bf16[10]{0} parameter(1)
  %slice.1 = f32[10]{0} slice(%param_0.1), slice={[5:15]}
  %convert.1 = bf16[10]{0} convert(%slice.1)
  ROOT %add.1 = bf16[10]{0} add(%convert.1, %param_1.1)
}

%fused_write (param_0.2: f32[64,10], param_1.2: f32[1,10], param_2.2: s32[]) -> f32[64,10] {
  %param_0.2 = f32[64,10]{1,0} parameter(0)
  %param_1.2 = f32[1,10]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %constant.2 = s32[] constant(0)
  ROOT %update = f32[64,10]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2, %constant.2)
}

%inner_body (arg.3: (s32[], f32[1,10])) -> (s32[], f32[1,10]) {
  %arg.3 = (s32[], f32[1,10]{1,0}) parameter(0)
  %count.3 = s32[] get-tuple-element(%arg.3), index=0
  %row.3 = f32[1,10]{1,0} get-tuple-element(%arg.3), index=1
  %negate.3 = f32[1,10]{1,0} negate(%row.3)
  ROOT %tuple.3 = (s32[], f32[1,10]{1,0}) tuple(%count.3, %negate.3)
}

%inner_condition (arg.4: (s32[], f32[1,10])) -> pred[] {
  %arg.4 = (s32[], f32[1,10]{1,0}) parameter(0)
  ROOT %true.4 = pred[] constant(true)
}

%step (arg.5: (s32[], f32[1000], bf16[10], f32[64,10], f32[1,10])) -> (s32[], f32[1000], bf16[10], f32[64,10], f32[1,10]) {
  %arg.5 = (s32[], f32[1000]{0}, bf16[10]{0}, f32[64,10]{1,0}, f32[1,10]{1,0}) parameter(0)
  %count.5 = s32[] get-tuple-element(%arg.5), index=0
  %vector.5 = f32[1000]{0} get-tuple-element(%arg.5), index=1
  %small.5 = bf16[10]{0} get-tuple-element(%arg.5), index=2
  %table.5 = f32[64,10]{1,0} get-tuple-element(%arg.5), index=3
  %row.5 = f32[1,10]{1,0} get-tuple-element(%arg.5), index=4
  %one = bf16[10]{0} fusion(%vector.5, %small.5), kind=kLoop, calls=%fused_slice, metadata={op_name="a"}
  %kernel = (bf16[10]{0}, f32[2]{0}) custom-call(%one, %vector.5), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/bytes=77/pallas_call"}, backend_config={name = "_sums", num_warps = 4 : i32}
  %start = (f32[1,10]{1,0}) tuple(%row.5)
  %init = (s32[], f32[1,10]{1,0}) tuple(%count.5, %row.5)
  %loop = (s32[], f32[1,10]{1,0}) while(%init), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
  %turned = f32[1,10]{1,0} get-tuple-element(%loop), index=1
  %write = f32[64,10]{1,0} fusion(%table.5, %turned, %count.5), kind=kLoop, calls=%fused_write
  %reduced = f32[1000]{0} all-reduce-start(%vector.5), replica_groups={{0,1}}, to_apply=%sum
  %all = f32[1000]{0} all-reduce-done(%reduced)
  ROOT %tuple.5 = (s32[], f32[1000]{0}, bf16[10]{0}, f32[64,10]{1,0}, f32[1,10]{1,0}) tuple(%count.5, %all, %one, %write, %turned)
}

%condition (arg.6: (s32[], f32[1000], bf16[10], f32[64,10], f32[1,10])) -> pred[] {
  %arg.6 = (s32[], f32[1000]{0}, bf16[10]{0}, f32[64,10]{1,0}, f32[1,10]{1,0}) parameter(0)
  ROOT %true.6 = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[1000], bf16[10], f32[64,10], f32[1,10])) -> (s32[], f32[1000], bf16[10], f32[64,10], f32[1,10]) {
  %p = (s32[], f32[1000]{0}, bf16[10]{0}, f32[64,10]{1,0}, f32[1,10]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[1000]{0}, bf16[10]{0}, f32[64,10]{1,0}, f32[1,10]{1,0}) while(%p), condition=%condition, body=%step
}
"""  # noqa: E501


def test_the_step_is_the_body_of_the_outer_loop():
    body, loop = hlo.Module(PROGRAM).step_body()
    assert (body, loop.name) == ("step", "while")


def test_kernels_and_what_they_read_and_write():
    kernels = {k.instruction.name: k for k in hlo.Module(PROGRAM).kernels("step")}
    assert {name: (k.times, k.num_bytes) for name, k in kernels.items()} == {
        "one": (1, 10 * 4 + 10 * 2 + 10 * 2),  # ten of the thousand values are read
        "kernel": (1, 77),  # as it declares
        "negate.3": (3, 2 * 10 * 4),  # in a loop of three
        "write": (1, 10 * 4 + 10 * 4 + 4),  # a row in place, the row and its number
        "reduced": (1, 2 * 1000 * 4),
    }


def test_the_longest_chain_goes_through_loops():
    # Three rounds of the inner loop and the write; the first fusion and the kernel are fewer.
    assert hlo.Module(PROGRAM).longest_chain("step") == 4


def test_exchanges_and_our_own_kernels():
    assert hlo.Module(PROGRAM).collectives("step") == [4000]
    assert hlo.kernel_names(PROGRAM) == {"_sums"}


THUNKS_OF_ONE_GRAPH = """000: kCommandBuffer [source | sink]
    001: kCopy         [source       | next=002 (6)] kCopy
    002: kWhile        [prev=001 (1) | sink]
condition:
        003: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
      body:
        004: kCustomKernel [source         | sink] loop_add_fusion grid: [1, 1, 1]
"""
THUNKS_OF_A_LOOP = """000: kCopy [source | next=001] kCopy
001: kWhile [source | sink]
condition:
    002: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
  body:
    003: kCommandBuffer [source | sink]
        004: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
        005: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
    006: kNcclAllReduce [source | sink] all-reduce
    007: kCommandBuffer [source | sink]
        008: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
"""


@pytest.mark.parametrize(
    ("thunks", "expected"), [(THUNKS_OF_ONE_GRAPH, (0, 1, 0)), (THUNKS_OF_A_LOOP, (1, 2, 2))]
)
def test_what_is_left_to_the_host(thunks, expected):
    assert hlo.count_host_work(thunks) == expected


def test_the_prediction_is_its_model():
    assert predict_seconds(1000, 2.1e9) == pytest.approx(1000 * 1.7e-6 + 1e-3)
