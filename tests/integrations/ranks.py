"""A program for test_parallel.py: every check on gloo ranks, results to a JSON file.

    python ranks.py RESULTS WORLD_SIZE

Every rank runs every check (groups of two: the first two ranks) and writes "ok" or a traceback for it.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastattn
from fastattn.integrations.context_parallel import SequenceSharding, ring_attention, ulysses_attention
from fastattn.integrations.tensor_parallel import register_sharding_rules

B, S, H_Q, H_KV, D = 2, 32, 8, 4, 8
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # fp64
BANDS = {
    "full": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (5, 0)},
    "wide window": {"window": (20, 3)},
    "one-sided window": {"window": (None, 2)},
}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(heads_kv=H_KV):
    """q, k, v and the gradient of out: the same on every rank."""
    shapes = ((B, S, H_Q, D), (B, S, heads_kv, D), (B, S, heads_kv, D + 2), (B, S, H_Q, D + 2))
    return [draw(*shape, seed=n) for n, shape in enumerate(shapes)]


def alone(q, k, v, dout, **options):
    """What one process computes: out and the gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def context_parallel(function, sharding, heads_kv, **options):
    q, k, v, dout = inputs(heads_kv)
    leaves = [sharding.shard(x).requires_grad_() for x in (q, k, v)]
    out = function(*leaves, sharding, **options)
    grads = torch.autograd.grad(out, leaves, sharding.shard(dout))
    for found, expected in zip((out, *grads), alone(q, k, v, dout, **options), strict=True):
        torch.testing.assert_close(sharding.unshard(found), expected, **EXACT)


def checks_context_parallel(group, size):
    for head_tail, (name, band) in itertools.product((True, False), BANDS.items()):
        sharding = SequenceSharding(group, head_tail)
        for function, heads_kv in itertools.product((ring_attention, ulysses_attention), (4, 1)):
            order = "head-tail" if head_tail else "in order"
            label = f"{function.__name__} {order} {name}, {heads_kv} kv heads, {size} ranks"
            yield label, lambda f=function, s=sharding, h=heads_kv, b=band: context_parallel(f, s, h, **b)
    sharding = SequenceSharding(group)
    more = {"causal": True, "scale": 0.4, "softcap": 2.0, "backend": "eager"}
    for function in (ring_attention, ulysses_attention):
        yield f"{function.__name__} options, {size} ranks", lambda f=function: context_parallel(f, sharding, 2, **more)
    yield f"half precision, {size} ranks", lambda: half_precision(sharding)
    yield f"only what the band keeps is computed, {size} ranks", lambda: skips_what_is_masked(sharding)
    yield f"shard and unshard, {size} ranks", lambda: shard_and_unshard(group)
    yield f"wrong arguments, {size} ranks", lambda: wrong_arguments(sharding)


def half_precision(sharding):
    q, k, v, _ = (x.bfloat16() for x in inputs())
    out = sharding.unshard(ring_attention(*(sharding.shard(x) for x in (q, k, v)), sharding, causal=True))
    assert out.dtype == torch.bfloat16
    exact = fastattn.attention(q.double(), k.double(), v.double(), causal=True)
    one_process = (fastattn.attention(q, k, v, causal=True) - exact).abs().max()
    assert (out - exact).abs().max() <= 2 * one_process


def skips_what_is_masked(sharding):
    """Causal work is the same on every rank when dealt out head and tail; in order it is not."""
    from fastattn.integrations.context_parallel import _blocks
    from fastattn.spec import AttentionSpec, kept_pairs

    def work(sharding, rank, spec):
        mine = sharding.runs(S, rank)
        theirs = [sharding.runs(S, source) for source in range(sharding.size)]
        blocks = [block for keys in theirs for block in _blocks(mine, keys, S, spec)]
        sizes = [(b.rows.stop - b.rows.start, b.keys.stop - b.keys.start, b.spec) for b in blocks]
        assert all(spec.left is None or spec.left >= 0 for *_, spec in sizes)
        assert all(spec.right is None or spec.right >= 0 for *_, spec in sizes)
        return sum(kept_pairs(spec, rows, keys) for rows, keys, spec in sizes)

    causal, window = AttentionSpec(1.0, right=0), AttentionSpec(1.0, left=5, right=0)
    for spec in (causal, window, AttentionSpec(1.0), AttentionSpec(1.0, left=2, right=9)):
        for dealt in (sharding, SequenceSharding(sharding.group, head_tail=False)):
            by_rank = [work(dealt, rank, spec) for rank in range(sharding.size)]
            assert sum(by_rank) == kept_pairs(spec, S, S), "every kept pair once"
    balanced = {work(sharding, rank, causal) for rank in range(sharding.size)}
    in_order = {work(SequenceSharding(sharding.group, False), rank, causal) for rank in range(sharding.size)}
    assert len(balanced) == 1 and len(in_order) == sharding.size


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


def wrong_arguments(sharding):
    q, k, v, _ = (sharding.shard(x) for x in inputs())
    refuses(fastattn.InputError, "as q", lambda: ring_attention(q, k[:, 1:], v[:, 1:], sharding))
    refuses(fastattn.InputError, "multiple of", lambda: ring_attention(q[:, 1:], k[:, 1:], v[:, 1:], sharding))
    refuses(fastattn.InputError, "multiple of", lambda: sharding.shard(q[:, :3]))
    refuses(fastattn.InputError, "backend", lambda: ring_attention(q, k, v, sharding, backend="no such"))
    refuses(fastattn.InputError, "ring_attention", lambda: ulysses_attention(q[:, :, :3], k[:, :, :3], v, sharding))


def refuses(error, text, call):
    with pytest.raises(error, match=text):
        call()


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
    assert fastattn.attention(q, k, v, causal=True).shape[1] == S


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
    pair, mesh = dist.new_group([0, 1]), DeviceMesh("cpu", range(world_size))
    checks = [*checks_context_parallel(pair, 2)] if rank < 2 else []
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
