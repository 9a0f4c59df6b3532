"""Test cases of attention to a cache: their values, and the judgement of a backend's ``attend_to_cache``.

Every cache row that no query keeps and every unused page hold NaN, and block table entries of unused pages are not page
numbers. A backend must not read any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import kv_cache, reference
from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.kv_cache import FP8, CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, keep, page_and_row
from fastattn.testing.cases import Case
from fastattn.testing.inputs import Sample
from fastattn.testing.tolerance import Row, judge_forward, poisoned
from fastattn.trees import ancestors, words_of

PAGE_SIZES = (1, 8, 16, 64, 128, 256)
JUNK = -7  # in block table entries that must not be looked up
# Rounding errors of e4m3: half a unit in the last of its 3 bits, or half of its smallest subnormal number.
FP8_RELATIVE, FP8_ABSOLUTE = 2.0**-4, 2.0**-10


@dataclass(frozen=True)
class CacheCase:
    """A problem of attention to a cache, without its values.

    Attributes:
        id: unique.
        before, s_q: for each sequence, positions in the cache before the call, and query rows.
        new: number of appended rows; "queries" is as many as query rows, 0 appends nothing.
        packed: q, k and v are packed; else all of ``s_q`` are equal.
        page_size: None is a contiguous cache.
        dtype: of q.
        fp8: the caches are e4m3, with a scale for each head, or for each page and head.
        H_q, H_kv, D_qk, D_v: sizes.
        scale, softcap, left, right: as in ``AttentionSpec``; scale None is ``D_qk ** -0.5``.
        bias, alibi, sinks: whether there is one.
        per_sequence: slopes and sinks have a row for each sequence.
        rotary: pairs, or None; ``D_rotary`` is the even part of ``D_qk / 2``.
        strided: caches are every second head of a wider buffer, q is a slice of one.
        tree: the new tokens form a tree, the same for all sequences, or one for each; None: they follow each other.
        batch_invariant: a sequence has the same bits alone.
    """

    id: str
    before: tuple[int, ...] = (13, 40, 0)
    s_q: tuple[int, ...] = (1, 1, 1)
    new: Literal["queries"] | int = "queries"
    packed: bool = False
    page_size: int | None = None
    dtype: torch.dtype = torch.float32
    fp8: Literal["head", "page"] | None = None
    H_q: int = 4
    H_kv: int = 2
    D_qk: int = 32
    D_v: int = 32
    scale: float | None = None
    softcap: float | None = None
    left: int | None = None
    right: int | None = 0
    bias: bool = False
    alibi: bool = False
    sinks: bool = False
    per_sequence: bool = False
    rotary: Literal["halves", "interleaved"] | None = None
    strided: bool = False
    tree: Literal["shared", "each"] | None = None
    batch_invariant: bool = False

    def parents(self, b: int) -> list[int]:
        """The parents of the new tokens of sequence ``b``, three to a level, so that there are several roots."""
        shift = b if self.tree == "each" else 0
        return [max(-1, token - 1 - (token + shift) % 3) for token in range(self.s_q[b])]

    @property
    def group(self) -> str:
        return "cache" if self.page_size is None else "pages"

    @property
    def s_new(self) -> tuple[int, ...]:
        return self.s_q if self.new == "queries" else (self.new,) * len(self.s_q)

    @property
    def s_kv(self) -> tuple[int, ...]:
        return tuple(have + new for have, new in zip(self.before, self.s_new, strict=True))


@dataclass(frozen=True)
class CacheSample:
    """A case with its values."""

    case: CacheCase
    inputs: CacheInputs
    spec: AttentionSpec


_RAGGED: dict[str, Any] = {"packed": True, "before": (30, 0, 17, 5, 0), "s_q": (1, 21, 1, 4, 0)}
_ALL: dict[str, Any] = {"softcap": 5.0, "alibi": True, "sinks": True, "per_sequence": True, "left": 11}

# Name -> what differs from the defaults. Each row runs with a contiguous cache and with pages.
_TABLE: dict[str, dict[str, Any]] = {
    "one token": {},
    "reads only": {"new": 0, "before": (13, 40, 1)},
    "no batch": {"before": (), "s_q": ()},
    "an empty cache": {"new": 0, "before": (0, 9, 0), "sinks": True},
    "an empty cache without sinks": {"new": 0, "before": (0, 0), "s_q": (1, 1)},
    "some tokens": {"s_q": (5, 5, 5)},
    "many tokens": {"s_q": (128, 128), "before": (3, 0)},
    "more queries than keys": {"s_q": (9, 9), "new": 0, "before": (4, 30)},
    "fewer new than queries": {"s_q": (4, 4), "new": 2, "before": (3, 11)},
    "not causal": {"s_q": (3, 3, 3), "right": None},
    "window": {"left": 6, "before": (13, 40, 90)},
    "window of tokens": {"left": 6, "right": 2, "s_q": (9, 9), "before": (3, 70)},
    "multi-head": {"H_kv": 4},
    "multi-query": {"H_q": 6, "H_kv": 1},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.3},
    "bias": {"bias": True, "s_q": (2, 2, 2)},
    "alibi": {"alibi": True},
    "alibi of each sequence": {"alibi": True, "per_sequence": True, "s_q": (3, 3, 3)},
    "sinks": {"sinks": True},
    "mixed head dims": {"D_qk": 48, "D_v": 24},
    "odd head dims": {"D_qk": 33, "D_v": 17},
    "wide head dims": {"D_qk": 512, "D_v": 300, "before": (70, 3), "s_q": (2, 2)},
    "rotary": {"rotary": "halves"},
    "rotary of neighbours": {"rotary": "interleaved", "s_q": (3, 3, 3)},
    "rotary of queries": {"rotary": "halves", "new": 0, "s_q": (2, 2), "before": (30, 1)},
    "strided": {"strided": True, "s_q": (2, 2, 2)},
    "ragged": _RAGGED,
    "ragged rotary": {**_RAGGED, "rotary": "interleaved"},
    "ragged, reads only": {**_RAGGED, "new": 0},
    "ragged, everything": {**_RAGGED, **_ALL, "rotary": "halves", "D_qk": 40, "D_v": 24, "strided": True},
    "everything": {**_ALL, "bias": True, "rotary": "halves", "s_q": (3, 3, 3)},
    "e4m3": {"fp8": "head"},
    "e4m3, reads only": {"fp8": "head", "new": 0, "before": (13, 40, 2)},
    "e4m3, scales of pages": {"fp8": "page", "rotary": "halves", "s_q": (4, 4, 4)},
    "e4m3, ragged": {**_RAGGED, **_ALL, "fp8": "page"},
    "tree": {"tree": "shared", "s_q": (9, 9, 9)},
    "tree, window, rotary": {"tree": "each", "s_q": (7, 7, 7), "left": 6, "rotary": "halves"},
    "tree of many": {"tree": "each", "s_q": (40, 40), "before": (3, 0), "alibi": True},
    "tree, everything": {**_ALL, "tree": "each", "bias": True, "rotary": "halves", "s_q": (8, 8, 8), "left": 4},
    "tree, ragged": {**_RAGGED, **_ALL, "tree": "each", "rotary": "interleaved", "left": 5},
    "tree, e4m3": {"tree": "each", "s_q": (6, 6, 6), "fp8": "page"},
    # so long that an ordinary call on a CPU cuts the keys of a batch in other places than those of a sequence
    "batch-invariant": {"batch_invariant": True, "before": (9000, 5000, 0), "H_q": 2, "H_kv": 1},
    "batch-invariant tree, ragged": {
        **_RAGGED,
        **_ALL,
        "batch_invariant": True,
        "tree": "each",
        "before": (300, 0, 9, 5, 0),
    },
}
_EVERY_DTYPE = (
    "one token", "some tokens", "window of tokens", "odd head dims", "rotary of neighbours", "ragged, everything",
    "everything", "e4m3", "e4m3, ragged", "tree, ragged",
)  # fmt: skip


def quick_cache_grid() -> list[CacheCase]:
    """A few cases of the grid, for every dtype."""
    return [case for case in cache_grid() if case.id.split(" [")[0] in ("some tokens", "ragged, everything", "e4m3")]


def cache_grid(dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)) -> list[CacheCase]:
    """The grid: every case in fp32, contiguous and in pages of 8; a selection in other dtypes; every page size."""
    cases = []
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        for name, changes in _TABLE.items():
            if dtype == torch.float32 or name in _EVERY_DTYPE:
                pages = ((None, "contiguous"), (8, "pages of 8"))
                cases += [CacheCase(f"{name} [{kind}, {short}]", page_size=size, dtype=dtype, **changes)
                          for size, kind in pages if not (size is None and changes.get("before") == ())]  # fmt: skip
    for size in PAGE_SIZES:
        sizes: dict[str, Any] = {"page_size": size, "before": (300, 7, 255), "s_q": (1, 2, 2), "packed": True}
        cases.append(CacheCase(f"pages of {size}", left=70, **sizes))
        cases.append(CacheCase(f"pages of {size}, e4m3", fp8="page", **sizes))
    return cases


def make_cache_sample(case: CacheCase, device: torch.device | str = "cpu", seed: int = 0) -> CacheSample:
    """The sample of a case. The values depend on ``case`` and ``seed`` alone; they are drawn on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    scale = case.D_qk**-0.5 if case.scale is None else case.scale
    spec = AttentionSpec(scale, case.softcap, case.left, case.right)
    batch = len(case.s_q)
    longest_q, longest_new = (max(lengths, default=1) for lengths in (case.s_q, case.s_new))
    rows = (sum(case.s_q),) if case.packed else (batch, longest_q)
    rows_new = (sum(case.s_new),) if case.packed else (batch, longest_new)
    per_head = (batch if case.per_sequence else 1, case.H_q)
    k_cache, v_cache, block_table, scales = _caches(case, spec, draw)
    q = _normal((*rows, case.H_q * (2 if case.strided else 1), case.D_qk), draw, case.dtype)[..., : case.H_q, :]
    has_new = any(case.s_new) or (case.new == "queries" and not batch)
    cu = torch.tensor([0, *torch.tensor(case.s_q, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32)
    cos, sin = _tables(case) if case.rotary else (None, None)
    reach = max(case.s_kv, default=0) + 1
    inputs = CacheInputs(
        q=q, k_cache=k_cache, v_cache=v_cache,
        cache_lengths=torch.tensor(case.before, dtype=torch.int32),
        k=_normal((*rows_new, case.H_kv, case.D_qk), draw, case.dtype) if has_new else None,
        v=_normal((*rows_new, case.H_kv, case.D_v), draw, case.dtype) if has_new else None,
        block_table=block_table,
        cu_seqlens_q=cu if case.packed else None,
        rotary_cos=cos, rotary_sin=sin, k_scale=scales[0], v_scale=scales[1],
        bias=_normal((batch, case.H_q, rows[-1], reach), draw, case.dtype) if case.bias else None,
        alibi_slopes=_normal(per_head, draw, torch.float32).abs() / 4 if case.alibi else None,
        sinks=_normal(per_head, draw, case.dtype) if case.sinks else None,
        tree_mask=_trees(case) if case.tree else None,
        max_seqlen_q=longest_q,
        rotary_interleaved=case.rotary == "interleaved",
        batch_invariant=case.batch_invariant,
    )  # fmt: skip
    moved = {name: getattr(inputs, name) for name in kv_cache.CACHE_TENSORS}
    inputs = inputs.replace(**{name: x.to(device) for name, x in moved.items() if x is not None})
    kv_cache.check_cache_inputs(inputs, spec)
    return CacheSample(case, inputs, spec)


def _normal(shape: tuple[int, ...], draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


def _tables(case: CacheCase) -> tuple[Tensor, Tensor]:
    pairs = max(1, case.D_qk // 4)
    angles = torch.arange(_room(case), dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return angles.cos().float(), angles.sin().float()


def _trees(case: CacheCase) -> Tensor:
    """The words, with bits of tokens that there are not, which must be ignored."""
    longest, sequences = max(case.s_q), range(1 if case.tree == "shared" else len(case.s_q))
    bits = torch.ones(len(sequences), longest, longest, dtype=torch.bool)
    for b in sequences:
        rows = case.s_q[b]
        bits[b, :rows, :rows] = torch.from_numpy(ancestors(case.parents(b)))
    return words_of(torch.cat([bits[b, :rows] for b, rows in enumerate(case.s_q)]) if case.packed else bits)


def _positions(case: CacheCase, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the query rows ``[S_q, 1]`` and keys ``[S_kv]`` of a sequence, and the pairs that its tree keeps."""
    have, rows = case.before[b], torch.from_numpy(ancestors(case.parents(b)))
    of_new = have + rows.sum(1) - 1
    seen = torch.cat([torch.ones(len(rows), have, dtype=torch.bool), rows], 1)
    return of_new[:, None], torch.cat([torch.arange(have), of_new]), seen


def _kept(case: CacheCase, spec: AttentionSpec, b: int) -> Tensor:
    """``[S_q, S_kv]``: the pairs of a sequence that are kept."""
    s_q, s_kv = case.s_q[b], case.s_kv[b]
    if case.tree:
        i, j, seen = _positions(case, b)
        return seen if spec.left is None else seen & (j >= i - spec.left)
    return torch.as_tensor(keep(spec, torch.arange(s_q)[:, None], torch.arange(s_kv)[None], s_q, s_kv))


def _room(case: CacheCase) -> int:
    """The capacity of the cache in positions: more than are used."""
    longest = max(case.s_kv, default=0) + 3
    return longest if case.page_size is None else (-(-longest // case.page_size) + 1) * case.page_size


def _caches(case: CacheCase, spec: AttentionSpec, draw: torch.Generator) -> tuple[Tensor, Tensor, Any, Any]:
    """``(k_cache, v_cache, block_table, scales)``, with NaN and invalid page numbers wherever nothing may be read."""
    page_size, batch = case.page_size or _room(case), len(case.s_q)
    per_sequence = _room(case) // page_size
    owned = torch.randperm(batch * per_sequence + 3, generator=draw)[: batch * per_sequence].view(batch, per_sequence)
    if case.page_size is None:
        owned = torch.arange(batch)[:, None]
    pages = batch if case.page_size is None else batch * per_sequence + 3
    kept = torch.zeros(pages, page_size, dtype=torch.bool)
    in_use = torch.zeros(batch, per_sequence, dtype=torch.bool)
    for b, (have, s_kv) in enumerate(zip(case.before, case.s_kv, strict=True)):
        is_read = _kept(case, spec, b).any(0)
        entry, row = page_and_row(torch.arange(s_kv), page_size)
        kept[owned[b, entry], row] = is_read & (torch.arange(s_kv) < have)
        in_use[b, entry[is_read | (torch.arange(s_kv) >= have)]] = True
    stored = []
    for width in (case.D_qk, case.D_v):
        heads = case.H_kv * (2 if case.strided else 1)
        x = _normal((pages, page_size, heads, width), draw, case.dtype)
        x = x.where(kept[:, :, None, None], float("nan")).to(FP8 if case.fp8 else case.dtype)
        stored.append(x[:, :, ::2] if case.strided else x)
    shape = (pages if case.fp8 == "page" else 1, case.H_kv)
    scales = [0.02 + torch.rand(shape, generator=draw) / 50 if case.fp8 else None for _ in stored]
    table = None if case.page_size is None else owned.where(in_use, JUNK).int()
    return stored[0], stored[1], table, scales


# --- judgement ----------------------------------------------------------------------------------------------------


def measure_cache(backend: Backend | str, sample: CacheSample) -> list[Row]:
    """Run a sample and judge the stored rows and, by the rule of ``tolerance``, out and lse of each sequence.

    Args:
        backend: a backend or its name.
        sample: from ``make_cache_sample``; its caches are not changed.

    Raises:
        AssertionError: a result violates the contract in shape or dtype, a row that is not new was written, or a
            sequence of a batch-invariant call has other bits alone.
    """
    chosen = load(backend) if isinstance(backend, str) else backend
    inputs = _with_copies(sample.inputs)
    with poisoned():
        out, lse = chosen.attend_to_cache(inputs, sample.spec)
    assert out.shape == inputs.out_shape() and out.dtype == inputs.q.dtype and out.is_contiguous(), "out"
    assert lse.shape == inputs.lse_shape() and lse.dtype == reference.lse_dtype(inputs.q.dtype), "lse"
    assert lse.is_contiguous(), "lse is not contiguous"
    rows = _judge_stored(sample.inputs, inputs)
    filled = inputs.replace(k=None, v=None, cache_lengths=sample.inputs.cache_lengths + sample.inputs.new_lengths())
    exact, rounded = (_by_sequence(filled, sample, dtype) for dtype in (torch.float64, inputs.q.dtype))
    for b, (exact_sample, rounded_sample) in enumerate(zip(exact, rounded, strict=True)):
        found = {"out": _rows(out, b, sample.case), "lse": _rows_of_lse(lse, b, sample.case)}
        if sample.case.batch_invariant:
            own_out, own_lse = chosen.attend_to_cache(_alone(_with_copies(sample.inputs), b, sample.case), sample.spec)
            same = torch.equal(own_out.view_as(found["out"]), found["out"]) and torch.equal(
                own_lse.view_as(found["lse"]), found["lse"]
            )
            assert same, f"batch-invariant: sequence {b} has other bits alone"
        rows += judge_forward(found, exact_sample, rounded_sample, f" of {b}")
    return rows


def _with_copies(inputs: CacheInputs) -> CacheInputs:
    """The inputs with caches of their own, of the same strides, to which a call may append."""
    caches = {name: getattr(inputs, name) for name in ("k_cache", "v_cache")}
    return inputs.replace(**{name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
                             for name, x in caches.items()})  # fmt: skip


def _alone(inputs: CacheInputs, b: int, case: CacheCase) -> CacheInputs:
    """The call of sequence ``b`` by itself."""
    one, begin = slice(b, b + 1), sum(case.s_q[:b])
    rows = slice(begin, begin + case.s_q[b]) if case.packed else one
    ends = torch.tensor([0, case.s_q[b]], dtype=torch.int32, device=inputs.q.device) if case.packed else None
    given: dict[str, Any] = {"cu_seqlens_q": ends, "cache_lengths": inputs.cache_lengths[one], "q": inputs.q[rows]}
    of_rows = ("k", "v") if inputs.tree_mask is None or case.tree == "shared" else ("k", "v", "tree_mask")
    of_pages = (
        () if case.page_size is not None else ("k_cache", "v_cache", *(("k_scale", "v_scale") * (case.fp8 == "page")))
    )
    of_sequence = ("block_table", "bias", *(("alibi_slopes", "sinks") * case.per_sequence), *of_pages)
    for names, part in ((of_rows, rows), (of_sequence, one)):
        given |= {name: x[part] for name in names if (x := getattr(inputs, name)) is not None}
    return inputs.replace(**given)


def _judge_stored(before: CacheInputs, after: CacheInputs) -> list[Row]:
    """New rows differ from the formula in fp64 by a rounding; all others keep their bits."""
    if before.k is None:
        expected = {"k_cache": before.k_cache, "v_cache": before.v_cache}
        is_new = torch.zeros(before.k_cache.shape[:2], dtype=torch.bool, device=before.q.device)
    else:
        exact = _in_float64(before.replace(k_scale=None, v_scale=None))
        marks = exact.replace(k=torch.ones_like(exact.k), v=torch.ones_like(exact.v), rotary_cos=None, rotary_sin=None)  # type: ignore[arg-type]
        marks = marks.replace(k_cache=torch.zeros_like(exact.k_cache), v_cache=torch.zeros_like(exact.v_cache))
        kv_cache.append(exact)
        kv_cache.append(marks)
        expected, is_new = {"k_cache": exact.k_cache, "v_cache": exact.v_cache}, marks.k_cache[..., 0, 0] > 0
    rows = []
    for name, scale in (("k_cache", before.k_scale), ("v_cache", before.v_scale)):
        then, now = getattr(before, name), getattr(after, name)
        kept = [x.contiguous().view(torch.uint8)[~is_new] for x in (then, now)]
        assert torch.equal(*kept), f"{name}: rows were written that are not new"
        wide = torch.ones(1, device=now.device).double() if scale is None else scale[:, None, :, None].double()
        limit = torch.finfo(now.dtype).max * wide
        goal = expected[name].double().clamp(-limit, limit)[is_new]
        error = ((now.double() * wide)[is_new] - goal).abs()
        bound = torch.zeros_like(goal)
        if name == "k_cache" and before.rotary_cos is not None:
            bound = 3 * torch.finfo(before.q.dtype).eps * goal.abs().amax(-1, keepdim=True).expand_as(goal)
        if before.is_fp8:
            steps = FP8_RELATIVE * goal.abs() + FP8_ABSOLUTE * wide.expand_as(expected[name])[is_new]
            bound = bound * (1 + FP8_RELATIVE) + steps * (1 + 1e-6)
        at = int((error - bound).argmax()) if error.numel() else None  # the number that is furthest off
        found, allowed = (0.0, 0.0) if at is None else (float(x.flatten()[at]) for x in (error, bound))
        rows.append(Row(f"{name} max", found, 0.0, allowed, found <= allowed))
    return rows


def _in_float64(inputs: CacheInputs) -> CacheInputs:
    names = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "bias", "alibi_slopes", "sinks")
    given = {name: getattr(inputs, name) for name in names}
    return inputs.replace(**{name: x.double() for name, x in given.items() if x is not None})


def _by_sequence(inputs: CacheInputs, sample: CacheSample, dtype: torch.dtype) -> list[Sample]:
    """Each sequence as a dense problem of its own, read from a full cache."""
    given = _in_float64(inputs) if dtype == torch.float64 else inputs
    q = kv_cache.rotated_queries(given.replace(k_scale=None, v_scale=None), sample.spec)
    samples = []
    for b, (s_q, s_kv) in enumerate(zip(sample.case.s_q, sample.case.s_kv, strict=True)):
        entry, row = page_and_row(torch.arange(s_kv), inputs.page_size)
        page = torch.full_like(row, b) if inputs.block_table is None else inputs.block_table.cpu()[b, entry].long()
        page = page.clamp(min=0)  # entries before the window may be anything, and are masked
        k = kv_cache.read(inputs.k_cache, inputs.k_scale, page, row, torch.float64).to(dtype)[None]
        v = kv_cache.read(inputs.v_cache, inputs.v_scale, page, row, torch.float64).to(dtype)[None]
        alibi, sinks = (x if x is None or x.shape[0] == 1 else x[b : b + 1] for x in (given.alibi_slopes, given.sinks))
        bias = None if given.bias is None else given.bias[b : b + 1, ..., :s_kv]
        one = Inputs(_rows(q, b, sample.case)[None], k, v, bias, alibi_slopes=alibi, sinks=sinks,
                     max_seqlen_q=s_q, max_seqlen_kv=s_kv)  # fmt: skip
        spec = sample.spec
        if sample.case.tree:
            one, spec = _as_mask(one, b, sample), AttentionSpec(spec.scale, spec.softcap)
        case = Case(sample.case.id, dtype=sample.case.dtype, needs=())
        samples.append(Sample(case, one, spec, torch.zeros(one.out_shape(), dtype=dtype, device=k.device), None))
    return samples


def _as_mask(inputs: Inputs, b: int, sample: CacheSample) -> Inputs:
    """The dense problem of a sequence, its tree and window as a mask and its ALiBi as a bias."""
    i, j, _ = _positions(sample.case, b)
    bias = inputs.bias
    if inputs.alibi_slopes is not None:
        alibi = -inputs.alibi_slopes.double()[..., None, None] * (j - i).abs().to(inputs.q.device)
        bias = alibi if bias is None else bias.double() + alibi
    kept = _kept(sample.case, sample.spec, b).to(inputs.q.device)
    return inputs.replace(mask=kept[None, None], bias=bias, alibi_slopes=None)


def _rows(x: Tensor, b: int, case: CacheCase) -> Tensor:
    """The rows of sequence ``b``, of ``(B, S, H, D)`` or packed ``(T, H, D)``."""
    return x[sum(case.s_q[:b]) : sum(case.s_q[: b + 1])] if case.packed else x[b]


def _rows_of_lse(lse: Tensor, b: int, case: CacheCase) -> Tensor:
    return lse[:, sum(case.s_q[:b]) : sum(case.s_q[: b + 1])] if case.packed else lse[b]
