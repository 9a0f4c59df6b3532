"""Run by test_parallel.py as its own program: every check on gloo ranks, results to a JSON file.

    python ranks.py RESULTS WORLD_SIZE

Every rank runs every check (groups of two and three: the first ranks) and notes "ok" or a traceback for it.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
import tempfile
import traceback
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.integrations.context_parallel import SequenceSharding, ring_attention, sharded, ulysses_attention
from fastattn.integrations.context_parallel_sharding import blocks
from fastattn.integrations.tensor_parallel import register_sharding_rules
from fastattn.spec import AttentionSpec, kept_pairs

B, S, H_Q, H_KV, D = 2, 48, 12, 4, 8
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # fp64
BANDS = {
    "full": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (5, 0)},
    "wide window": {"window": (20, 3)},
    "one-sided window": {"window": (None, 2)},
}
FUNCTIONS = (ring_attention, ulysses_attention)
WITH_GRADIENT = ("bias", "sinks")
DOCUMENTS = (9, 1, 0, 21, 2)  # 33 tokens, which no number of ranks divides


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(length=S):
    """Options beside the band, with tensors of the whole row."""
    bias, segments = draw(1, H_Q, length, length, seed=10), torch.arange(length)[None].expand(B, -1) // 7
    dropout = {"dropout_p": 0.4, "rng_state": torch.tensor([5, 6])}
    slopes, sinks = {"alibi_slopes": draw(H_Q, seed=14).abs()}, {"sinks": draw(H_Q, seed=13)}
    return {
        "sinks": sinks | {"causal": True},
        "bias by head": {"bias": bias},
        "bias by batch": {"bias": draw(B, 1, 1, length, seed=11), "causal": True},
        "mask": {"mask": draw(1, 1, length, length, seed=12) > -1, "window": (20, 3)},
        "mask by head": {"mask": draw(H_Q, 1, length, seed=12) > -1},
        "segments": {"segment_ids": segments, "causal": True},
        "ALiBi": slopes,
        "ALiBi, causal": slopes | {"causal": True, "softcap": 2.0},
        "ALiBi by batch": {"alibi_slopes": draw(B, H_Q, seed=14).abs(), "window": (9, 2)},
        "dropout": dropout | {"causal": True},
        "all of it": slopes | dropout | sinks | {"bias": bias, "segment_ids": segments, "softcap": 2.0},
    }  # fmt: skip


def inputs(heads_kv=H_KV, length=S):
    """q, k, v and the gradient of out: the same on every rank."""
    shapes = ((H_Q, D), (heads_kv, D), (heads_kv, D + 2), (H_Q, D + 2))
    return [draw(B, length, *shape, seed=n) for n, shape in enumerate(shapes)]


def alone(q, k, v, dout, attend=fastattn.attention, **options):
    """What one process computes: out and the gradients, those of the options by name."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options |= {name: options[name].clone().requires_grad_() for name in WITH_GRADIENT if name in options}
    leaves += [options[name] for name in WITH_GRADIENT if name in options]
    out = attend(*leaves[:3], **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def in_documents(q, k, v, lengths, **options):
    """The rows of a batch, document by document."""
    ends = torch.tensor([0, *lengths * B]).cumsum(0).int()
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths)}
    if options.get("alibi_slopes") is not None and options["alibi_slopes"].dim() == 2:
        options["alibi_slopes"] = options["alibi_slopes"].repeat_interleave(len(lengths), 0)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return fastattn.attention_varlen(*flat, ends, ends, **longest, **options).unflatten(0, (B, -1))


def context_parallel(function, sharding, heads_kv, length=S, attend=fastattn.attention, **options):
    q, k, v, dout = inputs(heads_kv, length)
    mine = dict(options)
    for name in ("bias", "mask"):
        if name in options and options[name].shape[-2] > 1:
            mine[name] = sharding.shard(options[name], -2)
    if "segment_ids" in options:
        mine["segment_ids"] = sharding.shard(options["segment_ids"])
    extras = [name for name in WITH_GRADIENT if name in options]
    mine |= {name: mine[name].clone().requires_grad_() for name in extras}
    leaves = [sharding.shard(x).requires_grad_() for x in (q, k, v)]
    out = function(*leaves, sharding, **mine)
    grads = torch.autograd.grad(out, leaves + [mine[name] for name in extras], sharding.shard(dout))
    expected = alone(q, k, v, dout, attend, **options)
    for found, wanted in zip((out, *grads[:3]), expected, strict=False):
        torch.testing.assert_close(sharding.unshard(found), wanted, **EXACT)
    for name, found, wanted in zip(extras, grads[3:], expected[4:], strict=True):
        if mine[name].shape == options[name].shape:  # shared by the rows of all ranks
            dist.all_reduce(found, group=sharding.group)
        else:
            found = sharding.unshard(found, -2)
        torch.testing.assert_close(found, wanted, **EXACT)


