"""Attention weights for inspection: exact probabilities of chosen rows and heads, summaries, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.arguments import Window, dense_problem, with_rng_state
from fastattn.dispatch import requested
from fastattn.errors import input_error
from fastattn.files import replaced_file
from fastattn.layout import Layout
from fastattn.problem import Inputs, Statistics, check_inputs
from fastattn.statistics import statistics
from fastattn.weights import WITHOUT_OPTIONS, all_weights, by_plan, look_up

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Chosen = Sequence[int] | Tensor | None


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Chosen = None,
    heads: Chosen = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    intervals: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    layout: Layout = "BSHD",
) -> Tensor:
    """The attention weights of chosen query rows and heads: the factors of the values in ``attention``.

    ``softmax(cap(scale * q @ k^T) + bias + alibi, where kept)``, by the reference formula. Only the rows asked for
    are computed, so 10 rows of 100,000 tokens take 10 rows of memory.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``, all of them.
        k: keys ``(B, S_kv, H_kv, D_qk)``.
        rows: query rows; negative ones count from the end; None is all of them, ``S_q x S_kv``.
        heads: query heads, likewise; None is all.
        causal: this and the remaining options are those of ``fastattn.attention``; tensors keep their full shapes.
        window: as in ``attention``.
        scale: as in ``attention``.
        softcap: as in ``attention``.
        bias: as in ``attention``.
        mask: as in ``attention``.
        alibi_slopes: as in ``attention``.
        sinks: as in ``attention``; the weights of a row then add up to less than 1.
        segment_ids: as in ``attention``.
        intervals: as in ``attention``.
        dropout_p: as in ``attention``; with the ``rng_state`` of a call, the weights that it used.
        rng_state: as in ``attention``.
        layout: as in ``attention``, of q and k.

    Returns:
        fp32 (fp64 for fp64 inputs) ``(B, len(heads), len(rows), S_kv)``, differentiable. Empty rows are 0.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch, fastattn
        >>> q, k = torch.randn(1, 1000, 8, 64), torch.randn(1, 1000, 2, 64)
        >>> fastattn.attention_weights(q, k, rows=[-1], heads=[0, 5], causal=True).shape
        torch.Size([1, 2, 1, 1000])
    """
    inputs, spec = dense_problem(
        q,
        k,
        k,  # the weights do not depend on the values
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        segment_ids=segment_ids,
        intervals=intervals,
        dropout_p=dropout_p,
        rng_state=rng_state,
        layout=layout,
    )
    inputs = with_rng_state(inputs, spec)
    check_inputs(inputs, spec)
    if rows is None and heads is None:
        return all_weights(inputs, spec, averages=False)
    chosen_rows = _indices("rows", rows, inputs.q.shape[1], q.device)
    chosen_heads = _indices("heads", heads, inputs.heads_q, q.device)
    at = reference.Positions.of(inputs).at_heads(chosen_heads).at_rows(chosen_rows)
    return reference.weights(_of_rows(reference.of_heads(inputs, chosen_heads), chosen_rows), spec, at)


def mean_attention_weights(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The mean of ``attention_weights`` over the heads: ``(B, S_q, S_kv)``, differentiable.

    In host memory the C++ kernel keeps no more of the weights of single heads than a few rows. Elsewhere, without
    gradients, as many heads are computed together as fit into 8 MiB, at least one.

    Args:
        q: as in ``attention_weights``.
        k: as in ``attention_weights``.
        options: those of ``attention_weights`` except ``rows`` and ``heads``.

    Returns:
        fp32 (fp64 for fp64 inputs) ``(B, S_q, S_kv)``.

    Example:
        >>> import torch
        >>> from fastattn.inspection import mean_attention_weights
        >>> q = torch.randn(1, 10, 8, 64)
        >>> mean_attention_weights(q, q, causal=True).shape
        torch.Size([1, 10, 10])
    """
    inputs, spec = dense_problem(q, k, k, **{**WITHOUT_OPTIONS, **options})
    inputs = with_rng_state(inputs, spec)
    check_inputs(inputs, spec)
    return all_weights(inputs, spec, averages=True)


