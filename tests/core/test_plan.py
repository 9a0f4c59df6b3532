"""A repeated call runs by a plan, with the same result; a call that differs, or is watched, does not."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import InputError, autograd, ops, plan, serving, state
from fastattn.backends import load
from fastattn.problem import TENSORS

needs_kernel = pytest.mark.skipif(load("cpu").unavailable_reason() is not None, reason="no C++ compiler")


@pytest.fixture
def long_ways(monkeypatch):
    """How many calls were checked and had something chosen, as the first of a kind."""
    counted = []
    for module, name in ((ops, "attend_to_cache"), (serving, "attend"), (serving, "_first_by_plan")):
        way = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, way=way: counted.append(1) or way(*args))
    return counted


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_again(long_ways, layout, causal):
    for _ in range(3):
        q, k, v = (torch.randn(2, 9, heads, 16) for heads in (4, 2, 2))
        reference = fastattn.attention(q, k, v, causal=causal, return_lse=True, backend="eager")
        given = [x.transpose(1, 2) if layout == "BHSD" else x for x in (q, k, v)]
        out, lse = fastattn.attention(*given, causal=causal, layout=layout, return_lse=True)
        out = out.transpose(1, 2) if layout == "BHSD" else out
        assert out.is_contiguous() and lse.is_contiguous()
        torch.testing.assert_close((out, lse), reference)
    assert len(long_ways) == 3 + 1, "the reference, and the first call"


def test_torchs_function_again(long_ways):
    for _ in range(3):
        q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
        out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert len(long_ways) == 1


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"mask": torch.ones(9, 9).tril().bool()}], ids=["plain", "mask"])
@pytest.mark.parametrize("pattern", ["qkv", "qkk", "qqq", "qkq"])
def test_kinds_with_repeated_tensors_or_none_are_recognised_by_one_check(monkeypatch, pattern, options):
    looked_up = []
    long_way = plan._look_up_kind
    monkeypatch.setattr(plan, "_look_up_kind", lambda *args: looked_up.append(1) or long_way(*args))
    for call in range(4):
        of = {name: torch.randn(1, 9, 2, 16) for name in "qkv"}
        tensors = [of[name] for name in pattern]
        looked_up.clear()
        out = fastattn.attention(*tensors, **options)
        assert call < 2 or not looked_up
        torch.testing.assert_close(out, fastattn.attention(*tensors, **options, backend="eager"))


@needs_kernel
@pytest.mark.parametrize("order", ["as out", "contiguous", "expanded", "a part"])
def test_gradients_of_out_in_any_memory_order(long_ways, order):
    q, k, v = (torch.randn(2, 5, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    dout = {
        "as out": torch.randn(2, 5, 4, 16).transpose(1, 2), "contiguous": torch.randn(2, 4, 5, 16),
        "expanded": torch.randn(2, 1, 5, 1).expand(2, 4, 5, 16), "a part": torch.randn(2, 4, 5, 48)[..., 16:32],
    }[order]  # fmt: skip
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), dout)
    for _ in range(2):
        found = torch.autograd.grad(fastattn.scaled_dot_product_attention(q, k, v), (q, k, v), dout)
        torch.testing.assert_close(found, expected)
    assert len(long_ways) == 1


def test_the_tensors_of_a_problem_are_all_of_them():
    inputs = fastattn.problem.Inputs(*range(len(TENSORS)))
    assert list(inputs.tensors().items()) == list(zip(TENSORS, range(len(TENSORS)), strict=True))


def test_attention_in_need_of_more(long_ways):
    q = torch.randn(1, 8, 2, 16)
    out = fastattn.attention(q, q, q)
    calls = (
        {"dropout_p": 0.5}, {"bias": torch.zeros(8, 8)}, {"mask": torch.ones(8, 8, dtype=torch.bool)},
        {"window": (2, 2)}, {"sinks": torch.zeros(2)}, {"segment_ids": torch.zeros(1, 8, dtype=torch.int32)},
        {"alibi_slopes": torch.ones(2)}, {"softcap": 3.0}, {"scale": -1.0}, {"backend": "eager"},
    )  # fmt: skip
    for options in calls:
        for _ in range(2):
            fastattn.attention(q, q, q, **options)
    unplanned = {"dropout_p", "backend"}  # a seed for each call; and a backend without plans
    assert len(long_ways) == 1 + sum(2 if unplanned & set(options) else 1 for options in calls)
    learned = q.clone().requires_grad_()
    fastattn.attention(learned, q, q).sum().backward()
    assert learned.grad is not None
    with torch.no_grad():
        assert torch.equal(fastattn.attention(learned, q, q), out)


MORE = {
    "bias": lambda: {"bias": torch.randn(2, 1, 9, 9)},
    "bias without a batch": lambda: {"bias": torch.randn(9, 9).requires_grad_()},
    "padding": lambda: {"segment_ids": (torch.zeros(1, 9).int(), (torch.rand(2, 9) > 0.7).int())},
    "mask": lambda: {"mask": torch.rand(2, 4, 9, 9) > 0.4},
    "intervals": lambda: {"intervals": torch.randint(-1, 11, (1, 4, 9, 3, 2), dtype=torch.int32)},
    "intervals of all heads": lambda: {"intervals": torch.randint(-1, 11, (9, 1, 2), dtype=torch.int32)},
    "per head": lambda: {"sinks": torch.randn(4).requires_grad_(), "alibi_slopes": torch.rand(4)},
}  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("make", MORE.values(), ids=MORE)
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_with_masks_again(long_ways, layout, make):
    """Other values of the tensors each time: a plan holds none of them."""
    for _ in range(3):
        more = make()
        inputs = leaves((2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16))
        wanted = [*inputs, *(x for x in more.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
        given = [x.transpose(1, 2) if layout == "BHSD" else x for x in inputs]
        out = fastattn.attention(*given, layout=layout, **more)
        expected = fastattn.attention(*inputs, backend="eager", **more)
        expected = expected.transpose(1, 2) if layout == "BHSD" else expected
        torch.testing.assert_close(out, expected)
        seed = torch.randn_like(out)
        for x, y in zip(
            torch.autograd.grad(out, wanted, seed), torch.autograd.grad(expected, wanted, seed), strict=True
        ):
            torch.testing.assert_close(x, y)
        with pytest.raises(fastattn.InputError):
            fastattn.attention(*given, layout=layout, bias=torch.zeros(2, 3, 9, 9))
    assert len(long_ways) == 3 + 1, "the reference, and the first call"


@needs_kernel
def test_packed_with_intervals_again():
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    for _ in range(3):
        q, intervals = torch.randn(7, 2, 16), torch.randint(-1, 5, (7, 2, 2), dtype=torch.int32)
        bounds = {"max_seqlen_q": 4, "max_seqlen_kv": 4, "causal": True, "intervals": intervals}
        out = fastattn.attention_varlen(q, q, q, ends, ends, **bounds)
        torch.testing.assert_close(out, fastattn.attention_varlen(q, q, q, ends, ends, **bounds, backend="eager"))
        with pytest.raises(fastattn.InputError, match="intervals"):
            fastattn.attention_varlen(q, q, q, ends, ends, **bounds | {"intervals": intervals[:3]})


@needs_kernel
def test_packed_again_is_checked(long_ways):
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    for last in (7, 7):
        q = torch.randn(last, 2, 16)
        out = fastattn.attention_varlen(q, q, q, ends, ends, max_seqlen_q=4, max_seqlen_kv=4)
        torch.testing.assert_close(out[3:], fastattn.attention(*(q[None, 3:],) * 3, backend="eager")[0])
    ends[1] = 8
    with pytest.raises(fastattn.InputError):
        fastattn.attention_varlen(q, q, q, ends, ends, max_seqlen_q=4, max_seqlen_kv=4)
    assert len(long_ways) == 1 + 2, "the first call, and the reference"


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_gradients_by_a_plan(long_ways, layout, dtype):
    """Of out, and of out and lse together; with gradients that are expanded, strided or absent."""
    for uses_lse in (False, False, True, True):
        q, k, v = leaves((2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 16), dtype=dtype)
        results = []
        for backend in (None, "eager"):
            given = [x.transpose(1, 2) if layout == "BHSD" else x for x in (q, k, v)]
            out, lse = fastattn.attention(*given, causal=True, layout=layout, return_lse=True, backend=backend)
            loss = out.float().sum() + (lse.sin().sum() if uses_lse else 0)
            weighted = out.float().mul(torch.linspace(0, 1, 16)).sum()
            for total in (loss, weighted):
                results.append(torch.autograd.grad(total, (q, k, v), retain_graph=True))
        torch.testing.assert_close(results[:2], results[2:], rtol=0.02, atol=0.02) if dtype is torch.bfloat16 else (
            torch.testing.assert_close(results[:2], results[2:])
        )
    assert len(long_ways) == 1 + 4, "the first call, and the reference"


@needs_kernel
def test_gradients_of_bias_and_sinks_by_a_plan(monkeypatch):
    """A bias that the batch shares is summed over it, one of every pair is not; sinks are summed."""
    monkeypatch.setattr(autograd, "_by_operator", lambda *_: pytest.fail("not by the plan"))
    for shape in ((9, 9), (2, 4, 9, 9)):
        for _ in range(3):
            inputs = leaves((2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16), shape, (4,))
            found = []
            for backend in (None, "eager"):
                out = fastattn.attention(*inputs[:3], bias=inputs[3], sinks=inputs[4], backend=backend)
                found.append(torch.autograd.grad(out.square().sum(), inputs))
            torch.testing.assert_close(*found)


@needs_kernel
def test_operators_of_compiled_graphs_take_plans(monkeypatch):
    """From the second call of a kind on, with other values each time; a gradient of lse, or of few inputs, in full."""
    in_full = []
    for name in ("_forward_in_full", "_backward_in_full"):
        way = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, way=way, name=name: in_full.append(name) or way(*args))
    for _ in range(3):
        shapes = (2, 9, 4, 16), (2, 9, 4, 16), (1, 4, 9, 9)
        q, dout, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        flat = (
            q,
            q * 2,
            q * 3,
            bias,
            *(None,) * (len(TENSORS) - 4),
            9,
            9,
            0.3,
            None,
            None,
            0,
            "lower_right",
            0.0,
            None,
        )
        eager = (*flat[:-1], "eager")
        results = torch.ops.fastattn.forward(*flat, True)
        expected = torch.ops.fastattn.forward(*eager, True)
        torch.testing.assert_close(results[:2], expected[:2])
        assert results[1].untyped_storage().data_ptr() != results[2].untyped_storage().data_ptr()
        for dlse, needed in (
            (None, [True] * 4 + [False]),
            (results[1], [True] * 4 + [False]),
            (None, [True] + [False] * 4),
        ):
            found = torch.ops.fastattn.backward(dout, dlse, *results, *flat, needed)
            assert [x.numel() > 0 for x in found] == needed
            torch.testing.assert_close(found, torch.ops.fastattn.backward(dout, dlse, *expected, *eager, needed))
    mine = [name for name in in_full if name == "_forward_in_full"], [name for name in in_full if name[1] == "b"]
    assert [len(names) for names in mine] == [3 + 1, 3 * 3 + 1 + 3 + 3], "the reference, and the first call of a kind"


@needs_kernel
def test_a_storage_that_shrank_is_refused_by_every_way_to_a_plan():
    for calls in (0, 1, 2, 3):  # the first makes the plan, the second finds it by its kind, the third by torch's check
        state.forget()
        q, k, v = (torch.randn(1, 9, 2, 16) for _ in range(3))
        for _ in range(calls):
            fastattn.attention(q, k, v)
        k.untyped_storage().resize_(64)
        with pytest.raises(InputError, match="storage"):
            fastattn.attention(q, k, v)


@needs_kernel
def test_a_planned_call_in_every_derivative_that_reverse_mode_has():
    q, k, v = leaves((1, 7, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8), dtype=torch.float64)
    for _ in range(2):
        assert torch.autograd.gradcheck(lambda *x: fastattn.attention(*x, causal=True), (q, k, v))
        assert torch.autograd.gradgradcheck(lambda *x: fastattn.attention(*x, causal=True), (q, k, v))
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    (only,) = torch.autograd.grad(lse.sum(), k, retain_graph=True)
    assert only.abs().sum() > 0
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_the_first_call_of_a_kind_may_be_checkpointed(layout):
    """Recomputing it is the second, and has to save the same tensors."""
    q, k, v = leaves((1, 9, 3, 16), (1, 9, 3, 16), (1, 9, 3, 16))

    def attend(*qkv):
        return fastattn.attention(*qkv, layout=layout, causal=True)

    for _ in range(2):
        out = checkpoint(attend, q, k, v, use_reentrant=False)
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.testing.assert_close(found, torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v)))


@needs_kernel
def test_what_differs_in_anything_else_has_a_plan_of_its_own(long_ways):
    q = torch.randn(1, 8, 2, 16)
    expected = fastattn.attention(q, q, q)
    negative = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(fastattn.attention(negative, negative, negative), expected)
    offset = torch.cat([torch.zeros(1), q.flatten()])[1:].view_as(q)
    assert offset.data_ptr() % 16
    torch.testing.assert_close(fastattn.attention(offset, offset, offset), expected)
    with torch.device("meta"):  # where new tensors would be made
        torch.testing.assert_close(fastattn.attention(q, q, q), expected)
    with torch.inference_mode():
        inferred = fastattn.attention(q, q, q)
    torch.testing.assert_close(inferred.clone(), expected)
    assert len(long_ways) == 3, "the first, that of the negative tensors, and the first without gradients"


def test_derivatives_of_every_kind_are_not_replayed():
    q = torch.randn(1, 8, 2, 16, dtype=torch.float64)
    fastattn.attention(q, q, q)
    _, tangent = torch.func.jvp(lambda x: fastattn.attention(x, q, q), (q,), (torch.ones_like(q),))
    gradient = torch.func.grad(lambda x: fastattn.attention(x, q, q).sum())(q)
    each = torch.vmap(lambda x: fastattn.attention(x, x, x))(q[None].repeat(3, 1, 1, 1, 1))
    assert tangent.abs().sum() > 0 and gradient.abs().sum() > 0
    torch.testing.assert_close(each[0], fastattn.attention(q, q, q))


# --- caches ---------------------------------------------------------------------------------------------------------


def step(have=9, **changes):
    torch.manual_seed(have)
    arguments = {
        "q": torch.randn(2, 1, 4, 16), "k_cache": torch.randn(6, 8, 2, 16), "v_cache": torch.randn(6, 8, 2, 16),
        "cache_lengths": torch.tensor([have, 3], dtype=torch.int32), "k": torch.randn(2, 1, 2, 16),
        "v": torch.randn(2, 1, 2, 16), "block_table": torch.tensor([[5, 0, 3], [1, 2, 4]], dtype=torch.int32),
    }  # fmt: skip
    return arguments | changes


def both_ways(**arguments):
    """The results and caches of the short way, and of the reference."""
    results = []
    for backend in (None, "eager"):
        mine = arguments | {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
        out, lse = fastattn.attention_with_kv_cache(**mine, return_lse=True, backend=backend)
        results.append((out, lse, mine["k_cache"], mine["v_cache"]))
    return results


@needs_kernel
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("appends", [True, False])
def test_the_short_way_is_taken_and_right(long_ways, paged, appends):
    changes = {} if appends else {"k": None, "v": None}
    if not paged:
        changes |= {"block_table": None, "k_cache": torch.randn(2, 24, 2, 16), "v_cache": torch.randn(2, 24, 2, 16)}
    for have in (9, 10, 0, 22):
        short, reference = both_ways(**step(have, **changes), window=(7, 0), softcap=9.0)
        torch.testing.assert_close(short, reference)
    assert len(long_ways) == 1 + 4, "the first call, and those of the reference"


@needs_kernel
@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.randn(2, 1, 2, 16)},
        {"q": torch.randn(2, 1, 8, 16)[:, :, ::2]},
        {"q": torch.randn(2, 3, 4, 16)},
        {"scale": 0.3},
        {"window": (2, 0)},
        {"causal": False},
        {"backend": "portable"},
        {"sinks": torch.zeros(4)},
        {"block_table": torch.tensor([[5, 0, 3, 1], [1, 2, 4, 0]], dtype=torch.int32)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_another_kind_of_call_is_looked_at_anew(long_ways, changes):
    fastattn.attention_with_kv_cache(**step())
    fastattn.attention_with_kv_cache(**step(**changes))
    assert len(long_ways) == 2


@needs_kernel
def test_who_watches_sees_the_operator(long_ways):
    fastattn.attention_with_kv_cache(**step())
    with FlopCounterMode(display=False) as flops:
        fastattn.attention_with_kv_cache(**step())
    with torch.profiler.profile() as profile:
        fastattn.attention_with_kv_cache(**step())
    assert len(long_ways) == 3 and flops.get_total_flops() > 0
    assert any(event.key == "fastattn::extend_cache" for event in profile.key_averages())


@needs_kernel
def test_states_that_change_the_meaning(long_ways):
    out = fastattn.attention_with_kv_cache(**step())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="k_cache"):
        fastattn.attention_with_kv_cache(**step())
    with fastattn.use_backend("portable"):
        torch.testing.assert_close(fastattn.attention_with_kv_cache(**step()), out)
    assert fastattn.explain_with_kv_cache(**step()).chosen == "cpu"
    assert len(long_ways) == 2
    with pytest.raises(InputError, match="requires grad"):
        fastattn.attention_with_kv_cache(**step(q=torch.randn(2, 1, 4, 16, requires_grad=True)))
    with pytest.raises(InputError, match=r"q: got torch\.sparse_coo"):
        fastattn.attention_with_kv_cache(**step(q=torch.randn(2, 1, 4, 16).to_sparse()))
    with pytest.raises(InputError, match="causal"):
        fastattn.attention_with_kv_cache(**step(), causal=1)
    with pytest.raises(InputError, match="cache_lengths"):
        fastattn.attention_with_kv_cache(**step(have=24))
    with pytest.raises(InputError, match="block_table"):
        fastattn.attention_with_kv_cache(**step(block_table=torch.full((2, 3), 6, dtype=torch.int32)))


@needs_kernel
def test_what_is_remembered_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(plan, "LIMIT", 3)
    for batch in range(1, 9):
        tensors = step(
            q=torch.randn(batch, 1, 4, 16), k=None, v=None, block_table=torch.zeros(batch, 3, dtype=torch.int32)
        )
        fastattn.attention_with_kv_cache(**tensors | {"cache_lengths": torch.ones(batch, dtype=torch.int32)})
    assert len(plan._known) <= 3


@needs_kernel
def test_calls_with_and_without_a_mask_have_plans_of_their_own(long_ways):
    """Equal options, but another number of tensors: recognising one of them at once must not keep out the other."""
    q, mask = torch.randn(1, 5, 2, 8), torch.rand(1, 1, 5, 5) > 0.5
    for _ in range(4):
        for given in ({}, {"mask": mask}):
            fastattn.attention(q, q, q, **given)
    assert len(long_ways) == 2