def checks_context_parallel(group, size):
    def check(label, function, sharding, heads_kv=size, **options):
        return f"{function.__name__} {label}, {size} ranks", lambda: context_parallel(
            function, sharding, heads_kv, **options
        )

    sharding, in_order = SequenceSharding(group), SequenceSharding(group, head_tail=False)
    packed = SequenceSharding(group, lengths=DOCUMENTS)
    length, documents = sum(DOCUMENTS), torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))
    more = {"causal": True, "scale": 0.4, "softcap": 2.0, "backend": "eager"}
    for function in FUNCTIONS:
        for name, band in BANDS.items():
            yield check(f"{name}, one kv head", function, sharding, 1, **band)
        yield check("causal window in order", function, in_order, **BANDS["causal window"])
        yield check("other options", function, sharding, **more)
        for name, options in features().items():
            yield check(name, function, sharding, **options)
        uneven = SequenceSharding(group, lengths=(length,))
        yield check("one document of any length", function, uneven, length=length, **features(length)["all of it"])
        for name in ("sinks", "ALiBi, causal", "ALiBi by batch", "dropout"):
            options = features(length)[name] | {"attend": lambda *x, **o: in_documents(*x, DOCUMENTS, **o)}
            yield check(f"documents, {name}", function, packed, length=length, **options)
        for name in ("bias by head", "mask", "segments"):
            yield (
                f"{function.__name__} documents, {name}, {size} ranks",
                lambda f=function, n=name: documents_with(f, packed, length, documents, features(length)[n]),
            )
    yield f"dropout draws on the first rank, {size} ranks", lambda: dropout_from_the_generator(sharding)
    yield f"half precision, {size} ranks", lambda: half_precision(sharding)
    yield f"only what the band keeps is computed, {size} ranks", lambda: skips_what_is_masked(sharding)
    yield f"documents are balanced each by itself, {size} ranks", lambda: balances_documents(group)
    yield f"memory of the rank's tokens, {size} ranks", lambda: takes_the_memory_of_its_tokens(group, size)
    yield f"shard and unshard, {size} ranks", lambda: shard_and_unshard(group)
    yield f"wrong arguments, {size} ranks", lambda: wrong_arguments(sharding)
    yield f"a model inside sharded, {size} ranks", lambda: model_inside_sharded(sharding)


def documents_with(function, sharding, length, documents, options):
    """Documents and what packed sequences do not have, against segments of a dense row."""

    def attend(q, k, v, segment_ids=None, **others):
        segments = documents if segment_ids is None else documents * 1000 + segment_ids
        return fastattn.attention(q, k, v, segment_ids=segments.expand(B, -1), **others)

    context_parallel(function, sharding, sharding.size, length, attend, **options)


def dropout_from_the_generator(sharding):
    q, k, v, _ = inputs()
    torch.manual_seed(7)
    expected = fastattn.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(7 + sharding.rank)
    out = ring_attention(*(sharding.shard(x) for x in (q, k, v)), sharding, dropout_p=0.5)
    torch.testing.assert_close(sharding.unshard(out), expected, **EXACT)


def half_precision(sharding):
    q, k, v, _ = (x.bfloat16() for x in inputs())
    options = {"causal": True, "alibi_slopes": 3 * draw(H_Q, seed=14).abs()}  # row terms larger than the scores
    out = sharding.unshard(ring_attention(*(sharding.shard(x) for x in (q, k, v)), sharding, **options))
    assert out.dtype == torch.bfloat16
    exact = fastattn.attention(q.double(), k.double(), v.double(), **options)
    one_process = (fastattn.attention(q, k, v, **options) - exact).abs().max()
    assert (out - exact).abs().max() <= 2 * one_process


def work(sharding, length, rank, spec):
    """Pairs that a rank computes."""
    mine = sharding.runs_in_documents(length, rank)
    found = [
        block
        for source in range(sharding.size)
        for block in blocks(mine, sharding.runs_in_documents(length, source), spec)
    ]
    sizes = [(b.rows.stop - b.rows.start, b.keys.stop - b.keys.start, b.spec) for b in found]
    assert all(spec.left is None or spec.left >= 0 for *_, spec in sizes)
    assert all(spec.right is None or spec.right >= 0 for *_, spec in sizes)
    return sum(kept_pairs(spec, rows, keys) for rows, keys, spec in sizes)


