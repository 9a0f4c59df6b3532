"""All public functions on the simulated GPU: results, kernels, devices and streams, and no host synchronisation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
import fastattn.nn
from fastattn.inspection import attention_statistics
from fastattn.integrations.torch import override_sdpa
from fastattn.lm.models import make_model, preset
from fastattn.nn import tree_mask
from fastattn.testing import Case, assert_within, make, simulated
from fastattn.testing.tolerance import Yardstick

pytestmark = pytest.mark.usefixtures("trusted")
BF16 = torch.bfloat16
PARENTS = [-1, 0, 1, 0, 3]


def normal(*shape: int, dtype: torch.dtype = BF16, device: str = "cuda", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@contextlib.contextmanager
def no_wait(machine: simulated.Machine) -> Iterator[None]:
    machine.waits.clear()
    yield
    assert machine.waits == []


def packed() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*(normal(20, 4, 16) for _ in range(3)), ints(0, 5, 20), ints(0, 5, 20)), {
        "max_seqlen_q": 15,
        "max_seqlen_kv": 15,
    }


CALLS: dict[str, Callable[[], Callable[[], object]]] = {}


def call(prepare: Callable[[], Callable[[], object]]) -> Callable[[], Callable[[], object]]:
    CALLS[prepare.__name__] = prepare
    return prepare


@call
def dense() -> Callable[[], object]:
    q, k, v = normal(2, 20, 4, 16), normal(2, 20, 2, 16), normal(2, 20, 2, 16)
    return lambda: fastattn.attention(q, k, v, causal=True, return_lse=True)


@call
def terms() -> Callable[[], object]:
    q, ids = normal(1, 20, 2, 16), torch.zeros(1, 20, dtype=torch.int64, device="cuda")
    more = {"bias": normal(1, 2, 20, 20), "mask": torch.ones(1, 1, 20, 20, dtype=torch.bool, device="cuda")}
    return lambda: fastattn.attention(
        q,
        q,
        q,
        segment_ids=ids,
        dropout_p=0.1,
        sinks=q[0, 0, :, 0],
        alibi_slopes=q[0, 0, :, 0].float(),
        softcap=3.0,
        **more,
    )


@call
def varlen() -> Callable[[], object]:
    args, options = packed()
    return lambda: fastattn.attention_varlen(*args, **options)


@call
def sdpa() -> Callable[[], object]:
    q = normal(1, 4, 20, 16)
    return lambda: fastattn.scaled_dot_product_attention(q, q, q, is_causal=True)


@call
def autocast() -> Callable[[], object]:
    q = normal(1, 20, 2, 16, dtype=torch.float32)

    def run() -> object:
        with torch.autocast("cuda", dtype=BF16):
            out = fastattn.attention(q, q, q)
        assert isinstance(out, Tensor) and out.dtype == BF16
        return out

    return run


@call
def explained() -> Callable[[], object]:
    q = normal(1, 20, 2, 16)

    def run() -> object:
        found = fastattn.explain(q, q, q, dropout_p=0.1)
        assert found.chosen == "triton"
        return None

    return run


@call
def paged_step() -> Callable[[], object]:
    cache, table = normal(8, 8, 2, 16), torch.arange(8, device="cuda").int().view(2, 4)
    q, new, lengths = normal(2, 1, 4, 16), normal(2, 1, 2, 16), ints(3, 9)
    return lambda: fastattn.attention_with_kv_cache(q, cache, cache.clone(), lengths, new, new, block_table=table)


@call
def intervals() -> Callable[[], object]:
    q, documents = normal(1, 20, 2, 16), fastattn.intervals.documents([5, 15], device="cuda")
    return lambda: fastattn.attention(q, q, q, intervals=documents)


@call
def tree_step() -> Callable[[], object]:
    cache, table = normal(8, 8, 2, 16), torch.arange(8, device="cuda").int().view(2, 4)
    q, new, lengths, mask = normal(2, 5, 4, 16), normal(2, 5, 2, 16), ints(3, 9), tree_mask(PARENTS).cuda()
    options = {"block_table": table, "tree_mask": mask}
    return lambda: fastattn.attention_with_kv_cache(q, cache, cache.clone(), lengths, new, new, **options)


@call
def module() -> Callable[[], object]:
    attend = fastattn.MultiHeadAttention(32, 4, batch_first=True, device="cuda", dtype=BF16)
    x, padding = normal(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool, device="cuda")
    return lambda: attend(x, x, x, key_padding_mask=padding, need_weights=False)


@call
def mapped() -> Callable[[], object]:
    q = normal(3, 1, 12, 2, 16)
    return lambda: torch.vmap(lambda x: fastattn.attention(x, x, x, causal=True))(q)


def test_prompts_against_a_cache_run_the_forward_kernel(
    machine: simulated.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If their rows fill the device: a tile for each multiprocessor."""
    from fastattn.backends.triton import launch

    monkeypatch.setattr(launch, "processors", lambda device: 4)
    for heads in (3, 4):
        cache = normal(1, 136, 1, 16)
        q, new, lengths = normal(1, 128, heads, 16), normal(1, 128, 1, 16), ints(3)
        with no_wait(machine):
            fastattn.attention_with_kv_cache(q, cache, cache.clone(), lengths, new, new)
        assert any("forward" in str(launch) for launch in machine.launches) == (heads == 4), machine.launches


