"""Context parallel: attention over rows whose tokens are sharded across the ranks of a process group.

``SequenceSharding`` assigns tokens to ranks; the two functions return exactly the result of a single process:

- ``ring_attention`` passes keys and values round the ranks. It takes any number of heads and the memory of one rank's
  tokens.
- ``ulysses_attention`` exchanges tokens for heads, computes whole rows for some heads, and exchanges them back. It
  sends fewer, larger messages; the number of ranks must divide the query heads.

With a causal mask and tokens assigned in order, the last rank would have most of the work. ``SequenceSharding``
assigns head and tail: of ``2 n`` chunks of a document, rank ``r`` of ``n`` holds chunks ``r`` and ``2 n - 1 - r``.

``sharded`` has a model that calls ``fastattn.attention`` use either of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from fastattn import rng, state
from fastattn.arguments import Window, dense_problem
from fastattn.dispatch import check_name, requested
from fastattn.errors import UnsupportedError, input_error
from fastattn.functional import attention, attention_varlen
from fastattn.integrations.context_parallel_ring import Attend, Call
from fastattn.integrations.context_parallel_sharding import Alone, SequenceSharding
from fastattn.problem import Inputs, check_inputs, check_scores_shape
from fastattn.spec import AttentionSpec

__all__ = ["SequenceSharding", "ring_attention", "sharded", "ulysses_attention"]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: SequenceSharding,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``fastattn.attention`` over sharded rows; keys and values travel round the ring of ranks.

    Each rank computes its rows with one rank's keys while the next arrive, and merges the parts by log-sum-exp. Pairs
    outside the causal mask, window or document are not computed. In the backward pass keys, values and their gradients
    go round once more. Beside its arguments and its result a rank holds the output in fp32 and its keys and values
    three times: those at work, those arriving and those of the part at work. Every rank must call it.

    Args:
        q: this rank's queries ``(B, T, H_q, D_qk)``, from ``sharding.shard``; or a DTensor, see below.
        k: this rank's keys ``(B, T, H_kv, D_qk)``.
        v: this rank's values ``(B, T, H_kv, D_v)``.
        sharding: which tokens these are.
        causal: as in ``attention``; it refers to the whole row, and with several documents to each of them, as do the
            other options.
        window: as in ``attention``.
        scale: as in ``attention``.
        softcap: as in ``attention``.
        bias: added to the scores, broadcasts to ``(B, H_q, T, S)``: this rank's rows, and every key of the row in
            order.
        mask: boolean, True = attend, likewise.
        alibi_slopes: as in ``attention``.
        sinks: ``(H_q,)``, the same on every rank.
        segment_ids: ``(B, T)`` of this rank's tokens.
        dropout_p: as in ``attention``; elements are numbered over the whole row, in documents as in
            ``attention_varlen``. The ``portable`` backend serves it.
        rng_state: as in ``attention``, the same on every rank; None draws on the first one.
        backend: as in ``attention``.

    Returns:
        this rank's rows ``(B, T, H_q, D_v)``; differentiable. The gradients of ``sinks``, and of a ``bias`` that has
        one row for all, are those of this rank's rows: their sum over the ranks is the whole, as for any parameter.

        DTensors ``Shard(1)`` on a mesh of the sharding's ranks give a DTensor; their tokens lie in order, so the
        sharding has ``head_tail=False``.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: the backend asked for cannot serve the call.

    Source:
        Liu et al., "Ring attention with blockwise transformers for near-infinite context", 2023; head and tail chunks:
        Llama 3, section 3.3.2, 2024.
    """
    if isinstance(q, DTensor):
        given = {name: x for name, x in locals().items() if name not in ("q", "k", "v", "sharding")}
        return _of_dtensors(q, k, v, sharding, given)
    inputs, spec = _problem(
        q, k, v, sharding, causal, window, bias, mask, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, segment_ids=segment_ids, dropout_p=dropout_p, rng_state=rng_state,
    )  # fmt: skip
    return _attend(inputs, sharding, spec, backend, inputs.heads_q)


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: SequenceSharding,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``fastattn.attention`` over sharded rows; ranks exchange tokens for heads, all to all, and back.

    A rank holds whole rows of its heads: as many numbers of q, k, v and out as before, twice while they are exchanged.

    Args:
        q: this rank's queries ``(B, T, H_q, D_qk)``; the number of ranks divides ``H_q``.
        k: this rank's keys ``(B, T, H_kv, D_qk)``; the number of ranks divides ``H_kv``, or the other way round.
        v: this rank's values ``(B, T, H_kv, D_v)``.
        sharding: which tokens these are.
        causal: this and the others as in ``ring_attention``.
        window: as there.
        scale: as there.
        softcap: as there.
        bias: as there; the rows and heads are exchanged too.
        mask: as there, likewise.
        alibi_slopes: as there.
        sinks: as there; the gradient is that of this rank's heads.
        segment_ids: as there.
        dropout_p: as there.
        rng_state: as there.
        backend: as there.

    Returns:
        this rank's rows ``(B, T, H_q, D_v)``; differentiable.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: the backend asked for cannot serve the call.

    Source:
        Jacobs et al., "DeepSpeed Ulysses", 2023.
    """
    inputs, spec = _problem(
        q, k, v, sharding, causal, window, bias, mask, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, segment_ids=segment_ids, dropout_p=dropout_p, rng_state=rng_state,
    )  # fmt: skip
    size, heads_q, heads_kv = sharding.size, inputs.heads_q, inputs.heads_kv
    if heads_q % size or (heads_kv % size and size % heads_kv):
        allowed = (
            f"a number of query heads that {size} ranks divide, and of key heads that they divide or that divides it"
        )
        raise input_error("q, k", f"{heads_q} and {heads_kv} heads", allowed, "ring_attention takes any number.")
    tokens, length = q.shape[1], sharding.row_length(q.shape[1])
    exchange = _Exchange(sharding, tokens, length)
    whole = exchange.problem(inputs)
    more = (whole.bias, whole.mask, whole.segment_ids_q)
    if spec.dropout_p == 0 and (sharding.lengths is None or all(x is None for x in more)):
        out = _by_public_function(whole, spec, sharding, backend)
    else:
        alone = Alone(head_tail=False, lengths=sharding.lengths)
        out = _attend(whole, alone, spec, backend, heads_q, sharding.rank * (heads_q // size))
    return exchange.to_tokens(out)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: SequenceSharding,
    causal: bool,
    window: Window | None,
    bias: Tensor | None,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Inputs, AttentionSpec]:
    """A rank's tensors as ``Inputs``; bias and mask have a column for each key of the row."""
    rng_state = options.pop("rng_state")
    inputs, spec = dense_problem(
        q, k, v, causal=causal, window=window, bias=None, mask=None, rng_state=rng_state, layout="BSHD", **options
    )
    check_inputs(inputs, spec)
    if q.shape[1] != k.shape[1]:
        raise input_error("k", f"{k.shape[1]} tokens", f"{q.shape[1]}, as q", "Shard both with the same sharding.")
    row = torch.empty(q.shape[0], sharding.row_length(q.shape[1]), device="meta")
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            check_scores_shape(name, x, q, row)
            inputs = inputs.replace(**{name: x[(None,) * (4 - x.dim())]})
    if mask is not None and mask.dtype != torch.bool:
        raise input_error("mask", mask.dtype, "torch.bool, True = attend", "Pass a float mask as bias=.")
    if spec.dropout_p and rng_state is None:
        rng_state = rng.new_rng_state(q.device)
        if sharding.size > 1:
            dist.broadcast(rng_state, dist.get_global_rank(sharding.processes(), 0), sharding.group)
    return inputs.replace(rng_state=rng_state if spec.dropout_p else None), spec