def skips_what_is_masked(sharding):
    """Causal work is the same on every rank when dealt out head and tail; in order it is not."""
    causal, window = AttentionSpec(1.0, right=0), AttentionSpec(1.0, left=5, right=0)
    ordered = SequenceSharding(sharding.group, False)
    packed = SequenceSharding(sharding.group, lengths=DOCUMENTS)
    for spec in (causal, window, AttentionSpec(1.0), AttentionSpec(1.0, left=2, right=9)):
        for dealt in (sharding, ordered, packed):
            lengths = dealt.lengths or (S,)
            by_rank = [work(dealt, sum(lengths), rank, spec) for rank in range(sharding.size)]
            assert sum(by_rank) == sum(kept_pairs(spec, n, n) for n in lengths), "every kept pair once"
    balanced, in_order = ({work(x, S, rank, causal) for rank in range(x.size)} for x in (sharding, ordered))
    assert len(balanced) == 1 and len(in_order) == sharding.size


def balances_documents(group):
    """Of documents of any length no rank has 5 % more work or tokens than the mean; nor of many single tokens."""
    causal, random = AttentionSpec(1.0, right=0), torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(1, 400, (40,), generator=random).tolist())
    sharding = SequenceSharding(group, lengths=lengths)
    for numbers in (
        [work(sharding, sum(lengths), rank, causal) for rank in range(sharding.size)],
        [sharding.num_tokens(sum(lengths), rank) for rank in range(sharding.size)],
    ):
        assert max(numbers) <= 1.05 * sum(numbers) / sharding.size, numbers
    single = SequenceSharding(group, lengths=(1,) * 24)
    assert {single.num_tokens(24, rank) for rank in range(sharding.size)} == {24 // sharding.size}


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return found


def takes_the_memory_of_its_tokens(group, size):
    """In units of this rank's q, k, v and out: 4 of them forward and 8 backward, whatever the number of ranks."""
    sharding = SequenceSharding(group)
    for length in (48, 192):
        q = torch.randn(1, length // size, 4, 32)
        leaves = [q.clone().requires_grad_() for _ in range(3)]
        unit = 4 * q.nbytes
        with LiveBytes() as forward:
            out = ring_attention(*leaves, sharding, causal=True)
        with LiveBytes() as backward:
            out.sum().backward()
        assert q.nbytes < forward.peak <= 4 * unit, (length, forward.peak / unit)
        assert q.nbytes < backward.peak <= 8 * unit, (length, backward.peak / unit)


def shard_and_unshard(group):
    whole = torch.arange(S)[None].expand(3, -1).clone()
    for head_tail in (True, False):
        sharding = SequenceSharding(group, head_tail)
        mine = sharding.shard(whole)
        assert torch.equal(mine[0], sharding.positions(S)) and mine.shape[1] == S // sharding.size
        assert torch.equal(sharding.unshard(mine), whole)
    first = SequenceSharding(group).runs(S, 0)
    chunk = S // (2 * sharding.size)
    assert first == [range(chunk), range(S - chunk, S)]
    packed = SequenceSharding(group, lengths=(30, S - 30))
    assert torch.equal(packed.unshard(packed.shard(whole)), whole)
    assert torch.equal(packed.positions(S), torch.where(packed.places(S) < 30, 0, -30) + packed.places(S))


def wrong_arguments(sharding):
    q, k, v, _ = (sharding.shard(x) for x in inputs())
    refuses(fastattn.InputError, "as q", lambda: ring_attention(q, k[:, 1:], v[:, 1:], sharding))
    refuses(fastattn.InputError, "multiple of", lambda: ring_attention(q[:, 1:], k[:, 1:], v[:, 1:], sharding))
    refuses(fastattn.InputError, "multiple of", lambda: sharding.shard(q[:, :3]))
    refuses(fastattn.InputError, "backend", lambda: ring_attention(q, k, v, sharding, backend="no such"))
    refuses(
        fastattn.InputError,
        "ring_attention",
        lambda: ulysses_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], sharding),
    )
    refuses(
        fastattn.InputError, "sum of the documents", lambda: SequenceSharding(sharding.group, lengths=(2, 3)).runs(6, 0)
    )
    packed = SequenceSharding(sharding.group, lengths=(S, 7))
    refuses(fastattn.InputError, "sharding.shard", lambda: ring_attention(q, k, v, packed))
    refuses(fastattn.InputError, "broadcasts", lambda: ring_attention(q, k, v, sharding, bias=draw(2, 3, seed=0)))
    refuses(fastattn.InputError, "bool", lambda: ring_attention(q, k, v, sharding, mask=draw(S, seed=0)))
    refuses(
        fastattn.InputError, "beginning of a call",
        lambda: ring_attention(q, k, v, sharding, dropout_p=0.5, backend="cpu"),
    )  # fmt: skip


