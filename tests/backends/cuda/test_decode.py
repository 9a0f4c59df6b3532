"""Attention to a cache by the CUDA backend: decisions of the host. test_emulated_backend.py runs the kernels."""

from __future__ import annotations

import pytest
import torch

from fastattn.backends.cuda import abi, decode
from fastattn.kv_cache import CacheInputs
from fastattn.spec import AttentionSpec


def inputs_of(
    batch: int = 2, s_q: int = 1, heads: tuple[int, int] = (8, 2), pages: int = 4, **more: object
) -> CacheInputs:
    cache = torch.zeros(batch * pages, 16, heads[1], 64, dtype=torch.bfloat16)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    q = torch.zeros(batch, s_q, heads[0], 64, dtype=torch.bfloat16)
    lengths = torch.ones(batch, dtype=torch.int32)
    return CacheInputs(q, cache, cache, lengths, block_table=table, max_seqlen_q=s_q).replace(**more)


@pytest.mark.parametrize(
    ("tiles", "keys", "splits"),
    [
        (1, 100, 1),  # too short to divide
        (1, 512, 1),  # not worth combining
        (1, 1024, 4),
        (8, 1 << 17, 33),  # two full waves
        (8, 1 << 14, 16),  # one that is almost full
        (1, 1 << 20, 128),
        (128, 1 << 17, 1),
        (132, 1 << 17, 1),
        (133, 1 << 13, 7),  # eight waves of a seventh, and not two of everything
        (10_000, 1 << 17, 1),
    ],
)
def test_splits_take_the_least_time(tiles: int, keys: int, splits: int) -> None:
    assert decode.split_count(tiles, keys, 132) == splits


def test_heads_and_positions_share_tiles() -> None:
    assert decode.Tiling.of(inputs_of()) == decode.Tiling(heads=4, positions=16, tiles=2)
    assert decode.Tiling.of(inputs_of(s_q=17)) == decode.Tiling(heads=4, positions=16, tiles=4)
    assert decode.Tiling.of(inputs_of(heads=(142, 2))) == decode.Tiling(heads=64, positions=1, tiles=4)
    packed = inputs_of(batch=3, q=torch.zeros(40, 8, 64), cu_seqlens_q=torch.tensor([0, 40, 40, 40], dtype=torch.int32))
    assert decode.Tiling.of(packed).tiles == 5, "any lengths that sum up to 40"


def test_a_window_bounds_the_keys_of_a_tile() -> None:
    inputs = inputs_of(pages=1000)
    tiling = decode.Tiling.of(inputs)
    for left, right, keys in ((None, 0, 16000), (100, None, 16000), (100, 0, 116), (15990, 0, 16000)):
        assert decode.most_keys(inputs, AttentionSpec(1.0, left=left, right=right), tiling) == keys


def launched(inputs: CacheInputs, **spec: object) -> abi.Fields:
    found: list[abi.Fields] = []
    decode.attend(found.append, inputs, AttentionSpec(0.125, **spec), 132, stream=7)  # type: ignore[arg-type]
    (fields,) = found
    assert set(fields) == set(abi.DECODE.names) and len(abi.DECODE.pack(fields)) == abi.DECODE.size
    return fields


def test_fields_say_what_the_call_says() -> None:
    inputs = inputs_of()
    fields = launched(inputs, right=0, softcap=5.0)
    assert (fields["pages"], fields["page_size"], fields["box_rows"], fields["table_stride"]) == (8, 16, 16, 4)
    assert (fields["left"], fields["right"], fields["has_softcap"], fields["new_keys"]) == (abi.UNBOUNDED, 0, 1, 0)
    assert (fields["splits"], fields["partial_out"], fields["stream"]) == (1, 0, 7)
    assert (fields["k_batch_stride"], fields["k_row_stride"], fields["k_head_stride"]) == inputs.k_cache.stride()[:3]
    new = torch.zeros(2, 3, 2, 64, dtype=torch.bfloat16)
    assert launched(inputs.replace(k=new, v=new))["new_keys"] == 3
    contiguous = inputs.replace(block_table=None, k_cache=inputs.k_cache[:2], v_cache=inputs.v_cache[:2])
    assert (launched(contiguous)["block_table"], launched(contiguous)["box_rows"]) == (0, 64)
    long = launched(inputs_of(pages=100), left=5000)
    assert long["splits"] > 1 and long["partial_out"] and long["partial_lse"]


