"""The Triton backend: every feature of the spec, for every GPU that Triton supports. Not yet run on a GPU.

Importing this package imports neither Triton nor a kernel; the first call does. With ``TRITON_INTERPRET=1`` in the
environment the kernels run on CPU tensors in Triton's interpreter: slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import evidence
from fastattn.backends.base import QKV, Backend, Capabilities, Outputs, Run, capability_reasons
from fastattn.kv_cache import CacheInputs
from fastattn.problem import (
    CACHE_FEATURES,
    DERIVATIVE_FEATURES,
    FEATURES,
    FP8_FEATURES,
    STATISTICS_FEATURES,
    Grads,
    Inputs,
    Problem,
    Rows,
    Statistics,
    StatisticsGradient,
    Tangents,
)
from fastattn.quantized import Quantized
from fastattn.spec import AttentionSpec

ALIGNMENT = 16  # bytes: kernels are compiled for multiples of it
DERIVED_HEAD_DIM = 256  # the widest for which kernels of tangents, statistics and e4m3 have tiles that do not spill
FP8_ARCH = 89  # the first compute capability with products of e4m3


class TritonBackend(Backend):
    name = "triton"
    capabilities = Capabilities(
        devices=frozenset({"cuda", "cpu"}),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        features=frozenset(FEATURES + DERIVATIVE_FEATURES + STATISTICS_FEATURES + FP8_FEATURES + CACHE_FEATURES),
        max_head_dim=512,
        min_arch=80,
    )

    def unavailable_reason(self) -> str | None:
        if not _has_triton():
            return "triton is not installed"
        if not torch.cuda.is_available() and not is_interpreting():
            return "no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
        return None

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        missing = self.unavailable_reason()
        if missing:
            return [missing]
        if problem.device == "cpu" and not is_interpreting():
            return ["device cpu (TRITON_INTERPRET=1 runs it there, slowly, for tests)"]
        reasons = capability_reasons(self.capabilities, problem)
        if not reasons and "fp8" in problem.features and problem.device == "cuda":
            reasons = _reasons_against_e4m3(problem.arch)
        derived = problem.features & {*DERIVATIVE_FEATURES, *STATISTICS_FEATURES, *FP8_FEATURES}
        if not reasons and derived and max(problem.head_dim_qk, problem.head_dim_v) > DERIVED_HEAD_DIM:
            dims = f"{problem.head_dim_qk}/{problem.head_dim_v}"
            reasons.append(f"{', '.join(sorted(derived))} at head dim {dims} (at most {DERIVED_HEAD_DIM})")
        return reasons

    def automatic_reasons(self, problem: Problem) -> list[str]:
        if is_interpreting():
            return ["TRITON_INTERPRET=1 makes it very slow"]
        return evidence.reasons_against(self.name, problem)

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        from fastattn.backends.triton import launch

        return launch.forward(inputs, spec)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        inputs: Inputs,
        spec: AttentionSpec,
        needs: Sequence[str],
    ) -> Grads:
        from fastattn.backends.triton import launch

        return launch.backward(dout, dlse, out, lse, lse_low, inputs, spec, needs)

    def jvp(self, tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        from fastattn.backends.triton import launch_derivatives

        return launch_derivatives.jvp(tangents, results, inputs, spec)

    def backward_jvp(
        self, rows: Rows, moved: Rows, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        from fastattn.backends.triton import launch_derivatives

        return launch_derivatives.backward_jvp(rows, moved, tangents, inputs, spec, needs)

    def statistics(self, inputs: Inputs, spec: AttentionSpec) -> Statistics:
        from fastattn.backends.triton import launch_statistics

        return launch_statistics.forward(inputs, spec)

    def statistics_backward(
        self, gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        from fastattn.backends.triton import launch_statistics

        return launch_statistics.backward(gradient, inputs, spec, needs)

    def forward_fp8(
        self, q: Quantized, k: Quantized, v: Quantized, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        from fastattn.backends.triton import launch_fp8

        return launch_fp8.forward(q, k, v, inputs, spec)

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        from fastattn.backends.triton import launch_decode

        return launch_decode.attend_to_cache(inputs, spec)

    def prepared_forward(
        self, inputs: Inputs, spec: AttentionSpec, *, keep: bool, heads_first: bool = False, apart: bool = False
    ) -> Run | None:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            from fastattn.backends.triton import launch

            out = torch.empty(inputs.out_shape(), dtype=q.dtype, device=q.device)
            kept = _rows_to_keep(inputs, apart)
            launch.forward(inputs.replace(q=q, k=k, v=v), spec, results=(out, *_apart(kept)))
            return (out, *kept) if keep else (out,)

        return self._prepared(forward, (inputs.q, inputs.k, inputs.v), int(heads_first))

    def prepared_backward(
        self,
        inputs: Inputs,
        spec: AttentionSpec,
        dout: Tensor,
        needs: Sequence[str] = QKV,
        *,
        heads_first: bool = False,
        apart: bool = False,
    ) -> Run | None:
        def backward(dout: Tensor, out: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
            *kept, q, k, v = others
            again = inputs.replace(q=q, k=k, v=v)
            grads = self.backward(dout, None, out, *_apart(kept), again, spec, QKV)
            return grads.dq, grads.dk, grads.dv

        q = inputs.q
        out, dout = q.new_empty(inputs.out_shape()), torch.empty_like(dout, device=q.device)
        given = (dout, out, *_rows_to_keep(inputs, apart), q, inputs.k, inputs.v)
        return self._prepared(backward, given, 3 * int(heads_first))

    def prepared_for_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
        def attend(*tensors: Any) -> tuple[Tensor, Tensor]:
            return self.attend_to_cache(inputs.replace(**dict(zip(names, tensors, strict=True))), spec)

        names = ("q", "k_cache", "v_cache", "cache_lengths", "k", "v", "block_table")
        return self._prepared(attend, tuple(getattr(inputs, name) for name in names))

    def _prepared(self, function: Callable[..., Any], given: Sequence[Tensor | None], turned: int = 0) -> Run | None:
        if is_interpreting():
            return None
        from fastattn.backends.triton import plans

        return plans.prepare(function, given, turned)


def _rows_to_keep(inputs: Inputs, apart: bool) -> tuple[Tensor, ...]:
    """Memory for lse and lse_low: ``apart``, or one tensor ``(2, ...)`` if the second begins aligned, for speed."""
    shape, device = inputs.lse_shape(), inputs.q.device
    if not apart and 4 * math.prod(shape) % ALIGNMENT == 0:
        return (torch.empty((2, *shape), dtype=torch.float32, device=device),)
    return tuple(torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))


def _apart(kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lse, lse_low = kept if len(kept) == 2 else kept[0].unbind()
    return lse, lse_low


def _reasons_against_e4m3(arch: int) -> list[str]:
    if torch.version.hip is not None:
        return ["products of e4m3 on an AMD GPU, whose e4m3 differs between generations"]
    if arch < FP8_ARCH:
        return [f"products of e4m3 on compute capability {arch / 10:.1f} (at least {FP8_ARCH / 10:.1f})"]
    return []


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether kernels will run (or already run) in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


BACKEND = TritonBackend()
