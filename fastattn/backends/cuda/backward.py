"""The backward pass: choice of kernels, their workspace, and their results as gradients.

One fused kernel computes dq, dk and dv, and sums dq by atomic additions, whose order is not fixed. It takes five
products instead of seven. Two kernels, one for dk and dv, one for dq, compute the same without atomics, with the same
bits every time. They serve under ``torch.use_deterministic_algorithms``, if only some gradients are needed, and for
head dims without a fused kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.cuda import abi
from fastattn.backends.cuda.instances import dkdv_configs, select_dkdv
from fastattn.problem import Grads, Inputs
from fastattn.spec import AttentionSpec


@dataclass(frozen=True)
class BackwardProblem:
    """The arguments of ``Backend.backward``."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    lse_low: Tensor
    inputs: Inputs
    spec: AttentionSpec
    needs: tuple[str, ...]


def backward(problem: BackwardProblem, launch: Callable[[abi.Fields], None], stream: int) -> Grads:
    """The gradients that the problem needs, by the kernels that ``launch`` launches."""
    inputs, spec, needs = abi.readable(problem.inputs), problem.spec, problem.needs
    tensors: dict[str, Tensor | None] = {
        "out": abi.readable_rows(problem.out.contiguous()),
        "dout": abi.readable_rows(problem.dout),
        "lse": problem.lse.contiguous(),
        "lse_low": problem.lse_low.contiguous(),
        "dlse": None if problem.dlse is None else problem.dlse.float().contiguous(),
        **own_tensors(inputs, spec, needs),
    }
    if inputs.q.numel():
        launch(abi.backward_fields(inputs, spec, tensors, stream))
    return _as_grads(problem.inputs, tensors, needs)


def fused_columns(inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> int | None:
    """The columns of the sums for dq if one kernel computes everything; None if two do."""
    if not {"q", "k", "v"} <= set(needs) or torch.are_deterministic_algorithms_enabled():
        return None
    config = select_dkdv(_configs(), inputs.q.shape[-1], inputs.v.shape[-1], spec.softcap is not None, fused=True)
    return None if config is None else config.d_qk


_configs = functools.cache(dkdv_configs)


def _results(inputs: Inputs, needs: Sequence[str]) -> dict[str, Tensor | None]:
    """The outputs of the kernels. dk and dv come together; if a side has no rows, the other side's gradients are 0."""
    q, k, v = inputs.q, inputs.k, inputs.v
    has_pairs = q.numel() > 0 and k.numel() > 0
    dsinks = None
    if inputs.sinks is not None and "sinks" in needs:  # of each sequence; _as_grads adds up what they share
        dsinks = torch.zeros(inputs.batch, inputs.heads_q, dtype=torch.float32, device=q.device)

    def like(x: Tensor) -> Tensor | None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if has_pairs else None

    of_keys = "k" in needs or "v" in needs
    return {
        "dq": like(q) if "q" in needs else None,
        "dk": like(k) if of_keys else None,
        "dv": like(v) if of_keys else None,
        "dsinks": dsinks,
    }


def own_tensors(inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> dict[str, Tensor | None]:
    """All that the kernels write: the gradients; both parts of lse and delta of every padded row; sums for dq."""
    q = inputs.q
    rows = (1 if inputs.is_packed else inputs.batch, inputs.heads_q, abi.padded_rows(inputs, q.shape[-3]))
    lse_parts = torch.empty(*rows, 2, dtype=torch.float32, device=q.device)
    delta = torch.empty(rows, dtype=torch.float32, device=q.device)
    columns = fused_columns(inputs, spec, needs) if q.numel() > 0 and inputs.k.numel() > 0 else None
    sums = None if columns is None else torch.empty(*rows, columns, dtype=torch.float32, device=q.device)
    return {**_results(inputs, needs), "lse_parts": lse_parts, "delta": delta, "dq_sums": sums}


def _as_grads(inputs: Inputs, tensors: dict[str, Tensor | None], needs: Sequence[str]) -> Grads:
    def of(name: str) -> Tensor | None:
        found = tensors[f"d{name}"]
        x = getattr(inputs, name)
        return None if name not in needs else torch.zeros_like(x) if found is None else found

    dsinks = tensors["dsinks"]
    if dsinks is not None and inputs.sinks is not None:
        dsinks = (dsinks.sum(0, keepdim=True) if inputs.sinks.shape[0] == 1 else dsinks).to(inputs.sinks.dtype)
    return Grads(dq=of("q"), dk=of("k"), dv=of("v"), dsinks=dsinks)
