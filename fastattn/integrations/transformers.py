"""Hugging Face transformers 5: ``register()``, then ``attn_implementation="fastattn"`` in any model.

``attention_forward`` computes attention for transformers, ``attention_mask`` builds its masks. transformers passes
``(B, H, S, D)`` views with key heads not repeated, a boolean ``(B, 1, S_q, S_kv)`` mask that combines padding,
causality and window, or no mask if causality alone is meant, and every keyword of the model's ``forward``. Keywords
that change attention are applied; those that do not are listed in ``IRRELEVANT``; any other raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import rng
from fastattn.errors import UnsupportedError, input_error
from fastattn.functional import attention, attention_varlen
from fastattn.inspection import attention_weights
from fastattn.integrations import transformers_packing as packing
from fastattn.integrations.transformers_families import (
    expects_float_masks,
    may_leave_masks_out,
    refuse_outsiders,
    refuse_tables,
)
from fastattn.nn.lazy import weights_when_read

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import output_capturing
except ImportError as error:
    raise ImportError(
        "fastattn.integrations.transformers needs transformers 5.17 or newer: pip install 'fastattn[hf]'"
    ) from error

# Keywords of a model's forward that are passed to its attention function and do not change attention.
IRRELEVANT = frozenset({
    "use_cache", "cache_position", "position_embeddings", "num_items_in_batch", "return_dict", "output_hidden_states",
    "output_router_logits", "logits_to_keep", "seq_idx", "token_type_ids", "deterministic",
})  # fmt: skip


def register(name: str = "fastattn") -> None:
    """Register ``attn_implementation=name`` with transformers. It changes no model by itself and may be called again.

    Args:
        name: the name to register under.

    Example:
        >>> import transformers
        >>> from fastattn.integrations.transformers import register
        >>> register()
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)
        >>> model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="fastattn")
        >>> model.config._attn_implementation
        'fastattn'
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    check = PreTrainedModel._check_and_adjust_attn_implementation
    names = getattr(check, "of_fastattn", None)
    if names is None:
        names = _check_with_tables(check)
    names.add(name)


def _check_with_tables(check: Callable[..., str]) -> set[str]:
    """Have transformers' check of an implementation's name refuse families by name that would end in a KeyError.

    Returns:
        the names for which it does so, to be filled.
    """
    names: set[str] = set()

    @functools.wraps(check)
    def checked(self: Any, attn_implementation: str | None, is_init_check: bool = False, **others: Any) -> str:
        if is_init_check and attn_implementation in names:
            refuse_tables(self.config, attn_implementation)
        return check(self, attn_implementation, is_init_check=is_init_check, **others)

    checked.of_fastattn = names  # type: ignore[attr-defined]
    PreTrainedModel._check_and_adjust_attn_implementation = checked  # type: ignore[method-assign, assignment]
    return names