def test_operands_in_e4m3_run_their_kernel(machine: simulated.Machine) -> None:
    q, k, v = normal(1, 20, 2, 16), normal(1, 20, 1, 16), normal(1, 20, 1, 16)
    with no_wait(machine):
        fastattn.attention_fp8(q, k, v, causal=True)
    assert any("forward_fp8" in str(launch) for launch in machine.launches), machine.launches


def derivatives() -> Callable[[], object]:
    """Forward mode and double backward."""
    q, k, v = normal(1, 20, 2, 16, grad=True), normal(1, 20, 1, 16), normal(1, 20, 1, 16)

    def run() -> object:
        moved = torch.func.jvp(lambda *x: fastattn.attention(*x, causal=True), (q.detach(), k, v), (q.detach(), v, k))
        (once,) = torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), q, create_graph=True)
        return moved, torch.autograd.grad(once.square().sum(), q)

    return run


def statistics() -> Callable[[], object]:
    q, k = normal(1, 20, 2, 16, grad=True), normal(1, 20, 1, 16)

    def run() -> object:
        found = attention_statistics(q, k, causal=True)
        return torch.autograd.grad(found.entropy.sum() + found.largest_logit.sum(), q)

    return run


@pytest.mark.parametrize("prepare", CALLS.values(), ids=CALLS)
def test_a_call_runs_kernels_and_never_waits(
    prepare: Callable[[], Callable[[], object]], machine: simulated.Machine
) -> None:
    run = prepare()
    with no_wait(machine):
        run()
        first = len(machine.launches)
        run()
    assert len(machine.launches) == 2 * first and (first > 0) == (prepare is not explained)


@pytest.mark.parametrize("prepare", [dense, terms, varlen, paged_step, intervals, tree_step], ids=lambda p: p.__name__)
def test_it_runs_on_the_current_stream_of_its_own_device(
    prepare: Callable[[], Callable[[], object]], machine: simulated.Machine
) -> None:
    """Whichever device is current."""
    run, side = prepare(), torch.cuda.Stream()
    with torch.cuda.stream(side), torch.cuda.device(1):
        run()
        assert torch.cuda.current_device() == 1
    assert {(launch.device, launch.stream) for launch in machine.launches} == {(0, side.cuda_stream)}


@pytest.mark.parametrize(
    ("prepare", "kernels"),
    [
        (derivatives, {"jvp_kernel", "backward_jvp_dq_kernel"}),
        (statistics, {"row_statistics_kernel", "key_statistics_kernel", "statistics_dq_kernel"}),
    ],
    ids=["derivatives", "statistics"],
)
def test_the_kernels_of_derivatives(
    prepare: Callable[[], Callable[[], object]], kernels: set[str], machine: simulated.Machine
) -> None:
    run = prepare()
    with no_wait(machine):
        run()
    assert kernels <= {launch.kernel for launch in machine.launches}
    assert {launch.device for launch in machine.launches} == {0}


def test_another_device(machine: simulated.Machine) -> None:
    here = [normal(1, 20, 2, 16, grad=True) for _ in range(3)]
    there = [x.detach().to("cuda:1").requires_grad_() for x in here]
    results = []
    for tensors in (here, there):
        out = fastattn.attention(*tensors, causal=True)
        results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    assert all(torch.equal(x.cpu(), y.cpu()) and y.device.index == 1 for x, y in zip(*results, strict=True))
    with pytest.raises(fastattn.errors.InputError, match="device"):
        fastattn.attention(here[0], here[1], there[2])


def test_gradients_without_a_wait(machine: simulated.Machine) -> None:
    leaves = [normal(1, 20, 2, 16, grad=True) for _ in range(3)]
    with no_wait(machine):
        out = fastattn.attention(*leaves, window=(7, 3))
        out.backward(torch.ones_like(out))
    assert [launch.kernel for launch in machine.launches] == [
        "forward_kernel",
        "backward_preprocess_kernel",
        "backward_dkdv_kernel",
        "backward_dq_kernel",
    ]
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)