def refuses(error, text, call):
    with pytest.raises(error, match=text):
        call()


def model_inside_sharded(sharding):
    """A layer whose projections work token by token, and what a rank alone cannot compute."""
    torch.manual_seed(0)
    layer = fastattn.nn.SelfAttention(
        24, 12, rope=True, qk_norm=True, sinks=True, window=(None, 0), dtype=torch.float64
    )
    x = draw(B, S, 24, seed=0)
    expected = layer(x)
    mine, positions = sharding.shard(x), sharding.positions(S)
    for function in FUNCTIONS:
        with sharded(sharding, function):
            out = layer(mine, positions=positions)
        torch.testing.assert_close(sharding.unshard(out), expected, **EXACT)
    grads = torch.autograd.grad(expected, list(layer.parameters()), torch.ones_like(expected))
    mine = torch.autograd.grad(out, list(layer.parameters()), torch.ones_like(out))
    for found, wanted in zip(mine, grads, strict=True):
        dist.all_reduce(found, group=sharding.group)
        torch.testing.assert_close(found, wanted, **EXACT)
    q, ends = draw(4, 2, D, seed=1), torch.tensor([0, 4], dtype=torch.int32)
    dense = q[None]
    for call in (
        lambda: fastattn.attention_varlen(q, q, q, ends, ends),
        lambda: fastattn.attention(dense, dense, dense, return_lse=True),
        lambda: fastattn.scaled_dot_product_attention(dense, dense, dense),
        lambda: torch.nn.functional.scaled_dot_product_attention(dense, dense, dense),
        lambda: fastattn.attention_with_kv_cache(dense, dense.clone(), dense.clone(), ends[1:]),
    ):
        with sharded(sharding):
            refuses(fastattn.UnsupportedError, "inside sharded", call)


def inside_torchs_context_parallel(mesh):
    from torch.distributed.tensor.experimental import context_parallel as torchs

    from fastattn.integrations.torch import override_sdpa

    q, k, v, _ = inputs(H_Q)
    with torchs(mesh, buffers=[q, k, v], buffer_seq_dims=[1, 1, 1]):
        refuses(fastattn.UnsupportedError, "context_parallel", lambda: fastattn.attention(q, k, v, causal=True))
        if dist.get_rank() == 0:  # compiling takes seconds
            compiled = torch.compile(lambda *x: fastattn.attention(*x), backend="aot_eager")
            refuses(fastattn.UnsupportedError, "context_parallel", lambda: compiled(q, k, v))
        refuses(fastattn.UnsupportedError, "context_parallel", lambda: override_sdpa().__enter__())
        sharding = SequenceSharding(mesh.get_group())
        with sharded(sharding):
            out = fastattn.attention(q, k, v, causal=True)
        direct = ring_attention(q, k, v, sharding, causal=True)
    expected = fastattn.attention(q, k, v, causal=True)
    torch.testing.assert_close(sharding.unshard(out), expected, **EXACT)
    assert torch.equal(out, direct) and expected.shape[1] == S


# --- DTensor ----------------------------------------------------------------------------------------------------

TENSORS = {
    "none": {},
    "bias by head": {"bias": draw(1, H_Q, S, S, seed=10)},
    "bias by batch": {"bias": draw(B * 2, 1, 1, S, seed=11)},
    "mask and segments": {
        "mask": draw(1, 1, S, S, seed=12) > -1,
        "segment_ids": torch.arange(S)[None].expand(B * 2, -1) // 9,
    },
    "sinks and slopes": {"sinks": draw(H_Q, seed=13), "alibi_slopes": draw(H_Q, seed=14).abs()},
}


def checks_tensor_parallel(mesh):
    register_sharding_rules()
    ways = {"batch": 0, "heads": 2, "sequence": 1}
    for (name, extras), (way, dim) in itertools.product(TENSORS.items(), ways.items()):
        yield f"DTensor by {way}, {name}", lambda e=extras, w=way, d=dim: dtensor(mesh, e, w, d)
    yield "DTensor heads that do not divide are gathered", lambda: dtensor(mesh, {}, "gathered", 2, (12, 6))
    yield "DTensor round the ring", lambda: dtensor_ring(mesh)
    yield "DTensor packed, by heads", lambda: dtensor_packed(mesh)
    yield "DTensor dropout drops what one process drops", lambda: dtensor_dropout(mesh)


