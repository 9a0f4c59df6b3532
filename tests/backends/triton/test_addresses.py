"""Addresses beyond 2^31 elements, through the interpreter: tensors whose parts lie that far apart."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastattn.backends import load
from fastattn.backends.triton import launch
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
FAR = 2**30 - 64  # the fourth of four lies beyond; a larger stride would itself have 64 bits
ROW = launch.MAX_ROW_STRIDE - 8  # the widest that is not copied


@pytest.fixture(autouse=True)
def _overflow_is_an_error(overflow_is_an_error: None) -> None:
    """A product that does not fit 32 bits is reported, not followed to where it points."""


def spread(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x``, with ``strides``, in memory that is only reserved: what is not touched takes no room."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    room = mmap.mmap(-1, span * x.element_size(), flags=flags)
    view = torch.frombuffer(room, dtype=x.dtype).as_strided(x.shape, strides)
    where = x.nonzero(as_tuple=True)
    view[where] = x[where]
    return view


def only_last(rows: int, *shape: int) -> Tensor:
    """Random numbers in the last ``rows`` of the rows (dim 1), before them zeros."""
    x = torch.zeros(shape)
    x[:, -rows:] = torch.randn_like(x[:, -rows:])
    return x


def results(inputs: Inputs, spec: AttentionSpec, dout: Tensor) -> list[Tensor | None]:
    backend = load("triton")
    out, lse, low = backend.forward(inputs, spec)
    grads = backend.backward(dout, None, out, lse, low, inputs, spec, ("q", "k", "v", "bias"))
    return [out, lse, grads.dq, grads.dk, grads.dv, grads.dbias]


def assert_far_is_near(near: Inputs, dout: Tensor, spec: AttentionSpec, strides: dict[str, tuple[int, ...]]):
    """The same bits, whether the tensors named in ``strides`` lie close together or far apart."""
    tensors = {"q": near.q, "k": near.k, "v": near.v, "bias": near.bias, "mask": near.mask, "dout": dout}
    far = {name: spread(tensors[name], of_it) for name, of_it in strides.items()}  # type: ignore[arg-type]
    far_dout = far.pop("dout", dout)
    for found, right in zip(results(near.replace(**far), spec, far_dout), results(near, spec, dout), strict=True):
        assert (found is right is None) or torch.equal(found, right)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "heads", "strides"), [(4, 1, (FAR, 16, 16, 1)), (1, 4, (80, 16, FAR, 1))], ids=["batch", "heads"]
)
def test_batch_entries_and_heads_far_apart(batch: int, heads: int, strides: tuple[int, ...]) -> None:
    q, k, v, dout = (torch.randn(batch, 5, heads, 16, dtype=torch.float16) for _ in range(4))
    near = Inputs(q, k, v, max_seqlen_q=5, max_seqlen_kv=5)
    assert_far_is_near(near, dout, AttentionSpec(0.25), dict.fromkeys(("q", "k", "v", "dout"), strides))


@pytest.mark.parametrize("term", ["bias", "mask"])
def test_scores_far_apart(term: str) -> None:
    q, dout, scores = torch.randn(4, 5, 1, 16), torch.randn(4, 5, 1, 16), torch.randn(4, 1, 5, 5)
    near = Inputs(q, q, q, **{term: scores if term == "bias" else scores > 0}, max_seqlen_q=5, max_seqlen_kv=5)
    assert_far_is_near(near, dout, AttentionSpec(0.25), {term: (FAR, 40, 8, 1)})


@pytest.mark.parametrize("strides", [(FAR, 64, 16, 1), (256, FAR // 4, 16, 1), (16, 64, FAR, 1)], ids=str)
def test_pages_far_apart(strides: tuple[int, ...]) -> None:
    """Of a cache; new rows are stored there too."""
    k_cache, v_cache, new = torch.randn(4, 16, 4, 16), torch.randn(4, 16, 4, 16), torch.randn(2, 1, 4, 16)
    lengths, table = torch.tensor([20, 31], dtype=torch.int32), torch.tensor([[1, 3], [2, 0]], dtype=torch.int32)
    results = []
    for caches in ((k_cache, v_cache), (spread(k_cache, strides), spread(v_cache, strides))):
        inputs = CacheInputs(new, *caches, lengths, new, new, table, max_seqlen_q=1)
        results.append([*load("triton").attend_to_cache(inputs, AttentionSpec(0.25, right=0)), *caches])
        assert torch.equal(caches[0][3, 4], new[0, 0]) and torch.equal(caches[1][0, 15], new[1, 0])
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize(("s_q", "s_kv"), [(6, 600), (600, 6)], ids=["keys", "queries"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_the_last_rows_far_from_the_first(s_q: int, s_kv: int, is_packed: bool) -> None:
    """Of 600 rows only the last ones take part, and these lie beyond 2^31 elements."""
    q, dout, k, v = (only_last(12, 1, s, 1, 16) for s in (s_q, s_q, s_kv, s_kv))
    bias = only_last(12, 1, s_q, 1, s_kv).transpose(1, 2)
    spec = AttentionSpec(0.25, left=5, right=0)
    near = Inputs(q, k, v, bias=bias, max_seqlen_q=s_q, max_seqlen_kv=s_kv)
    if is_packed:
        boundaries = {f"cu_seqlens_{side}": torch.tensor([0, s - 4, s]) for side, s in (("q", s_q), ("kv", s_kv))}
        near = Inputs(q[0], k[0], v[0], **{n: x.int() for n, x in boundaries.items()}, max_seqlen_q=s_q,
                      max_seqlen_kv=s_kv)  # fmt: skip
        dout = dout[0]
    rows = (ROW, 16, 1) if is_packed else (ROW, ROW, 16, 1)
    strides: dict[str, tuple[int, ...]] = dict.fromkeys(("k", "v") if s_kv > s_q else ("q", "dout"), rows)
    if not is_packed and s_q > s_kv:
        strides["bias"] = (ROW, ROW, ROW, 1)
    assert_far_is_near(near, dout, spec, strides)
