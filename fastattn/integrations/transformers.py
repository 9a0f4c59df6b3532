"""Hugging Face transformers 5: ``register()``, then ``attn_implementation="fastattn"`` in any model.

The function that transformers calls, and the one that builds its masks. transformers hands over ``(B, H, S, D)`` views
with key heads not repeated, a boolean ``(B, 1, S_q, S_kv)`` mask that already holds padding, causality and window, or
no mask if causality alone is meant, and every keyword of the model's ``forward``. What changes attention is honoured;
what is known not to concern it is listed in ``IRRELEVANT``; anything else raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastattn import rng
from fastattn.errors import UnsupportedError, input_error
from fastattn.functional import attention, attention_varlen
from fastattn.inspection import attention_weights

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import output_capturing
except ImportError as error:
    raise ImportError(
        "fastattn.integrations.transformers needs transformers 5.17 or newer: pip install 'fastattn[hf]'"
    ) from error

# Keywords of a model's forward that travel to its attention function and make no difference there.
IRRELEVANT = frozenset({
    "use_cache", "cache_position", "position_embeddings", "num_items_in_batch", "return_dict", "output_hidden_states",
    "output_router_logits", "logits_to_keep", "seq_idx", "token_type_ids",
})  # fmt: skip

_unpacked = WeakTensorKeyDictionary()  # position_ids that hold one sequence per row, and the version looked at


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
    AttentionMaskInterface.register(name, sdpa_mask)


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
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it; ``register`` is what users need.

    Args:
        module: the attention layer; its ``is_causal`` applies unless the keyword is given.
        query: ``(B, H_q, S_q, D_qk)``.
        key: ``(B, H_kv, S_kv, D_qk)``.
        value: ``(B, H_kv, S_kv, D_v)``.
        attention_mask: boolean ``(B, 1, S_q, S_kv)``, True = attend, or a float one that is added; complete, so
            neither causality nor a window is added to it. None: causality, if the layer has it, and the window.
        scaling: factor on the scores; None is ``D_qk ** -0.5``.
        dropout: probability of dropping an attention weight, 0 in evaluation.
        is_causal: attend to no later key.
        sliding_window: the W latest keys, the query's own included.
        softcap: Gemma 2's ``softcap * tanh(scores / softcap)``.
        s_aux: ``(H_q,)``, GPT-OSS's sinks.
        position_bias: ``(1|B, H_q, S_q, S_kv)``, T5's; added to the scores.
        position_ids: only checked: packed sequences without a mask are refused.
        cu_seq_lens_q: boundaries of sequences packed into a batch of one, with the next three.
        cu_seq_lens_k: boundaries of the keys.
        max_length_q: longest query sequence.
        max_length_k: longest key sequence.
        output_attentions: return the attention weights too.
        others: the remaining keywords of the model's forward.

    Returns:
        ``out`` ``(B, S_q, H_q, D_v)``, contiguous, and the weights ``(B, H_q, S_q, S_kv)`` if the model was called
        with ``output_attentions=True``, else None.

    Raises:
        InputError: the mask has another form, or packed ``position_ids`` come without one.
        UnsupportedError: an unknown keyword, which may change attention.
    """
    _refuse_unknown(others)
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, shared by the batch
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    scores: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    if cu_seq_lens_q is not None:
        if position_bias is not None or q.shape[0] != 1 or cu_seq_lens_k is None:
            given = f"batch {q.shape[0]}, position_bias {'no' if position_bias is None else 'yes'}"
            todo = "Pass cu_seq_lens_q and cu_seq_lens_k with a batch of one, or padded batches without them."
            raise input_error("cu_seq_lens_q", given, "a batch of one without position_bias", todo)
        lengths: dict[str, Any] = {
            "max_seqlen_q": None if max_length_q is None else int(max_length_q),
            "max_seqlen_kv": None if max_length_k is None else int(max_length_k),
        }
        cu_q, cu_kv = cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32)
        out = attention_varlen(q[0], k[0], v[0], cu_q, cu_kv, causal=causal, window=window, **lengths, **scores)
        return out[None], None  # type: ignore[call-overload]
    mask, bias = _mask_and_bias(attention_mask, position_bias)
    if attention_mask is not None:
        causal, window = False, None  # the mask has them
    elif causal and q.shape[1] > 1:
        if k.shape[1] > q.shape[1]:  # prefill of a static cache, whose later rows are still empty
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
            bias = None if bias is None else bias[..., : q.shape[1]]
        _refuse_packed(position_ids, q.shape[1])
    scores |= {"causal": causal, "window": window, "bias": bias, "mask": mask}
    if not (output_attentions or _capturing_attentions()):
        return attention(q, k, v, **scores), None  # type: ignore[return-value]
    scores["rng_state"] = rng.new_rng_state(q.device) if dropout else None
    weights = attention_weights(q, k, **scores).to(q.dtype)
    return attention(q, k, v, **scores), weights  # type: ignore[return-value]


def _mask_and_bias(attention_mask: Tensor | None, position_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if attention_mask is None:
        return None, position_bias
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        given = f"shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else type(attention_mask)
        todo = "A (B, S) padding mask goes to the model's forward, which makes the complete one."
        raise input_error("attention_mask", given, "None or (B, 1, S_q, S_kv)", todo)
    if attention_mask.dtype == torch.bool:
        return attention_mask, position_bias
    return None, attention_mask if position_bias is None else position_bias + attention_mask


def _refuse_unknown(others: dict[str, Any]) -> None:
    unknown = [
        name for name, given in others.items() if name not in IRRELEVANT and not (given is None or given is False)
    ]
    if unknown:
        raise UnsupportedError(
            f"attn_implementation='fastattn' does not know the keyword{'s' * (len(unknown) > 1)} {', '.join(unknown)} "
            f"and will not guess whether to ignore {'them' if len(unknown) > 1 else 'it'}. Use another "
            "attn_implementation for this model, or, if attention does not depend on it, leave it out of the call."
        )


def _refuse_packed(position_ids: Tensor | None, s_q: int) -> None:
    """Raise if transformers has dropped the boundaries of packed sequences: with a cache it makes no mask for them.

    Reads values once for each forward, so not while compiling or capturing a CUDA graph.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != s_q:
        return
    if torch.compiler.is_compiling() or (position_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    version = 0 if position_ids.is_inference() else position_ids._version
    if _unpacked.get(position_ids) == version:
        return
    if bool((position_ids.diff(dim=-1) != 1).any()):
        todo = "Pass use_cache=False to the model, so that transformers makes a mask of the sequences."
        raise input_error("position_ids", "packed sequences with a cache", "one sequence in each row", todo)
    _unpacked[position_ids] = version


def _capturing_attentions() -> bool:
    """Whether the running forward was asked for attentions, which transformers tells only its own hooks."""
    collector = getattr(output_capturing, "_active_collector", None)
    wanted = None if collector is None else collector.get()
    return any("attentions" in key for key in wanted or ())
