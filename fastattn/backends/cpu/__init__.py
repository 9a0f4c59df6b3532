"""C++ for CPUs: attention, forward and backward, and attention to a cache in its stored format, from ``csrc/cpu/``.

Of calls with a cache it serves the few query rows of a decoding step; prompts are left to ``portable``. It chooses from
instruction sets at run time (AVX-512 with products of bf16, AVX-512, AVX2, or what every x86-64 has), and works with
the threads of torch. ``FASTATTN_CPU_ISA`` asks for one of them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastattn.backends.base import QKV, Backend, Capabilities, Outputs, Run, capability_reasons
from fastattn.backends.cpu import attention, decode, derivatives, library, statistics
from fastattn.kv_cache import CacheInputs
from fastattn.problem import (
    CACHE_FEATURES,
    DERIVATIVE_FEATURES,
    FEATURES,
    STATISTICS_FEATURES,
    Grads,
    Inputs,
    Problem,
    Rows,
    Statistics,
    StatisticsGradient,
    Tangents,
)
from fastattn.spec import AttentionSpec

TESTED = ("x86_64",)  # kinds of machines on which it has run


def delivery() -> str:
    """The origin of the kernels: built, compiled at first use, or the reason why there are none."""
    found, how = library.delivered()
    return how if found is None else f"{how}; {found}"


def _library() -> library.Library:
    found, how = library.delivered()
    if found is None:
        raise RuntimeError(how)
    return found


class CpuBackend(Backend):
    name = "cpu"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        features=frozenset(FEATURES + DERIVATIVE_FEATURES + STATISTICS_FEATURES + CACHE_FEATURES),
        max_head_dim=attention.MAX_HEAD_DIM,
    )
    prepares_more = True
    computes_weights = True
    checks_cache_values = True

    def unavailable_reason(self) -> str | None:
        found, how = library.delivered()
        return how if found is None else None

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """The reasons of the contract; the library is built only for a problem that it could serve."""
        reasons = capability_reasons(self.capabilities, problem)
        if "cache" in problem.features:
            reasons += decode.reasons(problem)
        if reasons:
            return reasons
        missing = self.unavailable_reason()
        return [missing] if missing else []

    def automatic_reasons(self, problem: Problem) -> list[str]:
        kind = platform.machine()
        return [] if kind in TESTED else [f"not yet run on {kind}"]

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        return attention.forward(_library(), inputs, spec)

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
        return attention.backward(_library(), dout, dlse, (out, lse, lse_low), inputs, spec, needs)

    def jvp(self, tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return derivatives.jvp(_library(), tangents, results, inputs, spec)

    def backward_jvp(
        self, rows: Rows, moved: Rows, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        return derivatives.backward_jvp(_library(), rows, moved, tangents, inputs, spec, needs)

    def statistics(self, inputs: Inputs, spec: AttentionSpec) -> Statistics:
        return statistics.forward(_library(), inputs, spec)

    def statistics_backward(
        self, gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        return statistics.backward(_library(), gradient, inputs, spec, needs)

    def weights(self, inputs: Inputs, spec: AttentionSpec, *, averages: bool, dtype: torch.dtype) -> Tensor:
        return statistics.weights(_library(), inputs, spec, averages=averages, dtype=dtype)

    def weights_backward(self, dweights: Tensor, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> Grads:
        return statistics.weights_backward(_library(), dweights, inputs, spec, needs)

    def prepared_weights(
        self, inputs: Inputs, spec: AttentionSpec, *, averages: bool, dtype: torch.dtype
    ) -> tuple[Callable[..., Tensor], Run] | None:
        return statistics.prepared_weights(_library(), inputs, spec, averages=averages, dtype=dtype)

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return decode.attend(_library(), inputs, spec)

    def prepared_forward(
        self, inputs: Inputs, spec: AttentionSpec, *, keep: bool, heads_first: bool = False, apart: bool = False
    ) -> Run | None:
        return attention.prepared_forward(_library(), inputs, spec, keep=keep, heads_first=heads_first, apart=apart)

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
        return attention.prepared_backward(_library(), inputs, spec, dout, needs, heads_first=heads_first, apart=apart)

    def prepared_for_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
        return decode.prepared(_library(), inputs, spec)


BACKEND = CpuBackend()
