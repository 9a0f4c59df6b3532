"""Layouts: names for orders of dimensions, views and never copies."""

import pytest
import torch

import fastattn
from fastattn import layout


@pytest.mark.parametrize("name", ["BSHD", "BHSD"])
def test_views_there_and_back(name):
    x = torch.randn(2, 3, 5, 8)
    inside = layout.to_internal(x, name)
    assert inside.data_ptr() == x.data_ptr()
    assert inside.shape == ((2, 3, 5, 8) if name == "BSHD" else (2, 5, 3, 8))
    back = layout.from_internal(inside, name)
    assert back.shape == x.shape and back.stride() == x.stride()


def test_layouts_compute_the_same():
    q, k, v = (torch.randn(2, s, h, d) for s, h, d in ((5, 4, 8), (7, 2, 8), (7, 2, 6)))
    expected, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, lse_of_turned = fastattn.attention(*turned, causal=True, layout="BHSD", return_lse=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    torch.testing.assert_close(lse_of_turned, lse)  # lse is (B, H_q, S_q) in either


def test_packed_layout_is_internal_already():
    x = torch.randn(5, 3, 8)
    assert layout.to_internal(x, "THD") is x and layout.from_internal(x, "THD") is x


@pytest.mark.parametrize("values", [[0], [0, 0], [0, 2, 2, 5], [0, 5]])
def test_good_boundaries_pass(values):
    layout.check_cu_seqlens("cu_seqlens_q", torch.tensor(values, dtype=torch.int32), torch.device("cpu"))
    layout.check_cu_seqlens_values("cu_seqlens_q", values, values[-1], max_seqlen=5)
