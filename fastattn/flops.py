"""FLOPs of fastattn's operators, for ``torch.utils.flop_counter.FlopCounterMode`` and for benchmarks.

A counter copies torch's registry of formulas when it is created, so the formulas must be registered before. Importing
torch's module for that would load Triton (0.4 s), so they are registered once other code imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fastattn.kv_cache import CacheInputs, tree_of
from fastattn.ops import CACHE_FIELDS, unflatten
from fastattn.problem import DIFFERENTIABLE, Inputs
from fastattn.spec import AttentionSpec, kept_pairs


def forward_flops(inputs: Inputs, spec: AttentionSpec) -> int:
    """FLOPs of the two products of a forward pass: a multiply and an add for each kept pair and head dim."""
    return 2 * (inputs.q.shape[-1] + inputs.v.shape[-1]) * _pairs(inputs, spec)


def backward_flops(inputs: Inputs, spec: AttentionSpec) -> int:
    """FLOPs of the five products of a backward pass: three over ``D_qk`` (scores, dq, dk), two over ``D_v``."""
    return 2 * (3 * inputs.q.shape[-1] + 2 * inputs.v.shape[-1]) * _pairs(inputs, spec)


def register_with_torch() -> None:
    """Register the formulas now if torch's counter is imported, else right after its import."""
    _after_import("torch.utils.flop_counter", _register)


def _pairs(inputs: Inputs, spec: AttentionSpec) -> int:
    """Kept pairs over all heads and sequences, by the band alone: masks and segments are data."""
    if not inputs.is_packed:
        return inputs.batch * inputs.heads_q * kept_pairs(spec, inputs.q.shape[1], inputs.k.shape[1])
    assert inputs.cu_seqlens_q is not None and inputs.cu_seqlens_kv is not None
    lengths = zip(inputs.cu_seqlens_q.diff().tolist(), inputs.cu_seqlens_kv.diff().tolist(), strict=True)
    return inputs.heads_q * sum(kept_pairs(spec, s_q, s_kv) for s_q, s_kv in lengths)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ours = torch.ops.fastattn
    register_flop_formula(ours.forward, get_raw=True)(_count_forward)
    register_flop_formula(ours.backward, get_raw=True)(_count_backward)
    register_flop_formula(ours.jvp, get_raw=True)(_count_jvp)
    register_flop_formula(ours.backward_jvp, get_raw=True)(_count_backward_jvp)
    register_flop_formula([ours.attend_to_cache, ours.extend_cache], get_raw=True)(_count_attend_to_cache)


def _count_forward(*args: Any, out_val: Any = None, **_: Any) -> int:
    inputs, spec, _backend = unflatten(args[:-1])
    return forward_flops(inputs, spec)


def _count_backward(*args: Any, out_val: Any = None, **_: Any) -> int:
    inputs, spec, _backend = unflatten(args[5:-1])
    return backward_flops(inputs, spec)


def _count_jvp(*args: Any, out_val: Any = None, **_: Any) -> int:
    """The scores, two more products for their tangents, and two for the tangent of out."""
    inputs, spec, _backend = unflatten(args[3 + len(DIFFERENTIABLE) :])
    return 2 * (3 * inputs.q.shape[-1] + 2 * inputs.v.shape[-1]) * _pairs(inputs, spec)


def _count_backward_jvp(*args: Any, out_val: Any = None, **_: Any) -> int:
    """The scores and dp, and two products for each tangent: of the scores, dp, dq, dk and dv."""
    inputs, spec, _backend = unflatten(args[9 + len(DIFFERENTIABLE) : -1])
    return 2 * (7 * inputs.q.shape[-1] + 5 * inputs.v.shape[-1]) * _pairs(inputs, spec)


def _count_attend_to_cache(*args: Any, out_val: Any = None, **_: Any) -> int:
    inputs, spec = CacheInputs(*args[:CACHE_FIELDS]), AttentionSpec(*args[CACHE_FIELDS:-1])
    s_q, s_kv = inputs.host_lengths()
    if inputs.tree_mask is None:
        pairs = sum(kept_pairs(spec, *lengths) for lengths in zip(s_q, s_kv, strict=True))
    else:
        pairs = tree_of(inputs).kept_pairs(torch.tensor(s_q), spec.left)
    return 2 * (inputs.q.shape[-1] + inputs.v_cache.shape[-1]) * inputs.heads_q * pairs


def _after_import(name: str, action: Callable[[], None]) -> None:
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(importlib.abc.MetaPathFinder):
    """Let the other finders find the module, and run ``action`` after it was loaded."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found is not None and found.loader is not None:
            found.loader.exec_module = self._then_act(found.loader.exec_module)  # type: ignore[method-assign, assignment]
        return found

    def _then_act(self, load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            load(module)
            if module.__name__ == self.name:  # a loader may serve several modules
                self.action()

        return exec_module