def dtensor(mesh, extras, way, dim, heads=(H_Q, H_KV)):
    whole = [draw(2 * B, S, h, D, seed=n) for n, h in enumerate((heads[0], heads[1], heads[1]))]
    dout = draw(2 * B, S, heads[0], D, seed=3)
    differentiable = [name for name in ("bias", "sinks") if name in extras]
    placements = [Shard(dim)]
    results = []
    for put in (lambda x, p: x, lambda x, p: distribute_tensor(x, mesh, p)):
        leaves = [put(x.clone(), placements).requires_grad_() for x in whole]
        others = {name: put(x.clone(), [Replicate()]) for name, x in extras.items()}
        for name in differentiable:
            others[name].requires_grad_()
        out, lse = fastattn.attention(*leaves, causal=True, return_lse=True, **others)
        wanted = leaves + [others[name] for name in differentiable]
        grads = torch.autograd.grad([out, lse], wanted, [put(dout, placements), torch.ones_like(lse)])
        results.append((out, lse, *grads))
    expected, found = results
    if way in ("batch", "heads"):  # it stayed split, rather than being gathered first
        assert found[0].placements == (Shard(dim),), found[0].placements
    for mine, theirs in zip(found, expected, strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.full_tensor(), theirs, **EXACT)


def dtensor_packed(mesh):
    q, k, v = (draw(11, h, D, seed=n).requires_grad_() for n, h in enumerate((H_Q, H_KV, H_KV)))
    cu_seqlens = torch.tensor([0, 4, 11], dtype=torch.int32)
    expected = fastattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=7, max_seqlen_kv=7, causal=True)
    grads = torch.autograd.grad(expected.sum(), (q, k, v))
    split = [distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_() for x in (q, k, v)]
    cu = distribute_tensor(cu_seqlens, mesh, [Replicate()])
    out = fastattn.attention_varlen(*split, cu, cu, max_seqlen_q=7, max_seqlen_kv=7, causal=True)
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), expected, **EXACT)
    for mine, theirs in zip(torch.autograd.grad(out.sum(), split), grads, strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, **EXACT)


def dtensor_ring(mesh):
    """A sequence that is split stays split."""
    q, k, v, dout = inputs()
    sharding = SequenceSharding(mesh.get_group(), head_tail=False)
    split = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in (q, k, v)]
    out = ring_attention(*split, sharding, causal=True)
    assert out.placements == (Shard(1),)
    grads = torch.autograd.grad(out, split, distribute_tensor(dout, mesh, [Shard(1)]))
    for found, wanted in zip((out, *grads), alone(q, k, v, dout, causal=True), strict=True):
        torch.testing.assert_close(found.full_tensor(), wanted, **EXACT)
    q = split[0].detach()
    refuses(fastattn.InputError, "in order", lambda: ring_attention(q, q, q, SequenceSharding(mesh.get_group())))
    by_heads = q.redistribute(placements=[Shard(2)])
    refuses(fastattn.InputError, "Redistribute", lambda: ring_attention(by_heads, by_heads, by_heads, sharding))


def dtensor_dropout(mesh):
    q, k, v, _ = inputs()
    state = torch.tensor([5, 6])
    expected = fastattn.attention(q, k, v, dropout_p=0.5, rng_state=state)
    split = (distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k, v))
    out = fastattn.attention(*split, dropout_p=0.5, rng_state=distribute_tensor(state, mesh, [Replicate()]))
    torch.testing.assert_close(out.full_tensor(), expected, **EXACT)


# --- running ----------------------------------------------------------------------------------------------------


def run(rank, world_size, store, results):
    timeout = datetime.timedelta(seconds=60)  # a rank that fails alone leaves the others waiting
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    mesh, checks = DeviceMesh("cpu", range(world_size)), []
    for size in (2, 3):
        group = dist.new_group(range(size))
        checks += checks_context_parallel(group, size) if rank < size else []
    checks += checks_context_parallel(None, world_size)
    checks += checks_tensor_parallel(mesh)
    checks.append(("inside torch's context_parallel", lambda: inside_torchs_context_parallel(mesh)))
    found = {}
    for name, check in checks:
        try:
            check()
            found[name] = "ok"
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
    (Path(results) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    results, world_size = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, f"{folder}/store", results)  # forked, as importing torch takes longer than the checks
        torch.multiprocessing.start_processes(run, arguments, world_size, start_method="fork")
