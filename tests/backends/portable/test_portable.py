"""The portable backend: coverage of its plan, choice of the executor, parts of any size, memory.

core/test_forward_backward.py runs the grid.
"""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import intervals
from fastattn.backends.portable import BACKEND, flash, padded, plan, terms, tiles
from fastattn.problem import Inputs
from fastattn.spec import ANCHORS, AttentionSpec, keep, kept_pairs
from fastattn.testing import Case, assert_within, grid, make, measure

BANDS = list(itertools.product((None, 0, 3, 40), (None, 0, 5, 60)))
LENGTHS = [(1, 1), (1, 30), (30, 1), (16, 16), (37, 80), (80, 37)]


def dense(s_q, s_kv, batch=1, **more):
    q, k = torch.randn(batch, s_q, 2, 8), torch.randn(batch, s_kv, 2, 8)
    return Inputs(q, k, k, max_seqlen_q=s_q, max_seqlen_kv=s_kv, **more)


def kept_inside(block, spec):
    i, j = torch.arange(*block.rows)[:, None], torch.arange(*block.keys)[None]
    return keep(spec, i, j, block.s_q, block.s_kv)


def spread(call):
    """The blocks that a call stands for."""
    block = call.block
    for n in range(call.count):
        yield block.replace(q_start=block.q_start + n * call.q_step, kv_start=block.kv_start + n * call.kv_step)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize(("left", "right"), BANDS)
def test_blocks_hold_each_kept_pair_once_and_nothing_idle(left, right, anchor, monkeypatch):
    monkeypatch.setattr(plan, "BAND_ROWS", 12)
    spec = AttentionSpec(1.0, left=left, right=right, anchor=anchor)
    for (s_q, s_kv), max_rows in itertools.product(LENGTHS, (None, 7, 1)):
        covered = torch.zeros(s_q, s_kv, dtype=torch.int)
        for block in plan.cut(plan.whole_batch(dense(s_q, s_kv)), spec, max_rows):
            inside = kept_inside(block, spec)
            assert inside.any(0).all() and inside.any(1).all(), "a row or a key that does nothing"
            assert max_rows is None or block.size[1] <= max_rows
            covered[slice(*block.rows), slice(*block.keys)] += inside
        assert covered.equal(kept_inside(plan.whole_batch(dense(s_q, s_kv)), spec).int())


@pytest.mark.parametrize("anchor", ANCHORS)
def test_shapes_say_what_the_band_does(anchor):
    seen = set()
    for (left, right), (s_q, s_kv) in itertools.product(BANDS, LENGTHS):
        spec = AttentionSpec(1.0, left=left, right=right, anchor=anchor)
        for block in plan.cut(plan.whole_batch(dense(s_q, s_kv)), spec, 10):
            inside, shape = kept_inside(block, spec), plan.shape(block, spec)
            seen.add(shape)
            triangle = torch.ones_like(inside).tril()
            assert inside.all() == (shape == "full")
            assert shape == "full" or inside.equal(triangle) == (shape == "causal")
    assert seen == {"full", "causal", "band"}


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_calls_stand_for_the_blocks_they_merge(batch):
    inputs, spec = dense(1000, 1000, batch), AttentionSpec(1.0, left=70, right=30)
    todo = flash.planned(inputs, spec)
    pairs = torch.zeros(batch, 1000, 1000, dtype=torch.int8)
    for block in itertools.chain.from_iterable(spread(call) for call in todo):
        rows = slice(block.q_begin, block.q_begin + block.size[1])
        keys = slice(block.kv_begin, block.kv_begin + block.size[2])
        pairs[slice(*block.batch), rows, keys] += kept_inside(block, spec)
    assert pairs.sum() == batch * kept_pairs(spec, 1000, 1000) and pairs.max() == 1
    assert len(todo) <= 3 * batch and len(todo) <= len(plan.cut(plan.whole_batch(inputs), spec))


def test_a_call_holds_no_more_keys_than_allowed(monkeypatch):
    monkeypatch.setattr(flash, "MAX_KEYS", 2000 * 2 * 8)
    todo = flash.planned(dense(4000, 4000), AttentionSpec(1.0, left=100, right=0))
    assert max(call.count for call in todo) == 2000 // (plan.BAND_ROWS + 100)


