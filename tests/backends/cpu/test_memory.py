"""Wrong lengths, page numbers and memory, also changed during the call, are refused and never followed."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import fastattn
from fastattn import InputError
from fastattn.backends import load

pytestmark = pytest.mark.skipif(load("cpu").unavailable_reason() is not None, reason="no C++ compiler")
BACKENDS = ("cpu", None, "eager")


def step(paged=True, rows=1, batch=2):
    torch.manual_seed(0)
    lengths = torch.tensor([300 - 50 * b for b in range(batch)], dtype=torch.int32)
    arguments = {"q": torch.randn(batch, rows, 4, 64), "cache_lengths": lengths}
    shape = (40, 16, 2, 64) if paged else (batch, 308, 2, 64)
    arguments |= {"k_cache": torch.randn(shape), "v_cache": torch.randn(shape)}
    return arguments | ({"block_table": torch.randperm(40).int().view(2, 20)} if paged else {})


def new_rows(rows=1, batch=2):
    return {"k": torch.randn(batch, rows, 2, 64), "v": torch.randn(batch, rows, 2, 64)}


EMPTY = """
import threading, torch
from fastattn import attention_with_kv_cache
def call(batch, rows, heads):
    cache = torch.randn(batch, 8, 1, 64)
    q, lengths = torch.randn(batch, rows, heads, 64), torch.full((batch,), 4, dtype=torch.int32)
    shapes.append(tuple(attention_with_kv_cache(q, cache, cache, lengths, backend="cpu").shape))
shapes = []
for sizes in ((0, 1, 2), (2, 0, 2), (2, 1, 0)):
    thread = threading.Thread(target=call, args=sizes)
    thread.start(), thread.join()
print(shapes)
"""


def test_an_empty_call_is_the_first_of_its_thread():
    done = subprocess.run([sys.executable, "-c", EMPTY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[(0, 1, 2, 64), (2, 0, 2, 64), (2, 1, 0, 64)]", done.stderr


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("name", ["block_table", "cache_lengths"])
def test_values_that_another_thread_changes(name, appends):
    """A refusal or a result, and no page beyond the cache: what was checked is what is used."""
    arguments = step(paged=name == "block_table") | (new_rows() if appends else {})
    shared = arguments[name].numpy()
    good, bad, stop = shared.copy(), np.full_like(shared, 2**30), threading.Event()

    def change():
        while not stop.is_set():
            shared[...] = bad
            shared[...] = good

    thread = threading.Thread(target=change)
    thread.start()
    try:
        calls, said, ends = 0, [], time.monotonic() + 2
        while time.monotonic() < ends:
            calls += 1
            try:
                fastattn.attention_with_kv_cache(**arguments, backend="cpu")
            except (InputError, RuntimeError) as error:
                said.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert calls > len(said)
    assert all(name in text or "changed while it ran" in text for text in said)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("boundaries", "said"),
    [([0, 2**31 - 1, 3, 6], "never decrease"), ([0, -(2**31), 3, 6], "never decrease"), ([0, 2, 4, 7], "6")],
)
def test_boundaries_at_the_ends_of_their_dtype(backend, boundaries, said):
    cache, lengths = torch.randn(3, 20, 2, 64), torch.tensor([3, 4, 5], dtype=torch.int32)
    with pytest.raises(InputError, match=said):
        fastattn.attention_with_kv_cache(
            torch.randn(6, 4, 64), cache, cache, lengths, cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32),
            max_seqlen_q=8, backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("length", [2**31 - 1, -(2**31)])
def test_lengths_at_the_ends_of_their_dtype(length):
    arguments = step(paged=False) | new_rows()
    arguments["cache_lengths"][1] = length
    before = arguments["k_cache"].clone()
    with pytest.raises(InputError, match="cache_lengths"):
        fastattn.attention_with_kv_cache(**arguments, backend="cpu")
    assert torch.equal(arguments["k_cache"], before)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "block_table", "k"])
@pytest.mark.parametrize("left", [0, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_was_freed(name, left, backend):
    """Before the first call, and between calls of one kind."""
    for calls in (0, 1, 2):
        arguments = step() | new_rows()
        for _ in range(calls):
            fastattn.attention_with_kv_cache(**arguments, backend=backend)
        arguments[name].untyped_storage().resize_(left)
        with pytest.raises(InputError, match=rf"{name}: got a tensor .* in a storage of {left} bytes"):
            fastattn.attention_with_kv_cache(**arguments, backend=backend)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_memory_that_was_freed_without_a_cache(layout):
    for calls in (0, 2):
        q, k, v = torch.randn(3, 2, 9, 4, 16)
        for _ in range(calls):
            fastattn.attention(q, k, v, layout=layout)
        k.untyped_storage().resize_(k.storage_offset() * 4 + 16)
        with pytest.raises((InputError, RuntimeError), match="storage of"):  # a view of it is refused by torch
            fastattn.attention(q, k, v, layout=layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paged", [True, False])
def test_new_rows_that_lie_in_the_cache(backend, paged):
    """Rows 300 to 303 are stored as 298 to 301 were: a copy row by row would store what it has just written."""
    arguments = step(paged, rows=4)
    arguments["cache_lengths"].fill_(300 if not paged else 64)
    if paged:
        arguments["block_table"] = torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]], dtype=torch.int32)
        k, v = (arguments[name][[4, 14], :2].clone() for name in ("k_cache", "v_cache"))
        mine = {name: arguments[f"{name}_cache"][4:15:10, :2] for name in ("k", "v")}
    else:
        mine = {name: arguments[f"{name}_cache"][:, 298:302] for name in ("k", "v")}
        k, v = (x.clone() for x in mine.values())
    apart = arguments | {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    expected = fastattn.attention_with_kv_cache(**apart, k=k, v=v, backend="eager")
    out = fastattn.attention_with_kv_cache(**arguments, **mine, backend=backend)
    torch.testing.assert_close(out, expected)
    assert torch.equal(arguments["k_cache"], apart["k_cache"]) and torch.equal(arguments["v_cache"], apart["v_cache"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_share_their_memory_are_not_written(backend):
    arguments = step(paged=False) | new_rows()
    arguments["k_cache"] = arguments["k_cache"][:1].expand(2, -1, -1, -1)
    with pytest.raises(InputError, match="k_cache: got an expanded tensor"):
        fastattn.attention_with_kv_cache(**arguments, backend=backend)


def test_more_rows_than_the_kernel_counts():
    q = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**29, 1)
    cache = torch.zeros(1, 4, 1, 1)
    with pytest.raises(InputError, match="q: got 536870912 rows"):
        fastattn.attention_with_kv_cache(q, cache, cache, torch.ones(1, dtype=torch.int32), backend="cpu")


FORKED = """
import os, signal, torch, fastattn
torch.set_num_threads(2)
q = torch.randn(2, 300, 4, 64)
exact = fastattn.attention(q, q, q, causal=True, backend="cpu")
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    for _ in range(2):
        out = fastattn.attention(q, q, q, causal=True, backend="cpu")
    os._exit(0 if out.numpy().tobytes() == exact.numpy().tobytes() else 3)
print(os.waitpid(pid, 0)[1])
"""


def test_a_child_of_a_process_that_used_threads():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "0", done.stderr
    assert done.stderr.count("in a forked process attention on CPUs takes one thread") == 1