def attention_mask(
    *args: Any,
    config: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """The mask that transformers makes for SDPA; a causal one is omitted only if all layers state ``is_causal``.

    Args:
        args: as ``transformers.masking_utils.sdpa_mask``.
        config: the config of the model.
        allow_is_causal_skip: the caller allows None for a mask that is causal and nothing else.
        allow_is_bidirectional_skip: the caller allows None for a mask that keeps everything.
        others: as ``sdpa_mask``.

    Returns:
        boolean ``(B, 1, S_q, S_kv)``, True = attend, or None. Families that were written for eager's masks get a
        floating one, 0 or the least number, with the boolean one as its attribute ``keeps``. The attribute
        ``knows_no_documents`` says that transformers may not have noticed packed documents.

    Raises:
        UnsupportedError: the family of the model computes attention itself.
    """
    if config is not None:
        refuse_outsiders(config)
    others |= {
        "config": config,
        "allow_is_causal_skip": allow_is_causal_skip and config is not None and may_leave_masks_out(config),
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
    }
    keeps = sdpa_mask(*args, **others)
    if keeps is None:
        return None
    made = keeps
    if config is not None and expects_float_masks(config):
        dtype = others.get("dtype", torch.float32)
        made = torch.where(keeps, torch.zeros((), dtype=dtype, device=keeps.device), torch.finfo(dtype).min)
    if not torch.compiler.is_compiling():
        vars(made).update(keeps=keeps, knows_no_documents=not allow_is_bidirectional_skip)
    return made


class _Call(NamedTuple):
    """One attention call in fastattn's terms, ``(B, S, H, D)``.

    ``causal`` and ``window`` are those of the layer. They apply only without a mask, since a mask includes them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    window: tuple[int, int] | None
    scores: dict[str, Any]
    with_weights: bool

    @property
    def is_plain(self) -> bool:
        """Whether packed sequences can serve the call: no mask, no bias, and no weights to return."""
        return self.mask is None and self.bias is None and not self.with_weights

    def dense(self, segment_ids: Any = None) -> tuple[Tensor, Tensor | None]:
        options = self.scores | {
            "causal": self.causal, "window": self.window, "bias": self.bias, "mask": self.mask,
            "segment_ids": segment_ids,
        }  # fmt: skip
        if not self.with_weights:
            return attention(self.q, self.k, self.v, **options), None  # type: ignore[return-value]
        options["rng_state"] = rng.new_rng_state(self.q.device) if options["dropout_p"] else None
        out = attention(self.q, self.k, self.v, **options)
        return out, weights_when_read(self.q, self.k, self.q.dtype, **options)  # type: ignore[return-value]

    def packed(self, cu_q: Tensor, cu_kv: Tensor, max_q: int | None, max_kv: int | None) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (self.q, self.k, self.v))
        options: dict[str, Any] = {
            "max_seqlen_q": max_q,
            "max_seqlen_kv": max_kv,
            "causal": self.causal,
            "window": self.window,
        }
        out = attention_varlen(q, k, v, cu_q, cu_kv, **options, **self.scores)
        assert isinstance(out, Tensor)
        return out.view(*self.q.shape[:2], *out.shape[1:])

    def with_sinks_of_rows(self, sinks: Tensor, segment_ids: Any = None) -> tuple[Tensor, Tensor | None]:
        """A sink for each row, ``(B, H_q, S_q, 1)``: it takes ``exp(sink)`` of ``exp(lse) + exp(sink)``."""
        options = self.scores | {"causal": self.causal, "window": self.window, "bias": self.bias, "mask": self.mask}
        options |= {"segment_ids": segment_ids, "rng_state": rng.new_rng_state(self.q.device)}
        out, lse = attention(self.q, self.k, self.v, return_lse=True, **options)
        share = torch.sigmoid(lse[..., None] - sinks.float())
        weights = attention_weights(self.q, self.k, **options) * share if self.with_weights else None
        out = (out * share.transpose(1, 2)).to(self.q.dtype)
        return out, weights if weights is None else weights.to(self.q.dtype)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls. Users call ``register``.

    Args:
        module: the attention layer; its ``is_causal`` applies unless the keyword is given.
        query: ``(B, H_q, S_q, D_qk)``.
        key: ``(B, H_kv, S_kv, D_qk)``.
        value: ``(B, H_kv, S_kv, D_v)``.
        attention_mask: boolean ``(B, 1, S_q, S_kv)``, True = attend, or a float one that is added; complete, so
            neither causality nor a window is added to it. None: causality, if the layer is causal, and the window. In
            families whose layers do not all state ``is_causal`` (``transformers_families``) None is no mask at all.
        scaling: factor on the scores; None is ``D_qk ** -0.5``.
        dropout: probability of dropping an attention weight, 0 in evaluation.
        is_causal: attend to no later key.
        sliding_window: the W latest keys, the query's own included.
        softcap: Gemma 2's ``softcap * tanh(scores / softcap)``.
        s_aux: ``(H_q,)``, GPT-OSS's sinks.
        sinks: the same, or ``(B, H_q, S_q, 1)``, a sink for each row, as Inkling 2 has.
        position_bias: ``(1|B, H_q, S_q, S_kv)``, T5's; added to the scores.
        indices: ``(B, S_q, n)``, the only keys that each query sees, as in DeepSeek's sparse attention.
        block_indices: the only blocks of keys, as the layer's own indexer reads them (MiniMax M3).
        position_ids: ``(B, S_q)``; where they restart at 0, another document begins, unless a complete mask is given.
        cu_seq_lens_q: boundaries of sequences packed into a batch of one, with the next three.
        cu_seq_lens_k: boundaries of the keys.
        max_length_q: longest query sequence.
        max_length_k: longest key sequence.
        output_attentions: return the attention weights too; they are computed when they are first read.
        others: the remaining keywords of the model's forward.

    Returns:
        ``out`` ``(B, S_q, H_q, D_v)``, contiguous, and the weights ``(B, H_q, S_q, S_kv)`` if the model was called
        with ``output_attentions=True``, else None.

    Raises:
        InputError: the mask is of another kind, or the layer does not state whether it is causal.
        UnsupportedError: a keyword that may change attention is not known.
    """
    if others:
        _refuse_unknown(others)
    is_plain = attention_mask is position_bias is s_aux is sinks is indices is block_indices is cu_seq_lens_q is None
    if is_plain and not (output_attentions or _capturing_attentions()):
        # the commonest call, on q, k and v alone, without transposing each; not of documents or unequal shapes
        (rows, _, s_q, _), of_keys = query.shape, key.shape
        causal = s_q > 1 and _is_causal(module, is_causal)
        is_one_document = not causal or (of_keys[2] <= s_q and packing.documents_of(position_ids, rows, s_q) is None)
        if of_keys[0] == rows and is_one_document:
            window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
            out = attention(
                query, key, value, causal=causal, window=window, scale=scaling, softcap=softcap, dropout_p=dropout,
                layout="BHSD",
            )  # fmt: skip
            return out.transpose(1, 2), None  # type: ignore[union-attr]
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, shared by the batch
    if block_indices is not None:
        attention_mask = _of_blocks(module, block_indices, attention_mask, query, key, position_ids)
    causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, is_causal)
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    mask, bias = _mask_and_bias(attention_mask, position_bias)
    if indices is not None:
        chosen = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=key.device)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]
        mask = chosen if mask is None else mask & chosen
    of_heads = s_aux if s_aux is not None else sinks if sinks is not None and sinks.dim() == 1 else None
    call = _Call(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, bias, causal,
        window if attention_mask is None else None,
        {"scale": scaling, "softcap": softcap, "sinks": of_heads, "dropout_p": dropout},
        bool(output_attentions) or _capturing_attentions(),
    )  # fmt: skip
    if sinks is not None and sinks.dim() != 1:
        return call.with_sinks_of_rows(sinks)
    if cu_seq_lens_q is not None:
        return _by_boundaries(call, window, (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k))
    return _by_positions(call, attention_mask, position_ids)