def test_work_is_near_what_the_band_keeps():
    spec = AttentionSpec(1.0, left=256, right=0)
    todo = flash.planned(dense(4096, 4096), spec)
    work = sum(call.count * call.block.size[1] * call.block.size[2] for call in todo)
    assert work < 1.8 * kept_pairs(spec, 4096, 4096) < 0.13 * 4096 * 4096


def documents(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def test_documents_of_equal_length_are_one_call():
    boundaries = torch.arange(0, 65, 8, dtype=torch.int32)
    x = torch.randn(64, 2, 8)
    cu_seqlens = {"cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries}
    packed = Inputs(x, x, x, max_seqlen_q=8, max_seqlen_kv=8, **cu_seqlens)
    ids = documents(*[8] * 8)
    segments = dense(64, 64, batch=3, segment_ids_q=ids, segment_ids_kv=ids)
    causal = AttentionSpec(1.0, right=0)
    (call,) = flash.planned(packed, causal)
    assert (call.count, call.q_step, call.kv_step, call.block.size) == (8, 8, 8, (1, 8, 8))
    assert plan.shape(call.block, causal) == "causal"
    assert [(call.count, call.block.size) for call in flash.planned(segments, causal)] == [(8, (1, 8, 8))] * 3


def test_segments_become_regions():
    ids = documents(3, 5, 2)
    regions = plan.regions(dense(10, 10, batch=4, segment_ids_q=ids.expand(4, -1), segment_ids_kv=ids))
    assert [(r.batch, r.rows, r.keys, r.is_exact) for r in regions] == [
        ((0, 4), (0, 3), (0, 3), True),
        ((0, 4), (3, 8), (3, 8), True),
        ((0, 4), (8, 10), (8, 10), True),
    ]
    each = torch.cat([documents(4, 6), documents(10)])
    by_entry = plan.regions(dense(10, 10, batch=2, segment_ids_q=each, segment_ids_kv=each))
    assert [(r.batch, r.sequence, r.rows) for r in by_entry] == [
        ((0, 1), 0, (0, 4)),
        ((0, 1), 0, (4, 10)),
        ((1, 2), 1, (0, 10)),
    ]
    many = each.repeat(plan.SHORT_ENTRIES, 1)
    (together,) = plan.regions(dense(10, 10, batch=len(many), segment_ids_q=many, segment_ids_kv=many))
    assert together.size == (len(many), 10, 10) and not together.is_exact
    scattered = torch.tensor([[0, 1, 0, 1, 1, 0, 2, 2, 2, 0]])
    (region,) = plan.regions(dense(10, 10, segment_ids_q=scattered, segment_ids_kv=scattered))
    assert region.size == (1, 10, 10) and not region.is_exact


# --- who computes ---------------------------------------------------------------------------------------------------


class Spy:
    def __init__(self, monkeypatch):
        self.kernel, self.tiles, self.pairs = 0, 0, 0
        kernel, scores = flash.flash_on_cpu, tiles.finished_scores

        def spied_kernel(q, k, *args, **options):
            self.kernel += 1
            self.pairs += q.shape[0] * q.shape[2] * k.shape[2]
            return kernel(q, k, *args, **options)

        def spied_scores(q, inputs, spec, tile, kept):
            self.tiles += 1
            self.pairs += tile.size[0] * tile.size[1] * tile.size[2]
            return scores(q, inputs, spec, tile, kept)

        monkeypatch.setattr(flash, "flash_on_cpu", spied_kernel)
        monkeypatch.setattr(tiles, "finished_scores", spied_scores)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


@pytest.mark.parametrize(
    ("changes", "kernel_calls"),
    [
        ({}, 1),
        ({"right": 0}, 1),
        ({"right": 0, "H_q": 4}, 1),
        ({"right": 0, "S_q": 1}, 1),
        ({"right": 0, "anchor": "upper_left", "S_q": 20}, 1),
        ({"D_qk": 24, "D_v": 40, "sinks": True, "dlse": True}, 1),
        ({"bias": (1, 2, 37, 37)}, 1),
        ({"mask": "padding", "alibi": True}, 1),
        ({"left": 100, "right": 0, "S_q": 1000, "S_kv": 1000, "B": 1}, 3),
        ({"softcap": 2.0}, 0),
        ({"dropout_p": 0.5}, 0),
        ({"scale": -1.0}, 0),
    ],
)
def test_the_kernel_runs_where_it_can(spy, changes, kernel_calls):
    sample = make(Case(id="who", **changes))
    BACKEND.forward(sample.inputs, sample.spec)
    assert spy.kernel == kernel_calls
    assert (spy.tiles > 0) == (kernel_calls == 0)


def test_a_bias_gradient_is_left_to_the_tiles(spy):
    sample = make(Case(id="dbias", bias=(1, 2, 37, 37)))
    out, lse, low = BACKEND.forward(sample.inputs, sample.spec)
    for needs, has_tiles in ((("q", "k", "v"), False), (("bias",), True)):
        spy.tiles = 0
        grads = BACKEND.backward(sample.dout, None, out, lse, low, sample.inputs, sample.spec, needs)
        assert (
            (spy.tiles > 0) == has_tiles and (grads.dbias is not None) == has_tiles and (grads.dq is None) == has_tiles
        )


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_masks_leave_empty_is_not_computed(spy, softcap):
    """A boolean mask and scattered segments that are block diagonal in fact."""
    blocks = torch.arange(2048) // 256
    mask = (blocks[:, None] == blocks[None])[None, None]
    spec = AttentionSpec(0.3, softcap=softcap)
    x = dense(2048, 2048)
    BACKEND.forward(x.replace(mask=mask), spec)
    assert 8 * 256 * 256 <= spy.pairs <= 2 * 8 * 256 * 256 + 2048 * 512
    spy.pairs = 0
    ids = (blocks % 4)[None]
    BACKEND.forward(x.replace(segment_ids_q=ids, segment_ids_kv=ids, mask=mask), spec)
    assert spy.pairs <= 2 * 8 * 256 * 256 + 2048 * 512
    spy.pairs = 0
    BACKEND.forward(x.replace(intervals=intervals.documents([256] * 8)[None, None]), spec)
    assert 8 * 256 * 256 <= spy.pairs <= 2 * 8 * 256 * 256 + 2048 * 512


# --- right whatever the sizes of the parts ----------------------------------------------------------------------------


@pytest.fixture(params=[(8, 8, 1 << 7), (64, 16, 1 << 12), (5, 128, 1 << 20)], ids=str)
def small_parts(request, monkeypatch):
    rows, keys, elements = request.param
    monkeypatch.setattr(tiles, "TILE", {"cpu": (rows, keys)})
    monkeypatch.setattr(tiles, "MAX_SCORES", {"cpu": elements})
    monkeypatch.setattr(flash, "MAX_MASK", elements)
    monkeypatch.setattr(flash, "MAX_KEYS", elements)
    monkeypatch.setattr(plan, "BAND_ROWS", rows)


QUICK = [case for case in grid([torch.float32, torch.bfloat16], quick=True) if case.lengths is None] + [
    Case(id="scattered", segments=3, S_q=70, S_kv=70, left=30, B=3),
    Case(id="short rows", segments=3, S_q=40, S_kv=40, B=9, H_q=4, right=0, sinks=True, dlse=True),
    Case(id="intervals", intervals="blocks", S_q=70, S_kv=90, B=3, H_q=4, right=0, dlse=True),
    Case(id="row mask", mask="empty rows", S_q=70, S_kv=70, right=0, dlse=True),
    Case(id="alibi by sequence", alibi=True, per_sequence=True, S_q=40, S_kv=70, right=0),
    Case(id="long window", left=6, right=3, S_q=300, S_kv=300, B=3, H_q=4),
    Case(id="equal documents", lengths=((30, 30),) * 5, left=9, right=0, alibi=True),
]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.id)
def test_any_size_of_parts(case):
    sample = make(case)
    if case.id == "scattered":
        ids = torch.arange(70)[None] * 7 % 3
        sample.inputs.segment_ids_q.copy_(ids)
        sample.inputs.segment_ids_kv.copy_(ids)
    assert_within(measure(BACKEND, sample))


@pytest.mark.parametrize("case", grid([torch.float32]), ids=lambda case: case.id)
def test_tiles_serve_what_the_kernel_does(case, monkeypatch):
    monkeypatch.setattr(flash, "serves", lambda *_: False)
    monkeypatch.setattr(tiles, "TILE", {"cpu": (32, 48)})
    assert_within(measure(BACKEND, make(case)))


PACKED = [case for case in grid([torch.float32]) if case.lengths is not None]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_sequences_without_reading_their_boundaries(case, monkeypatch):
    """As on an accelerator, where reading them would wait for it."""
    monkeypatch.setattr(flash, "serves", lambda *_: False)
    monkeypatch.setattr(
        padded, "is_needed", lambda inputs, spec: inputs.is_packed and not padded._must_shift_dropout(inputs, spec)
    )
    sample = make(case)
    if not padded._must_shift_dropout(sample.inputs, sample.spec):
        monkeypatch.setattr(Inputs, "boundaries", lambda self: pytest.fail("the boundaries were read"))
    assert_within(measure(BACKEND, sample))


@pytest.mark.parametrize(
    "case",
    [c for c in grid([torch.float32]) if (c.segments or c.mask or c.intervals) and c.lengths is None],
    ids=lambda case: case.id,
)
def test_masks_as_data_without_reading_them(case, monkeypatch):
    """As on an accelerator: no region is made of them, and unused keys are zeroed whether they hold NaN or not."""
    monkeypatch.setattr(flash, "serves", lambda *_: False)
    monkeypatch.setattr(tiles, "_regions", lambda inputs: [plan.whole_batch(inputs)])
    assert_within(measure(BACKEND, make(case)))


@pytest.mark.parametrize("executor", ["kernel", "tiles"])
@pytest.mark.parametrize("by_head", [False, True])
def test_keys_that_nothing_keeps_may_hold_nan(executor, by_head, monkeypatch):
    if executor == "tiles":
        monkeypatch.setattr(flash, "serves", lambda *_: False)
    clean = dense(40, 40, batch=2)
    mask = torch.rand(2, 2 if by_head else 1, 40, 40) > 0.5
    mask[0, :, :, 7] = False
    mask[:, :, :20, 3] = False  # below, the band drops it
    spec = AttentionSpec(0.3, right=None if by_head else 16)
    mask[:, :, 20:, 3] = False
    dirty = clean.replace(k=clean.k.clone(), v=clean.v.clone())
    for x in (dirty.k, dirty.v):
        x[0, 7], x[:, 3] = float("nan"), float("inf")
    results = []
    for inputs in (clean, dirty):
        inputs = inputs.replace(mask=mask)
        out, lse, low = BACKEND.forward(inputs, spec)
        grads = BACKEND.backward(torch.ones_like(out), None, out, lse, low, inputs, spec, ("q", "k", "v"))
        results.append((out, lse, grads.dq, grads.dk, grads.dv))
    for clean, dirty in zip(*results, strict=True):  # torch's kernel computes the one, tiles the other
        torch.testing.assert_close(dirty, clean)
    assert not results[1][3][0, 7].any() and not results[1][4][:, 3].any()


def test_a_nan_that_is_kept_is_seen():
    inputs = dense(10, 10)
    inputs.k[0, 4] = float("nan")
    out, *_ = BACKEND.forward(inputs.replace(mask=torch.ones(1, 1, 1, 10, dtype=torch.bool)), AttentionSpec(1.0))
    assert out.isnan().all()


def test_an_honest_zero_lse_is_not_an_empty_row():
    """With one kept key and q = 0, lse is exactly 0, which is also what the kernel says of empty rows."""
    inputs = dense(6, 6)
    mask = torch.eye(6, dtype=torch.bool)[None, None].clone()
    mask[..., 4, :] = False
    inputs.q.zero_()
    for more in ({"mask": mask}, {"bias": torch.where(mask, 0.0, float("-inf"))}):
        out, lse, _ = BACKEND.forward(inputs.replace(**more), AttentionSpec(1.0))
        assert lse[0, 0].tolist() == [0, 0, 0, 0, float("-inf"), 0]
        assert not out[:, 4].any() and torch.equal(out[:, 5], inputs.v[:, 5])


def test_left_padding_under_a_causal_band_empties_rows():
    inputs = dense(8, 8, mask=(torch.arange(8) >= 3)[None, None, None])
    out, lse, low = BACKEND.forward(inputs, AttentionSpec(1.0, right=0))
    assert lse[0, 0].isinf().tolist() == [True] * 3 + [False] * 5 and not out[:, :3].any()
    grads = BACKEND.backward(
        torch.ones_like(out), torch.ones_like(lse), out, lse, low, inputs, AttentionSpec(1.0, right=0), ("q", "k", "v")
    )
    assert not grads.dq[:, :3].any() and not grads.dk[:, :3].any() and grads.dq.isfinite().all()


@pytest.mark.parametrize("how", ["rows", "heads", "batch", "overlapping"])
def test_strides_that_blas_cannot_address(how):
    inputs = dense(20, 20, batch=2)
    odd = {
        "rows": inputs.k[:, :1].expand(2, 20, 2, 8),
        "heads": inputs.k[:, :, :1].expand(2, 20, 2, 8),
        "batch": inputs.k[:1].expand(2, 20, 2, 8),
        "overlapping": torch.randn(400).as_strided((2, 20, 2, 8), (100, 2, 50, 1)),
    }[how]
    for spec in (AttentionSpec(0.3, right=0), AttentionSpec(0.3, left=5)):
        found = BACKEND.forward(inputs.replace(k=odd, v=odd), spec)
        same = BACKEND.forward(inputs.replace(k=odd.contiguous(), v=odd.contiguous()), spec)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, same, strict=True))