def weights_of_call(q: Tensor, k: Tensor, mean: bool, options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The weights, or their mean, of a call that ``fastattn.attention`` has served: nothing is checked again.

    Args:
        q: as in ``attention_weights``, after autocast.
        k: as there.
        mean: average over the heads.
        options: of the call; ``rng_state`` is among them if there is dropout.
        dtype: of the result.

    Example:
        >>> import torch
        >>> from fastattn.inspection import weights_of_call
        >>> q = torch.randn(1, 3, 2, 16)
        >>> weights_of_call(q, q, True, {"causal": True}, torch.float32).shape
        torch.Size([1, 3, 3])
    """
    kind, found = look_up(q, k, options, mean, dtype)
    if found is not None:
        return by_plan(found, q, k)
    inputs, spec = dense_problem(q, k, k, **{**WITHOUT_OPTIONS, **options})
    return all_weights(inputs, spec, averages=mean, dtype=dtype, kind=kind)


def attention_statistics(q: Tensor, k: Tensor, **options: Any) -> Statistics:
    """Statistics of the weights in memory linear in the sequence length, without ``out``.

    Muon's QK-clip reads the largest logit of each head, H2O evicts the keys with the smallest sums, and regularisers
    raise the entropy of collapsed heads. ``attention(..., return_stats=True)`` computes ``out``, too.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``.
        k: keys ``(B, S_kv, H_kv, D_qk)``.
        options: as in ``attention_weights``, but ``rows``, ``heads`` and dropout.

    Returns:
        ``Statistics``: entropy, largest_logit, largest_key ``(B, H_q, S_q)``; key_sum, key_max ``(B, H_q, S_kv)``.

    Source:
        Kimi Team, "Kimi K2", 2025 (QK-clip); Zhang et al., "H2O: heavy-hitter oracle", 2023; Zhai et al., "Stabilizing
        transformer training by preventing attention entropy collapse", 2023.

    Example:
        >>> import torch
        >>> from fastattn.inspection import attention_statistics
        >>> q = torch.randn(1, 1000, 8, 64)
        >>> found = attention_statistics(q, q, causal=True)
        >>> found.largest_logit.amax((0, 2)).shape, found.key_sum.shape
        (torch.Size([8]), torch.Size([1, 8, 1000]))
    """
    inputs, spec = dense_problem(q, k, k, **{**WITHOUT_OPTIONS, **options})
    check_inputs(inputs, spec)
    return statistics(inputs, spec, requested(None))


def attention_entropy(weights: Tensor) -> Tensor:
    """The entropy of each row, ``-sum_j p_j log p_j`` in nats: 0 for one key, ``log(n)`` for n equal ones.

    Args:
        weights: ``(..., S_q, S_kv)`` from ``attention_weights``.

    Returns:
        ``(..., S_q)``. Empty rows are 0.

    Example:
        >>> import torch
        >>> from fastattn.inspection import attention_entropy
        >>> attention_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    return torch.special.entr(weights).sum(-1)


def attention_rollout(layers: Sequence[Tensor]) -> Tensor:
    """Attention rollout: how much of each input token reaches each output token, residual connections included.

    The product over the layers of ``(mean over heads of the weights + identity) / 2``, rows normalised.

    Args:
        layers: self-attention weights ``(..., H, S, S)`` of each layer, first to last.

    Returns:
        ``(..., S, S)``; each row adds up to 1.

    Raises:
        InputError: there is no layer, or its weights are not square.

    Source:
        Abnar and Zuidema, "Quantifying attention flow in transformers", 2020.

    Example:
        >>> import torch
        >>> from fastattn.inspection import attention_rollout
        >>> attention_rollout([torch.full((1, 2, 2), 0.5)])
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    if not layers or any(x.dim() < 3 or x.shape[-1] != x.shape[-2] for x in layers):
        given = [tuple(x.shape) for x in layers]
        raise input_error(
            "layers", given, "one or more of (..., H, S, S)", "Rollout needs every row of self-attention."
        )
    flow = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    for weights in layers:
        mixed = weights.mean(-3) + torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        flow = (mixed / mixed.sum(-1, keepdim=True)) @ flow
    return flow


def plot_attention(
    weights: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
) -> Path:
    """Draw attention weights to a PNG file: a map for each layer and head, entropies, and attention rollout.

    The picture has a row of maps for each layer with a column for each head, titled with the mean entropy of its rows
    in nats. The colours of a map go from 0 to its largest weight in a row with several keys, which its bar shows: maps
    of long texts would be dark otherwise. Below them are a map of all mean entropies and, if every layer is square, the
    rollout through all layers.

    Args:
        weights: ``(H, S_q, S_kv)`` of one layer, or a sequence of them, first layer to last: from
            ``attention_weights(...)[0]``, or the ``attentions`` of a transformers model, for one batch entry.
        path: the file to write; its folders are created.
        tokens: the text of each key; of each query too unless ``query_tokens`` is given.
        query_tokens: the text of each query, if the queries are not the keys.

    Returns:
        ``path``.

    Raises:
        InputError: shapes and labels do not fit.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, fastattn, tempfile
        >>> q = torch.randn(1, 3, 2, 16)
        >>> weights = fastattn.attention_weights(q, q, causal=True)[0]
        >>> fastattn.plot_attention(weights, tempfile.mkdtemp() + "/heads.png", tokens=["the", "cat", "sat"]).name
        'heads.png'
    """
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    layers = [_one_entry(x).detach().float().cpu() for x in layers]
    if not layers:
        raise input_error("weights", "an empty sequence", "at least one layer", "Pass the weights of a layer.")
    query_tokens = tokens if query_tokens is None else query_tokens
    for name, labels, dim in (("tokens", tokens, -1), ("query_tokens", query_tokens, -2)):
        if labels is not None and any(x.shape[dim] != len(labels) for x in layers):
            allowed = f"{layers[0].shape[dim]}, one for each {'key' if dim == -1 else 'query'}"
            raise input_error(name, f"{len(labels)} labels", allowed, "Or None for no labels.")
    figure = _draw(layers, tokens, query_tokens)
    path = Path(path)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


# --- choosing rows and heads ------------------------------------------------------------------------------------


def _indices(name: str, chosen: Chosen, size: int, device: torch.device) -> Tensor:
    everything = torch.arange(size, device=device)
    if chosen is None:
        return everything
    wanted = torch.as_tensor(chosen, device=device)
    fits = wanted.dim() == 1 and not wanted.is_floating_point() and wanted.dtype != torch.bool
    if not fits or bool(((wanted < -size) | (wanted >= size)).any()):
        raise input_error(name, chosen, f"a list of ints from {-size} to {size - 1}", "None means all.")
    return everything[wanted.long()]


def _of_rows(inputs: Inputs, rows: Tensor) -> Inputs:
    """The same problem for some of its query rows."""

    def along_2(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[2] == 1 else x[:, :, rows]

    segments = None if inputs.segment_ids_q is None else inputs.segment_ids_q[:, rows]
    return inputs.replace(
        q=inputs.q[:, rows], bias=along_2(inputs.bias), mask=along_2(inputs.mask), segment_ids_q=segments,
        intervals=None if inputs.intervals is None else inputs.intervals[:, :, rows],
    )  # fmt: skip


# --- drawing ----------------------------------------------------------------------------------------------------


def _one_entry(x: Tensor) -> Tensor:
    if x.dim() == 4 and x.shape[0] == 1:
        x = x[0]
    if x.dim() != 3:
        todo = "Choose one batch entry: weights[0]."
        raise input_error("weights", f"shape {tuple(x.shape)}", "(H, S_q, S_kv) for each layer", todo)
    return x


def _draw(layers: list[Tensor], tokens: Sequence[str] | None, query_tokens: Sequence[str] | None) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_attention needs matplotlib: pip install 'fastattn[bench]'") from error
    columns = max(2, *(x.shape[0] for x in layers))
    figure = Figure(figsize=(2.7 * columns + 1, 2.6 * (len(layers) + 1) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(layers) + 1, columns)
    entropies = torch.full((len(layers), columns), float("nan"))
    for n, layer in enumerate(layers):
        for h, head in enumerate(layer):
            entropies[n, h] = attention_entropy(head).mean()
            axes = figure.add_subplot(grid[n, h])
            axes.set_title(f"layer {n} head {h}: {entropies[n, h]:.2f} nats", fontsize=8)
            look: dict[str, Any] = {
                "cmap": "magma",
                "vmin": 0,
                "vmax": _largest(head),
                "aspect": "auto",
                "interpolation": "nearest",
            }
            image = axes.imshow(head.numpy(), **look)
            figure.colorbar(image, ax=axes).ax.tick_params(labelsize=5)  # each map has its own scale
            _label(axes, tokens, query_tokens if h == 0 else None)
    below = grid[len(layers), :].subgridspec(1, 2)
    axes = figure.add_subplot(below[0])
    axes.set_title("mean entropy (nats)", fontsize=8)
    axes.set(xlabel="head", ylabel="layer", xticks=range(columns), yticks=range(len(layers)))
    figure.colorbar(axes.imshow(entropies.numpy(), cmap="viridis", vmin=0, aspect="auto"), ax=axes)
    if all(x.shape[-1] == x.shape[-2] == layers[0].shape[-1] for x in layers):
        axes = figure.add_subplot(below[1])
        axes.set_title("rollout: output token <- input token", fontsize=8)
        flow = attention_rollout(layers).numpy()
        image = axes.imshow(flow, cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes)
        _label(axes, tokens, query_tokens)
    return figure


def _largest(head: Tensor) -> float:
    """The largest weight of the rows that have a choice: with one key it is 1 and says nothing."""
    choosing = head[(head > 0).sum(-1) > 1]
    return float(choosing.max()) if choosing.numel() else 1.0


def _label(axes: Any, tokens: Sequence[str] | None, query_tokens: Sequence[str] | None) -> None:
    """Token texts on the axes. Dollar signs are text, not formulas."""
    size = 6
    axes.tick_params(labelsize=size)
    if tokens is not None:
        axes.set_xticks(range(len(tokens)), [t.replace("$", r"\$") for t in tokens], rotation=90)
    if query_tokens is not None:
        axes.set_yticks(range(len(query_tokens)), [t.replace("$", r"\$") for t in query_tokens])