def test_intervals_both_passes(machine: simulated.Machine) -> None:
    """Through the public function, judged; the gradients by Triton's kernels, too."""
    sample = make(Case(id="intervals", S_q=33, S_kv=40, H_q=4, intervals="random", right=0), device="cuda:0")
    inputs = sample.inputs
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    options: dict[str, Any] = {"intervals": inputs.intervals, "causal": True}
    assert fastattn.explain(*leaves, **options).chosen == "triton"
    machine.launches.clear()
    out, lse = fastattn.attention(*leaves, **options, return_lse=True)
    grads = torch.autograd.grad(out, leaves, sample.dout)
    found = {"out": out.detach(), "lse": lse.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert_within(Yardstick(sample).judge(found))
    assert {launch.kernel for launch in machine.launches} >= {
        "forward_kernel",
        "backward_dkdv_kernel",
        "backward_dq_kernel",
    }


def test_a_tree_of_new_tokens(machine: simulated.Machine) -> None:
    """The row of each node is that of its path alone, decoded from the same pages."""
    table, mask, lengths = torch.arange(4, device="cuda").int().view(1, 4), tree_mask(PARENTS).cuda(), ints(9)
    q, new = normal(1, 5, 4, 16, dtype=torch.float32), normal(1, 5, 2, 16, dtype=torch.float32)
    cache = normal(4, 8, 2, 16, dtype=torch.float32)
    options: dict[str, Any] = {"block_table": table, "alibi_slopes": torch.ones(4, device="cuda")}
    asked = (q, cache, cache.clone(), lengths, new, new)
    assert fastattn.explain_with_kv_cache(*asked, tree_mask=mask, **options).chosen == "triton"
    out = fastattn.attention_with_kv_cache(
        q, cache.clone(), cache.clone(), lengths, new, new, tree_mask=mask, **options
    )
    assert isinstance(out, Tensor)
    for node in range(len(PARENTS)):
        path = [row for row in range(5) if int(mask[0, node, 0]) >> row & 1]
        rows = new[:, path]
        alone = fastattn.attention_with_kv_cache(
            q[:, path], cache.clone(), cache.clone(), lengths, rows, rows, **options
        )
        torch.testing.assert_close(out[:, node], alone[:, -1])


def test_a_fresh_thread(machine: simulated.Machine) -> None:
    """Servers and autograd have threads in which nothing of CUDA was set up."""
    q = normal(1, 20, 2, 16, device="cuda:1", grad=True)
    found: list[Any] = []

    def run() -> None:
        try:
            out = fastattn.attention(q, q, q)
            out.sum().backward()
            found.append(out.device.index)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1] and q.grad is not None


@pytest.mark.parametrize("needs_grad", [False, True])
def test_compiled(needs_grad: bool, machine: simulated.Machine) -> None:
    q = normal(1, 20, 2, 16, grad=needs_grad)
    compiled = torch.compile(
        lambda x: fastattn.attention(x, x, x, causal=True) + 1, backend="aot_eager", fullgraph=True
    )
    out = compiled(q)
    assert torch.equal(out, fastattn.attention(q, q, q, causal=True) + 1)
    if needs_grad:
        out.sum().backward()
        assert q.grad is not None and "backward_dq_kernel" in {launch.kernel for launch in machine.launches}


@pytest.mark.parametrize("kind", ["tiny", "encoder-tiny", "seq2seq-tiny"])
def test_a_training_step_and_generation(kind: str, machine: simulated.Machine) -> None:
    """The step is that of the CPU, apart from its rounding; generation waits for tokens alone."""
    config = preset(kind, vocab_size=64)
    on_cpu, ids = make_model(config).eval(), torch.randint(1, 60, (1, 8))
    torch.manual_seed(0)
    model = make_model(config).eval()
    on_cpu.load_state_dict(model.state_dict())
    model.to("cuda")

    def step(on: torch.nn.Module, tokens: Tensor) -> Tensor:
        out = on(tokens, tokens) if kind == "seq2seq-tiny" else on(tokens)
        out = out if isinstance(out, Tensor) else out[0]
        out.float().square().mean().backward()
        return out

    there = ids.to("cuda")
    with no_wait(machine):
        out = step(model, there)
    torch.testing.assert_close(out.cpu(), step(on_cpu, ids), rtol=1e-3, atol=1e-3)
    for ours, expected in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), expected.grad, rtol=1e-2, atol=1e-3)  # type: ignore[union-attr]
    if kind == "tiny":
        machine.waits.clear()
        assert model.generate(there, max_new_tokens=2)
        assert {wait.operator for wait in machine.waits} == {"aten::copy_"} and len(machine.waits) <= 2


def test_the_path_of_hugging_face(machine: simulated.Machine) -> None:
    transformers = pytest.importorskip("transformers")
    from fastattn.integrations.transformers import register

    register()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, attn_implementation="fastattn")
    model = transformers.LlamaForCausalLM(config).to("cuda").to(BF16)
    ids = torch.randint(1, 40, (1, 12), device="cuda")
    assert model(input_ids=ids).logits.is_cuda
    assert {launch.kernel for launch in machine.launches} == {"forward_kernel"}


def test_torchs_own_attention_replaced(machine: simulated.Machine) -> None:
    q = normal(1, 2, 20, 16)
    with override_sdpa():
        F.scaled_dot_product_attention(q, q, q)
    assert [launch.kernel for launch in machine.launches] == ["forward_kernel"]


def test_nothing_unwritten_passes(machine: simulated.Machine) -> None:
    """Fresh memory is NaN on this device, so results that are finite were written."""
    q, bias = normal(1, 20, 2, 16, grad=True), normal(1, 1, 20, 20, grad=True)
    out = fastattn.attention(q, q, q, bias=bias)
    out.sum().backward()
    assert all(bool(x.isfinite().all()) for x in (out, q.grad, bias.grad))