@pytest.mark.parametrize(("page_size", "rows"), [(1, 1), (6, 2), (8, 8), (24, 8), (64, 64), (100, 4), (256, 64)])
def test_boxes_never_leave_a_page(page_size: int, rows: int) -> None:
    cache = torch.zeros(8, page_size, 2, 64, dtype=torch.bfloat16)
    fields = launched(inputs_of(k_cache=cache, v_cache=cache))
    assert (fields["box_rows"], fields["is_gathered"]) == (rows, int(rows < 8)), "TMA loads whole atoms of its swizzle"
    assert launched(inputs_of(k_cache=cache, v_cache=cache, batch_invariant=True))["is_gathered"]


def test_fields_of_e4m3_and_of_a_tree() -> None:
    cache = torch.zeros(8, 16, 2, 64, dtype=torch.float8_e4m3fn)
    inputs = inputs_of(k_cache=cache, v_cache=cache, k_scale=torch.ones(1, 2), v_scale=torch.ones(8, 2))
    fields = launched(inputs)
    assert fields["is_e4m3"] and fields["is_gathered"] and fields["k_scale"] == inputs.k_scale.data_ptr()
    assert (fields["k_scale_stride"], fields["v_scale_stride"], fields["tree"]) == (0, 2, 0)
    new = torch.zeros(2, 40, 2, 64, dtype=torch.bfloat16)
    tree = torch.full((1, 40, 2), 1, dtype=torch.int32)
    inputs = inputs_of(s_q=40, k=new, v=new, tree_mask=tree)
    fields = launched(inputs, right=0)
    assert (fields["tree"], fields["tree_words"], fields["shares_tree"]) == (tree.data_ptr(), 2, 1)
    assert not fields["depths"] and launched(inputs, right=0, left=5)["depths"]


def test_fields_of_alibi_and_of_a_bias() -> None:
    bias = torch.zeros(1, 8, 1, 70, dtype=torch.bfloat16)
    inputs = inputs_of(bias=bias, alibi_slopes=torch.ones(2, 8))
    fields = launched(inputs)
    assert fields["is_gathered"] and (fields["slopes_batch_stride"], fields["bias_is_float"]) == (8, 0)
    assert [fields[f"bias_strides.{of}"] for of in ("batch", "head", "query", "key")] == [0, 70, 0, 1]
    assert fields["bias"] == bias.data_ptr() and fields["capacity"] == 64
    short = launched(inputs.replace(bias=bias[..., :50].double(), alibi_slopes=torch.ones(1, 8)))
    assert (short["capacity"], short["bias_is_float"], short["slopes_batch_stride"]) == (50, 1, 0)
    new = torch.zeros(2, 3, 2, 64, dtype=torch.bfloat16)
    tree = torch.ones(1, 3, 1, dtype=torch.int32)
    of_tree = inputs_of(s_q=3, k=new, v=new, tree_mask=tree, alibi_slopes=torch.ones(1, 8))
    assert launched(of_tree, right=0)["depths"], "distances count along the paths of a tree"


def test_caches_are_not_copied_unless_tma_cannot_read_them() -> None:
    inputs = inputs_of()
    assert launched(inputs)["k_cache"] == inputs.k_cache.data_ptr()
    odd = torch.zeros(8, 16, 2, 65, dtype=torch.bfloat16)[..., :64]
    assert launched(inputs.replace(k_cache=odd))["k_cache"] != odd.data_ptr()