def _by_positions(call: _Call, attention_mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, Any]:
    """A padded batch, or documents that ``position_ids`` tell apart where transformers made no mask of them."""
    rows, s_q = call.q.shape[:2]
    if call.causal and call.k.shape[1] > s_q:  # prefill of a static cache, whose later rows are still empty
        bias = None if call.bias is None else call.bias[..., :s_q]
        call = call._replace(k=call.k[:, :s_q], v=call.v[:, :s_q], bias=bias)
    may_be_packed = call.causal or getattr(attention_mask, "knows_no_documents", False)
    documents = packing.documents_of(position_ids, rows, s_q) if may_be_packed else None
    if documents is None:
        return call.dense()
    if attention_mask is not None and call.k.shape[1] != s_q:
        packing.refuse_packing_beside_others(documents, attention_mask)
        return call.dense()
    if call.is_plain:
        return call.packed(documents.cu_seqlens, documents.cu_seqlens, documents.longest, documents.longest), None
    return call.dense(documents.segment_ids)


def _by_boundaries(
    call: _Call,
    window: tuple[int, int] | None,
    cu_seq_lens: tuple[Tensor, Tensor | None],
    longest: tuple[int | None, int | None],
) -> tuple[Tensor, Tensor | None]:
    """Sequences packed into a batch of one, and a mask beside their boundaries if there is one."""
    if call.q.shape[0] != 1 or cu_seq_lens[1] is None:
        todo = "Pass cu_seq_lens_q and cu_seq_lens_k with a batch of one, or padded batches without them."
        raise input_error("cu_seq_lens_q", f"batch {call.q.shape[0]}", "a batch of one, and cu_seq_lens_k too", todo)
    cu_q, cu_kv = (x.to(torch.int32) for x in cu_seq_lens if x is not None)
    max_q, max_kv = (None if n is None else int(n) for n in longest)
    if call.mask is not None and call.bias is None and not call.with_weights:
        may_say: Iterator[dict[str, Any]] = (
            {"causal": causal, "window": within}
            for causal, within in ((True, window), (False, None))
            if packing.says_no_more(call.mask, cu_seq_lens[0], causal, within)
        )
        if (says := next(may_say, None)) is not None:
            call = call._replace(mask=None, **says)  # the boundaries say all that the mask does
    if call.is_plain:
        return call.packed(cu_q, cu_kv, max_q, max_kv), None
    if (call.causal or call.window) and not torch.equal(cu_q, cu_kv):
        todo = "Leave position_bias and output_attentions out, or pass a complete attention_mask."
        raise input_error("cu_seq_lens_k", "other boundaries than cu_seq_lens_q", "the same ones", todo)
    segments = (packing.segments_of_boundaries(x, n) for x, n in ((cu_q, call.q.shape[1]), (cu_kv, call.k.shape[1])))
    return call.dense(tuple(segments))