def _attend(
    inputs: Inputs,
    sharding: SequenceSharding,
    spec: AttentionSpec,
    backend: str | None,
    heads: int,
    first_head: int = 0,
) -> Tensor:
    """Block by block, the keys of each rank of the sharding after those of another."""
    check_name(backend)
    backend = requested(backend)
    if spec.dropout_p and backend not in (None, "portable", "eager"):
        todo = "Leave it out: kernels number the elements of dropout from the beginning of a call."
        raise input_error("backend", f"{backend!r} with dropout", "None, 'portable' or 'eager'", todo)
    call = Call(
        sharding, spec, backend, inputs.mask, inputs.alibi_slopes, inputs.segment_ids_q, inputs.segment_ids_kv,
        inputs.rng_state, heads, first_head,
    )  # fmt: skip
    return Attend.apply(inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks, call)


def _by_public_function(inputs: Inputs, spec: AttentionSpec, sharding: SequenceSharding, backend: str | None) -> Tensor:
    """Whole rows in one call of ``attention``, or of ``attention_varlen`` for documents."""
    options: dict[str, Any] = {
        "window": (spec.left, spec.right), "scale": spec.scale, "softcap": spec.softcap, "backend": backend
    }  # fmt: skip
    q, k, v = inputs.q, inputs.k, inputs.v
    if sharding.lengths is None:
        segments = None
        if inputs.segment_ids_q is not None and inputs.segment_ids_kv is not None:
            segments = inputs.segment_ids_q, inputs.segment_ids_kv
        out = attention(
            q, k, v, bias=inputs.bias, mask=inputs.mask, alibi_slopes=_whole(inputs.alibi_slopes),
            sinks=_whole(inputs.sinks), segment_ids=segments, **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    batch, lengths = q.shape[0], sharding.lengths
    ends = torch.tensor([0, *lengths * batch], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device)
    longest = max(lengths)
    each = {
        name: x if x is None or x.shape[0] == 1 else x.repeat_interleave(len(lengths), 0)
        for name, x in (("alibi_slopes", inputs.alibi_slopes), ("sinks", inputs.sinks))
    }
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = attention_varlen(
        q, k, v, ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest, alibi_slopes=_whole(each["alibi_slopes"]),
        sinks=_whole(each["sinks"]), **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, -1))