@pytest.mark.parametrize("changes", [{}, {"left": 9}, {"softcap": 3.0}, {"bias": (1, 1, 37, 37)}], ids=str)
def test_runs_repeat_bit_for_bit(changes):
    sample = make(Case(id="again", H_q=4, **changes))

    def run():
        out, lse, low = BACKEND.forward(sample.inputs, sample.spec)
        g = BACKEND.backward(sample.dout, None, out, lse, low, sample.inputs, sample.spec, sample.needs)
        return [x for x in (out, lse, g.dq, g.dk, g.dv, g.dbias) if x is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that lived at once in storages which torch ops made while inside."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.users = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.note(x)
        return result

    def note(self, x):
        storage = x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if self.users.get(key, 0) == 0:
            self.live += size
        self.users[key] = self.users.get(key, 0) + 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(x, self.forget, key, size)

    def forget(self, key, size):
        self.users[key] -= 1
        if self.users[key] == 0:
            self.live -= size


def peak_bytes(changes, length):
    case = Case(id="memory", B=1, S_q=length, S_kv=length, D_qk=16, D_v=16, **changes)
    sample = make(case)
    if case.segments:
        sample.inputs.segment_ids_q.copy_((torch.arange(length) * 7 % 5)[None])
    with LiveBytes() as bytes_:
        out, lse, low = BACKEND.forward(sample.inputs, sample.spec)
        BACKEND.backward(sample.dout, None, out, lse, low, sample.inputs, sample.spec, sample.needs)
    return bytes_.peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"right": 0},
        {"left": 50, "right": 0},
        {"mask": "padding"},
        {"alibi": True},
        {"sinks": True, "left": 30},
        {"segments": 5},
        {"intervals": "random"},
        {"softcap": 3.0},
        {"dropout_p": 0.1, "left": 20, "right": 20},
        {"bias": (1, 1, 1, None), "right": 0},
    ],
    ids=str,
)
def test_memory_grows_with_the_length_and_not_its_square(changes, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {"cpu": (32, 64)})
    monkeypatch.setattr(tiles, "MAX_SCORES", {"cpu": 1 << 12})
    monkeypatch.setattr(flash, "MAX_MASK", 1 << 12)
    monkeypatch.setattr(flash, "MAX_KEYS", 1 << 12)
    monkeypatch.setattr(plan, "BAND_ROWS", 32)
    peaks = []
    for length in (512, 1024):
        sized = {name: (1, 1, 1, length) if name == "bias" else value for name, value in changes.items()}
        peaks.append(peak_bytes(sized, length))
    assert peaks[1] < 2.3 * peaks[0]
    assert peaks[1] < 1024 * 1024 * 2 * 4, "as much as the scores of both heads"


def test_terms_are_as_large_as_they_must_be():
    """Masks that all heads share are not blown up for each of them."""
    inputs = dense(64, 64, batch=3, mask=torch.ones(3, 1, 1, 64, dtype=torch.bool), bias=torch.zeros(1, 2, 64, 1))
    (block,) = plan.cut(plan.whole_batch(inputs), AttentionSpec(1.0))
    assert terms.kept(inputs, AttentionSpec(1.0), block).shape == (3, 1, 1, 64)
    assert terms.bias(inputs, AttentionSpec(1.0), block).shape == (1, 2, 64, 1)