def _is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Whether a call without a mask is causal, by the layer's ``is_causal``; there is no default."""
    if is_causal is not None:
        return bool(is_causal)
    says = getattr(module, "is_causal", None)
    if says is False:
        return False
    config = getattr(module, "config", None)
    if config is not None and not may_leave_masks_out(config):
        return False  # its masks are complete, and this call has none
    if says is None:
        todo = "Set is_causal on the layer, or pass is_causal= to the attention function."
        raise input_error("module", f"{type(module).__name__}, without is_causal or a mask", "a layer that says", todo)
    return bool(says)


def _of_blocks(
    module: Any, block_indices: Tensor, attention_mask: Tensor | None, query: Tensor, key: Tensor, at: Tensor | None
) -> Tensor:
    """The mask that the layer's indexer builds of its blocks, as the layer itself does for eager attention."""
    batch, s_q, s_kv = query.shape[0], query.shape[2], key.shape[2]
    at = torch.arange(s_kv - s_q, s_kv, device=query.device) if at is None else at
    at = (at if at.ndim > 1 else at[None]).expand(batch, -1)
    return module.indexer.build_block_mask(block_indices, attention_mask, s_kv, query.dtype, query.device, at)


def _mask_and_bias(attention_mask: Tensor | None, position_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if position_bias is not None and position_bias.stride(-1) > 1:
        position_bias = position_bias.contiguous()  # T5 makes it of an embedding; reading it across takes longer
    if attention_mask is None:
        return None, position_bias
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        given = f"shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else type(attention_mask)
        todo = "A (B, S) padding mask goes to the model's forward, which makes the complete one."
        raise input_error("attention_mask", given, "None or (B, 1, S_q, S_kv)", todo)
    attention_mask = getattr(attention_mask, "keeps", attention_mask)  # ours, untouched by the model
    if attention_mask.dtype == torch.bool:
        return attention_mask, position_bias
    return None, attention_mask if position_bias is None else position_bias + attention_mask


def _refuse_unknown(others: dict[str, Any]) -> None:
    if others.keys() <= IRRELEVANT:
        return
    unknown = [
        name for name, given in others.items() if name not in IRRELEVANT and not (given is None or given is False)
    ]
    if unknown:
        raise UnsupportedError(
            f"attn_implementation='fastattn' does not know the keyword{'s' * (len(unknown) > 1)} {', '.join(unknown)} "
            f"and will not guess whether to ignore {'them' if len(unknown) > 1 else 'it'}. Use another "
            "attn_implementation for this model, or, if attention does not depend on it, leave it out of the call."
        )


def _capturing_attentions() -> bool:
    """Whether the running forward was asked for attentions, which transformers tells only its own hooks."""
    collector = getattr(output_capturing, "_active_collector", None)
    wanted = None if collector is None else collector.get()
    return bool(wanted) and any("attentions" in key for key in wanted or ())
