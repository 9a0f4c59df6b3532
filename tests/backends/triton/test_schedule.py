"""The order in which programs of a grid take blocks and heads, and torch's switch for tf32."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastattn.backends.triton import launch  # noqa: E402
from fastattn.backends.triton.arguments import Bshd, Schedule, coded  # noqa: E402
from fastattn.backends.triton.tile import scheduled  # noqa: E402
from fastattn.problem import Inputs  # noqa: E402
from fastattn.spec import AttentionSpec  # noqa: E402


@triton.jit
def order_kernel(found, schedule, LAST_FIRST: tl.constexpr):
    block, head = scheduled(schedule, LAST_FIRST)
    tl.store(found + tl.program_id(0) * 2, block)
    tl.store(found + tl.program_id(0) * 2 + 1, head)


def order(blocks: int, heads: int, together: int, last_first: bool) -> list[tuple[int, int]]:
    found = torch.full((blocks * heads, 2), -1, dtype=torch.int32)
    order_kernel[(blocks * heads,)](
        found, Schedule(coded(blocks), coded(heads), coded(together)), LAST_FIRST=last_first
    )
    return [(block, head) for block, head in found.tolist()]


@pytest.mark.parametrize(("blocks", "heads", "together"), [(5, 7, 3), (4, 4, 4), (3, 5, 1), (1, 6, 4), (6, 1, 1)])
@pytest.mark.parametrize("last_first", [False, True])
def test_each_block_of_each_head_once_the_longest_first(
    blocks: int, heads: int, together: int, last_first: bool
) -> None:
    """Heads that share the L2 cache run together, and among them the blocks with most work first."""
    found = order(blocks, heads, together, last_first)
    assert sorted(found) == list(itertools.product(range(blocks), range(heads)))
    groups = [range(h, min(h + together, heads)) for h in range(0, heads, together)]
    by_work = range(blocks - 1, -1, -1) if last_first else range(blocks)
    assert found == [(block, head) for group in groups for block in by_work for head in group]


def test_as_many_heads_together_as_fit_the_cache() -> None:
    x = torch.empty(2, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    call = launch.Call.of(Inputs(x, x, x, max_seqlen_q=4096, max_seqlen_kv=4096), AttentionSpec(1.0))
    (programs,), schedule = call.schedule(4096, 128, 16)
    of_head = 2 * 4096 * 128 * 2
    assert programs == 32 * 16
    assert schedule == Schedule(coded(32), coded(16), coded(launch._l2_bytes(x.device) // 2 // of_head))


@pytest.mark.parametrize(("switch", "precision"), [("ieee", "ieee"), ("none", "ieee"), ("tf32", "tf32")])
def test_tf32_is_opt_in(switch: str, precision: str) -> None:
    x, before = torch.empty(1, 8, 1, 16), torch.backends.cuda.matmul.fp32_precision
    inputs, rows = Inputs(x, x, x, max_seqlen_q=8, max_seqlen_kv=8), Bshd.of(x)
    torch.backends.cuda.matmul.fp32_precision = switch
    try:
        assert launch.flags_of(inputs, AttentionSpec(1.0), (rows, rows, rows)).precision == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
