"""``MultiHeadAttention``: ``torch.nn.MultiheadAttention`` on fastattn, with the options of newer models.

Torch's conventions for this module stand only here and in ``masks.py``: True in a boolean mask means masked, attention
masks may have the heads folded into the batch, and ``is_causal`` is a hint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from fastattn import nested, rng
from fastattn.errors import input_error
from fastattn.functional import attention, attention_varlen
from fastattn.nn.checks import Window, check_options, check_sizes, fits
from fastattn.nn.lazy import have_little_weights, weights_when_read
from fastattn.nn.masks import check_masks, mask_terms
from fastattn.nn.rotary import Rotary
from fastattn.torch_internals import calls_only_forward, is_traced, multi_head_attention
from fastattn.weights import attention_with_weights

_OUT_PROJ = type(nn.MultiheadAttention(1, 1).out_proj)


class MultiHeadAttention(nn.MultiheadAttention):
    """Replace ``torch.nn.MultiheadAttention``, with the same arguments, parameters and results, on fused attention.

        q, k, v = heads(query W_q^T + b_q), heads(key W_k^T + b_k), heads(value W_v^T + b_v)
        out     = concat(fastattn.attention(q, k, v, ...)) W_o^T + b_o

    Without the keyword-only options, state_dicts are interchangeable with torch's and the same seed gives the same
    initial parameters. Differences from torch:

    - A query whose keys are all masked gets 0 from attention (so the module returns ``b_o``), and weights of 0.
      torch gives NaN or 0, depending on the path it takes.
    - Dropout drops other elements than torch does for the same seed, in the same proportion.
    - ``is_causal=True`` without ``attn_mask`` always raises; torch ignores the hint on its inference path.
    - The weights of ``need_weights=True``, torch's default, are computed when they are first read, if ever. Changing a
      floating mask in place before that makes reading them an error.

    Args:
        embed_dim: E, the width of queries and outputs.
        num_heads: H_q, divides ``embed_dim``; each head is ``D = E / H_q`` wide.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value, which every query sees.
        add_zero_attn: append a key and a value of zeros, which every query sees.
        kdim: width of the keys; None is ``embed_dim``.
        vdim: width of the values; None is ``embed_dim``.
        batch_first: inputs are ``(N, L, E)``, not ``(L, N, E)``.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: H_kv, divides ``num_heads``; None is ``num_heads``. With fewer heads, E_kv = D * H_kv takes the
            place of E in the key and value projections: ``in_proj_weight`` is ``(E + 2 E_kv, E)`` (Ainslie et al.,
            "GQA", 2023).
        window: ``(left, right)``, the number of neighbouring keys that each query sees, as in ``fastattn.attention``;
            ``(None, 0)`` is causal, ``(W - 1, 0)`` a causal sliding window. With W = 2 and four tokens:

                1 0 0 0
                1 1 0 0
                0 1 1 0
                0 0 1 1

        softcap: ``softcap * tanh(scores / softcap)`` before the masks (Gemma 2); None is off.
        rope: rotary position embedding of queries and keys, at positions 0, 1, ...; True, or its base if not 10000.
            For self-attention only, so query and key have one shape (Su et al., "RoFormer", 2021).
        qk_norm: RMSNorm over each head of the queries and keys, before ``rope``; adds ``q_norm.weight`` and
            ``k_norm.weight`` (Dehghani et al., "Scaling vision transformers to 22 billion parameters", 2023).
        sinks: a learned logit for each head that takes part in the softmax but has no value, 0 at first; adds
            ``sinks`` (Xiao et al., "Efficient streaming language models with attention sinks", 2023).
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.

    Raises:
        InputError: an argument is out of range, or two exclude each other.

    Source:
        Vaswani et al., "Attention is all you need", 2017.

    Example:
        >>> import torch, fastattn
        >>> mha = fastattn.MultiHeadAttention(64, 8, batch_first=True, num_kv_heads=2, window=(None, 0), rope=True)
        >>> x = torch.randn(2, 100, 64)
        >>> out, _ = mha(x, x, x, need_weights=False)
        >>> out.shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        rope: bool | float = False,
        qk_norm: bool = False,
        sinks: bool = False,
        backend: str | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(embed_dim, num_heads, num_kv_heads, dropout)
        check_options(window, softcap, backend)
        if window is not None and (add_bias_kv or add_zero_attn):
            todo = "Appended keys have no position that a window could be measured from."
            raise input_error("window", f"{window} with add_bias_kv or add_zero_attn", "one of them", todo)
        if rope and kdim not in (None, embed_dim):
            todo = "rope is for self-attention, where the keys come from the queries' sequence."
            raise input_error("rope", f"{rope} with kdim={kdim}", f"kdim=None or {embed_dim}", todo)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        keep_from_shortcut(self)
        self.num_kv_heads = num_kv_heads
        self.window = window
        self.softcap = softcap
        self.backend = backend
        self.rotary = Rotary(self.head_dim, 10000.0 if rope is True else rope) if rope else None
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None
        if num_kv_heads != num_heads:
            self._group_heads()

    def _group_heads(self) -> None:
        """Shrink the key and value projections to ``num_kv_heads`` and initialise them again."""
        _, e_kv, _ = self._widths()
        packed = self.embed_dim + 2 * e_kv
        rows_of = {"in_proj_weight": packed, "in_proj_bias": packed, "k_proj_weight": e_kv, "v_proj_weight": e_kv}
        for name, rows in rows_of.items():
            full = getattr(self, name)
            if full is not None:
                setattr(self, name, nn.Parameter(full.new_empty(rows, *full.shape[1:])))
        if self.bias_k is not None and self.bias_v is not None:
            self.bias_k = nn.Parameter(self.bias_k.new_empty(1, 1, e_kv))
            self.bias_v = nn.Parameter(self.bias_v.new_empty(1, 1, e_kv))
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: ``(L, N, E)``, ``(N, L, E)`` with ``batch_first``, or ``(L, E)`` without a batch; or with
                ``batch_first`` a nested tensor, as are key and value then, without masks and weights.
            key: ``(S, N, kdim)``, likewise.
            value: ``(S, N, vdim)``, likewise.
            key_padding_mask: ``(N, S)``, or ``(S,)`` without a batch: boolean, True = masked, the opposite of
                ``fastattn.attention``; or floating, added to the scores.
            need_weights: also return the attention weights, which are computed when they are first read.
            attn_mask: ``(L, S)``, or ``(N * H_q, L, S)``: boolean, True = masked; or floating, added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: a promise that ``attn_mask``, which must be given, is the causal one. As in torch, it is used if
                there is no ``key_padding_mask`` and no weights are needed. For causal attention without a mask,
                construct the module with ``window=(None, 0)``.

        Returns:
            ``(out, weights)``: ``out`` like the query; ``weights``, after dropout, ``(N, L, S)``, or ``(N, H_q, L, S)``
            if not averaged, without N if there is no batch; None if not needed. S counts appended keys.

        Raises:
            InputError: a tensor's shape or dtype does not fit, ``is_causal`` is given without a mask, or ``rope`` with
                cross-attention.
        """
        if isinstance(query, Proxy):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return recorded_by_fx(self, query, key, value, *masks)
        if query.is_nested:
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal or None}
            return self._forward_nested(query, key, value, need_weights, masks)
        if key_padding_mask is attn_mask is None and not is_causal:
            both = self._by_torch(query, key, value, need_weights, average_attn_weights)
            if both is not None:
                return both
        is_batched = query.dim() == 3
        heads = self._heads_of_one(query) if query is key is value else None
        if heads is None:
            self._check_inputs(query, key, value)
            heads = self._heads(query, key, value, is_batched)
        q, k, v = self._rotated(*heads, 0)
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            check_masks(key_padding_mask, attn_mask, is_batched, (q.shape[0], self.num_heads, q.shape[1], k.shape[1]))
            _check_hint(is_causal, attn_mask)
        k, v, appended = self._append_keys(k, v)

        window = self.window
        if is_causal and not need_weights and key_padding_mask is None and (window is None or q.shape[1] == k.shape[1]):
            attn_mask = None
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]  # torch counts from the upper left: no query sees the others
            window = (window[0] if window else None, q.shape[1] - k.shape[1])

        terms = mask_terms(_padded(key_padding_mask, appended), _padded(attn_mask, appended), q)
        options: dict[str, Any] = {
            "window": window, "softcap": self.softcap, "sinks": self.sinks,
            "dropout_p": self.dropout if self.training else 0.0, **terms,
        }  # fmt: skip
        if need_weights:
            return self._with_weights(q, k, v, options, average_attn_weights, is_batched)
        out = attention(q, k, v, backend=self.backend, **options)
        assert isinstance(out, Tensor)
        return self.out_proj(self._as_query(out.flatten(2), is_batched)), None

    def _with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], average: bool, is_batched: bool
    ) -> tuple[Tensor, Tensor]:
        """``forward`` from the heads on, with weights: few are computed now, others when they are read."""
        if options["dropout_p"]:
            options["rng_state"] = rng.new_rng_state(q.device)
        given = (options[name] for name in ("window", "softcap", "sinks", "bias", "mask", "segment_ids"))
        is_plain = self.backend is None and not options["dropout_p"] and all(x is None for x in given)
        count = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
        if is_plain and have_little_weights((q, k, v), count):
            both = attention_with_weights(q, k, v, average, q.dtype)
            if both is not None:
                out = self.out_proj(self._as_query(both[0].flatten(2), is_batched))
                return out, both[1] if is_batched else both[1][0]
        out = attention(q, k, v, backend=self.backend, **options)
        assert isinstance(out, Tensor)
        out = self.out_proj(self._as_query(out.flatten(2), is_batched))
        how = {"mean": average, "unbatched": not is_batched, "owned": True}
        return out, weights_when_read(q, k, out.dtype, **how, **options)

    def _by_torch(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Few scores in inference by torch's function for the whole layer, which takes the least time for them.

        None for many scores, calls with a gradient, options that torch lacks, and a changed ``out_proj``.
        """
        weight, bias, records = self.in_proj_weight, self.in_proj_bias, torch.is_grad_enabled()
        if weight is None or bias is None or (records and (query.requires_grad or weight.requires_grad)):
            return None  # first what each step of training meets
        if torch.compiler.is_compiling() or is_traced():
            return None  # a trace would name tensors by what is asked next, with and without gradients differently
        is_plain = self.window is self.softcap is self.rotary is self.q_norm is self.sinks is self.bias_k is None
        if not is_plain or self.add_zero_attn or self.num_kv_heads != self.num_heads or self.num_heads % 2:
            return None
        if not self.batch_first or self.backend is not None or (self.training and self.dropout):
            return None
        shape = query.shape
        if len(shape) != 3 or any(type(x) is not Tensor or x.shape != shape for x in (key, value)):
            return None
        if not have_little_weights((query, key, value), shape[0] * self.num_heads * shape[1] ** 2):
            return None
        out_proj = self.out_proj
        if not calls_only_forward(out_proj, _OUT_PROJ):
            return None
        if shape[2] != self.embed_dim or not all(fits(x, weight) for x in (query, key, value)):
            return None
        tensors = (query, key, value, weight, bias, out_proj.weight, out_proj.bias)
        if records and any(t.requires_grad for t in tensors):
            return None
        qkv, parameters = tensors[:3], tensors[3:]
        return multi_head_attention(*qkv, self.embed_dim, self.num_heads, *parameters, None, need_weights, average)

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, masks: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """``forward`` for sequences of different lengths in nested tensors, without padding."""
        given = [name for name, mask in masks.items() if mask is not None]
        given += [name for name in ("bias_k", "add_zero_attn") if getattr(self, name) not in (None, False)]
        given += ["need_weights"] if need_weights else []
        if given or not self.batch_first:
            allowed = "batch_first=True, and neither masks, appended keys nor weights"
            todo = "Pass need_weights=False: nested tensors carry their lengths. Or pad them and pass key_padding_mask."
            raise input_error("query", f"a nested tensor with {', '.join(given) or 'batch_first=False'}", allowed, todo)
        packed = {key_of: nested.Packed.of(x) for key_of, x in {id(x): x for x in (query, key, value)}.items()}
        q, k, v = (packed[id(x)] for x in (query, key, value))
        if v.offsets is not k.offsets and not torch.equal(v.offsets, k.offsets):
            raise input_error("value", "other lengths than key", "the same", "Each key has one value.")
        positions = q.positions() if self.rotary is not None else None
        values, boundaries = (q.values, k.values, v.values), (q.offsets, k.offsets, q.longest, k.longest)
        return q.nested(self._of_packed(*values, boundaries, positions)), None

    def _of_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: tuple[Tensor, Tensor, int, int],
        positions: Tensor | None = None,
    ) -> Tensor:
        """``forward`` of packed tokens ``(T, E)``, without weights.

        Args:
            query: ``(T_q, E)``.
            key: ``(T_kv, E)``.
            value: ``(T_kv, E)``.
            boundaries: cu_seqlens_q, cu_seqlens_kv, max_seqlen_q and max_seqlen_kv of ``attention_varlen``.
            positions: ``(T_q,)`` of the tokens in their sequences, for ``rope``.
        """
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self._project(query, key, value))
        cu_seqlens_q, cu_seqlens_kv, longest_q, longest_kv = boundaries
        out = attention_varlen(
            *self._rotated(q, k, v, positions), cu_seqlens_q, cu_seqlens_kv,
            max_seqlen_q=longest_q, max_seqlen_kv=longest_kv, window=self.window, softcap=self.softcap,
            sinks=self.sinks, dropout_p=self.dropout if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return self.out_proj(out.flatten(1))

    def _widths(self) -> tuple[int, int, int]:
        """The widths of q, k and v over all heads: the rows of their projections."""
        e_kv = self.head_dim * self.num_kv_heads
        return self.embed_dim, e_kv, e_kv

    def _heads_of_one(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """q, k and v as ``(B, S, H, D)`` of self-attention in its commonest form; None leaves it to ``_heads``."""
        weight = self.in_proj_weight
        if weight is None or x.dim() != 3 or x.shape[-1] != self.embed_dim or not fits(x, weight):
            return None
        if self.num_kv_heads != self.num_heads:
            return None
        (projected,) = self._in_proj((x,), (3 * self.embed_dim,))
        q, k, v = self._heads_of_product(projected, 3)
        return q, k, v

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, is_batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as ``(B, S, H, D)``."""
        e_q, e_kv, _ = self._widths()
        if self.in_proj_weight is not None and is_batched and key is value:
            of_q, of_kv = self._in_proj((query, key), (e_q, 2 * e_kv))
            (q,), (k, v) = self._heads_of_product(of_q, 1), self._heads_of_product(of_kv, 2)
            return q, k, v
        if self.in_proj_weight is not None and is_batched and query is key and e_q == e_kv:
            of_qk, of_v = self._in_proj((query, value), (2 * e_q, e_kv))
            (q, k), (v,) = self._heads_of_product(of_qk, 2), self._heads_of_product(of_v, 1)
            return q, k, v
        projected = self._project(query, key, value)
        q, k, v = (self._as_batch(x, is_batched).unflatten(-1, (-1, self.head_dim)) for x in projected)
        return q, k, v

    def _heads_of_product(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """``count`` of q, k and v as ``(B, S, H, D)``, of a batch that was projected at once."""
        x = x.view(*x.shape[:2], count, -1, self.head_dim)
        return (x if self.batch_first else x.transpose(0, 1)).unbind(2)

    def _in_proj(self, inputs: tuple[Tensor, ...], rows: tuple[int, ...]) -> list[Tensor]:
        """Each input projected by its part of ``in_proj_weight``, which has so many ``rows``.

        The parts are cut by one split, whose gradient is one copy; each slice would have one as large as the whole.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if len(rows) == 1:
            return [F.linear(inputs[0], weight, bias)]
        biases = (None,) * len(rows) if bias is None else bias.split(rows)
        return [F.linear(*given) for given in zip(inputs, weight.split(rows), biases, strict=True)]

    def _rotated(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and positions is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        inputs, widths = (query, key, value), self._widths()
        if self.in_proj_weight is not None and query is key and key is value:
            return self._in_proj((query,), (sum(widths),))[0].split(widths, dim=-1)
        if self.in_proj_weight is not None:
            return tuple(self._in_proj(inputs, widths))
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(widths)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _as_batch(self, x: Tensor, is_batched: bool) -> Tensor:
        """``(N, S, E)`` from the caller's layout."""
        if not is_batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _as_query(self, x: Tensor, is_batched: bool) -> Tensor:
        """The inverse of ``_as_batch``."""
        if not is_batched:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1).contiguous()

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with the rows of ``add_bias_kv`` and ``add_zero_attn`` after the last key, and their number."""
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(1, 1, *k.shape[2:]).expand(k.shape[0], -1, -1, -1))
            values.append(self.bias_v.view(1, 1, *v.shape[2:]).expand(v.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            keys.append(torch.zeros_like(k[:, :1]))
            values.append(torch.zeros_like(v[:, :1]))
        appended = len(keys) - 1
        return (torch.cat(keys, 1), torch.cat(values, 1), appended) if appended else (k, v, 0)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        named = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        order = "(N, S, {0})" if self.batch_first else "(S, N, {0})"
        for name, x, width in named:
            if not isinstance(x, Tensor):
                raise input_error(name, type(x).__name__, "a torch.Tensor", "Convert it with torch.as_tensor.")
            if x.is_nested:
                raise input_error(name, "a nested tensor beside dense ones", "all three nested", "Convert the others.")
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                allowed = f"{order.format(width)}, or (S, {width}) where none of the three has a batch"
                raise input_error(name, f"shape {tuple(x.shape)}", allowed, "Check embed_dim, kdim, vdim, batch_first.")
            if not fits(x, weight):
                todo = "Convert it with .to(...), or the module, or compute under torch.autocast."
                allowed = f"{weight.dtype} on {weight.device}, as the parameters"
                raise input_error(name, f"{x.dtype} on {x.device}", allowed, todo)
        if key.shape[:-1] != value.shape[:-1]:
            allowed = f"{tuple(key.shape[:-1])} before the last dimension, as in key"
            raise input_error("value", f"shape {tuple(value.shape)}", allowed, "Each key has one value.")
        n = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[n] != key.shape[n]:
            allowed = f"batch {query.shape[n]}, that of query"
            raise input_error("key", f"batch {key.shape[n]}", allowed, "Check batch_first, or expand the smaller one.")
        if self.rotary is not None and key.shape != query.shape:
            todo = "Rotary positions count within one sequence: pass one sequence as both, or build it without rope."
            raise input_error("key", f"shape {tuple(key.shape)}, with rope on", f"{tuple(query.shape)}", todo)

    def extra_repr(self) -> str:
        given = {"window": self.window, "softcap": self.softcap, "backend": self.backend}
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
        sizes = f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, num_kv_heads={self.num_kv_heads}"
        return sizes + options


def recorded_by_fx(module: nn.Module, proxy: Proxy, *others: Any) -> Any:
    """``module(proxy, *others)`` as one node of a ``torch.fx`` graph, as torch records its own modules."""
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy, *others), {})


class _ShortcutGuard(nn.Module):
    """A child that is never called and has a hook, because of which torch's encoder layers call their submodules."""


def keep_from_shortcut(module: nn.MultiheadAttention) -> None:
    """Have ``nn.TransformerEncoderLayer`` call ``module`` in inference instead of reading its weights.

    A layer takes that shortcut unless some module inside it has a forward hook. ``_qkv_same_embed_dim = False`` would
    prevent it too, but PEFT and others read it for its own meaning.
    """
    guard = _ShortcutGuard()
    guard.register_forward_pre_hook(_no_hook)
    module.add_module("_shortcut_guard", guard)


def _no_hook(module: nn.Module, args: Any) -> None: ...


def _check_hint(is_causal: bool, attn_mask: Tensor | None) -> None:
    if is_causal and attn_mask is None:
        todo = "It is a hint about the mask; for causal attention without one construct with window=(None, 0)."
        raise input_error("is_causal", "True without attn_mask", "True with the causal attn_mask, or False", todo)


def _padded(mask: Tensor | None, columns: int) -> Tensor | None:
    """``mask`` with unmasked columns for the appended keys."""
    return mask if mask is None or columns == 0 else F.pad(mask, (0, columns))
