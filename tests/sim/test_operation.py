"""Operations sum by repetition, and a total is the sum of its parts."""

from armillary.sim.operation import Axis, Kind, Operation, Totals, total

QKV = Operation("qkv", Kind.GEMM, flops=2 * 4 * 8 * 6, weight_bytes=96, read_bytes=64, write_bytes=48, m=4, n=6, k=8, repeat=3)
ATTENTION = Operation("decode_attention", Kind.ATTENTION, flops=40, kv_bytes=20, repeat=3)
REDUCE = Operation("all_reduce", Kind.COLLECTIVE, message_bytes=64, ranks=2, axis=Axis.TENSOR, repeat=6)


def test_a_total_counts_repetitions_and_messages():
    assert total([QKV, ATTENTION, REDUCE]) == Totals(3 * 384 + 120, 288, 60, 192, 144, 384, 6)
    assert total([]) == Totals()


def test_totals_add_as_their_lists_do():
    assert total([QKV]) + total([ATTENTION, REDUCE]) == total([QKV, ATTENTION, REDUCE])


def test_intensity_is_flops_a_byte_moved():
    assert QKV.bytes == 96 + 64 + 48
    assert QKV.intensity == 384 / 208
    assert REDUCE.intensity == 0.0