def _whole(x: Tensor | None) -> Tensor | None:
    """``(H_q,)`` from ``(1, H_q)``."""
    return x[0] if x is not None and x.shape[0] == 1 else x


# --- all to all ---------------------------------------------------------------------------------------------------


class _Exchange:
    """Tokens of all heads for all tokens of some heads, in the order of the row, and back."""

    def __init__(self, sharding: SequenceSharding, tokens: int, length: int) -> None:
        self.sharding, self.mine = sharding, tokens
        self.tokens = [sharding.num_tokens(length, rank) for rank in range(sharding.size)]
        self.order = sharding.order(length)

    def problem(self, inputs: Inputs) -> Inputs:
        """The same problem for whole rows of this rank's heads."""
        size, heads_kv = self.sharding.size, inputs.heads_kv
        k, v = inputs.k, inputs.v
        if heads_kv % size:
            k, v = (x.repeat_interleave(size // heads_kv, dim=2) for x in (k, v))
        segments = None if inputs.segment_ids_q is None else self.sharding.unshard(inputs.segment_ids_q)
        mask = None if inputs.mask is None else self._scores_term(inputs.mask.to(torch.uint8), inputs.heads_q) != 0
        return inputs.replace(
            q=self.to_heads(inputs.q), k=self.to_heads(k), v=self.to_heads(v), mask=mask,
            bias=None if inputs.bias is None else self._scores_term(inputs.bias, inputs.heads_q),
            alibi_slopes=self._own_heads(inputs.alibi_slopes, 1), sinks=self._own_heads(inputs.sinks, 1),
            segment_ids_q=segments, segment_ids_kv=segments,
            max_seqlen_q=sum(self.tokens), max_seqlen_kv=sum(self.tokens),
        )  # fmt: skip

    def to_heads(self, x: Tensor) -> Tensor:
        """``(B, T, H, D)`` of some tokens -> ``(B, S, H / n, D)`` of some heads."""
        by_owner = x.unflatten(2, (self.sharding.size, -1)).movedim(2, 0)
        shape = by_owner.shape[1:]
        received = self._all_to_all(by_owner, [shape.numel()] * len(self.tokens), self._sizes(shape, 1))
        parts = [
            part.view(shape[0], n, *shape[2:])
            for part, n in zip(received.split(self._sizes(shape, 1)), self.tokens, strict=True)
        ]
        return torch.cat(parts, 1).index_select(1, self.order.argsort().to(x.device))

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse."""
        parts = x.index_select(1, self.order.to(x.device)).split(self.tokens, 1)
        shape = (x.shape[0], self.mine, *x.shape[2:])
        mine = torch.Size(shape).numel()
        flat = torch.cat([part.reshape(-1) for part in parts])
        received = self._all_to_all(flat, self._sizes(x.shape, 1), [mine] * len(self.tokens))
        return received.view(len(self.tokens), *shape).movedim(0, 2).flatten(2, 3)

    def _all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return _AllToAll.apply(x.reshape(-1), sent, received, self.sharding.group)

    def _sizes(self, shape: torch.Size, dim: int) -> list[int]:
        """Numbers of tensors of this shape with the tokens of each rank along ``dim``."""
        each = torch.Size([*shape[:dim], *shape[dim + 1 :]]).numel()
        return [n * each for n in self.tokens]

    def _own_heads(self, x: Tensor | None, dim: int) -> Tensor | None:
        return x if x is None or x.shape[dim] == 1 else x.chunk(self.sharding.size, dim)[self.sharding.rank]

    def _scores_term(self, x: Tensor, heads: int) -> Tensor:
        """``(1|B, 1|H, 1|T, 1|S)`` of this rank's rows -> of all rows and its heads."""
        if x.shape[2] == 1:
            own = self._own_heads(x, 1)
            assert own is not None
            return own
        if x.shape[1] == 1:
            x = x.expand(-1, self.sharding.size, -1, -1)
        return self.to_heads(x.transpose(1, 2)).transpose(1, 2)


class _AllToAll(torch.autograd.Function):
    """Each rank gets of every rank the numbers that it holds for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.back = received, sent, group
        found = x.new_empty(sum(received))
        dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, *ctx.back), None, None, None


# --- in models ----------------------------------------------------------------------------------------------------


WAYS: dict[str, Callable[..., Tensor]] = {"ring": ring_attention, "ulysses": ulysses_attention}


@contextlib.contextmanager
def sharded(sharding: SequenceSharding, way: Literal["ring", "ulysses"] = "ring") -> Iterator[None]:
    """Have ``fastattn.attention`` attend to whole rows, of which the caller holds this rank's tokens.

    A model that calls it, and is otherwise a function of each token, then computes what a single process would: give
    it ``sharding.shard(tokens)`` and ``sharding.positions(length)``. The backward pass may lie outside, unless it
    computes activations again. The context is that of the process, not of a thread. Inside torch's own
    ``context_parallel`` it takes the place of torch's ring; torch shards head and tail, as ``SequenceSharding`` does.

    What cannot be right is refused: other functions of fastattn, torch's ``scaled_dot_product_attention``,
    ``return_lse``, ``return_weights``, ``return_stats``, ``torch.compile``.

    Args:
        sharding: which tokens the ranks hold.
        way: "ring" is ``ring_attention``, "ulysses" is ``ulysses_attention``.

    Raises:
        InputError: there is no such way.
        UnsupportedError: from a call inside that does not know of the other ranks.

    Example:
        >>> import torch, torch.distributed as dist, fastattn
        >>> from fastattn.integrations.context_parallel import SequenceSharding, sharded
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.randn(1, 64, 8, 32)
        >>> with sharded(SequenceSharding()):
        ...     out = fastattn.attention(x, x, x, causal=True)
        >>> torch.allclose(out, fastattn.attention(x, x, x, causal=True), atol=1e-5)
        True
        >>> dist.destroy_process_group()
    """
    if way not in WAYS:
        raise input_error("way", repr(way), ", ".join(map(repr, WAYS)), "The ring takes any number of heads.")
    function, before = WAYS[way], state.whole_rows

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        state.whole_rows = None
        try:
            return _for_whole_rows(function, sharding, q, k, v, options)
        finally:
            state.whole_rows = attend

    state.whole_rows = attend
    try:
        with _RefuseTorchs():
            yield
    finally:
        state.whole_rows = before


class _RefuseTorchs(TorchFunctionMode):
    """Refuses torch's own attention, of anything but DTensors, which know what they hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._nn.scaled_dot_product_attention and not any(issubclass(t, DTensor) for t in types):
            todo = "Call fastattn.attention, or leave the context."
            raise UnsupportedError(f"torch's attention inside sharded() would see this rank's tokens alone. {todo}")
        return func(*args, **(kwargs or {}))


def _for_whole_rows(
    function: Callable[..., Tensor],
    sharding: SequenceSharding,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """A call of ``fastattn.attention`` by ``function``."""
    refused = [name for name in ("return_lse", "return_weights", "return_stats") if options.pop(name)]
    refused += ["intervals"] if options.pop("intervals") is not None else []
    segments = options["segment_ids"]
    if isinstance(segments, tuple):
        options["segment_ids"] = segments[0]
        refused += [] if segments[0] is segments[1] else ["two kinds of segment_ids"]
    if refused:
        raise UnsupportedError(f"{', '.join(refused)} inside sharded(): leave it out, or leave the context.")
    if options.pop("layout") == "BHSD":
        return function(*(x.transpose(1, 2) for x in (q, k, v)), sharding, **options).transpose(1, 2)
    return function(q, k, v, sharding, **options)


def _of_dtensors(q: DTensor, k: Tensor, v: Tensor, sharding: SequenceSharding, options: dict[str, Any]) -> Tensor:
    """``ring_attention`` of DTensors whose tokens are split in order over the ranks of the sharding."""
    ranks = dist.get_process_group_ranks(sharding.processes())
    mesh = q.device_mesh
    for name, x in (("q", q), ("k", k), ("v", v)):
        is_split = isinstance(x, DTensor) and x.device_mesh == mesh and x.placements == (Shard(1),)
        if not is_split or mesh.mesh.flatten().tolist() != ranks:
            given = f"{x.placements} on {x.device_mesh}" if isinstance(x, DTensor) else type(x).__name__
            raise input_error(name, given, f"(Shard(dim=1),) on a mesh of the ranks {ranks}", "Redistribute it.")
    if sharding.head_tail or sharding.lengths is not None or q.shape[1] % sharding.size:
        given = f"{sharding} of {q.shape[1]} tokens"
        todo = "A DTensor holds its tokens in order, as many on each rank."
        raise input_error("sharding", given, "head_tail=False, lengths=None, and a length that divides", todo)
    local: dict[str, Any] = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in options.items()}
    own_q, own_k, own_v = (x.to_local() if isinstance(x, DTensor) else x for x in (q, k, v))
    out = ring_attention(own_q, own_k, own_v, sharding, **local)
    return DTensor.from_local(out, mesh, (Shard(1),), run_check=False)
