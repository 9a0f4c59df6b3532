"""The contract of a backend: its capabilities, its reasons against problems, and its results.

A backend is a folder ``backends/<name>/`` whose ``__init__.py`` exposes ``BACKEND``, an instance of a subclass of
``Backend``. It is registered by its name in ``BACKENDS`` in ``backends/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.kv_cache import CacheInputs
from fastattn.problem import (
    CACHE_FEATURES,
    DERIVATIVE_FEATURES,
    FEATURES,
    FLOATS,
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

QKV = ("q", "k", "v")
# A function for calls with equal specs, whose tensors have equal shapes, strides, dtypes and devices.
Run = Callable[..., tuple[Tensor, ...]]
# The results of a forward pass: out, lse, and lse_low, the rounding error of lse.
Outputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a backend. It does not support features of the spec that are not named here.

    Attributes:
        devices: device types; empty means any.
        dtypes: dtypes of q, k and v.
        features: members of ``problem.FEATURES``; ``DERIVATIVE_FEATURES`` for a backend with ``jvp``,
        ``STATISTICS_FEATURES`` for one with ``statistics``, ``FP8_FEATURES`` with ``forward_fp8``, ``CACHE_FEATURES``
        with ``attend_to_cache``.
        max_head_dim: largest ``D_qk`` and ``D_v``; None means any.
        min_arch: least CUDA compute capability (major * 10 + minor), on CUDA devices.
        deterministic: repeated runs give the same bits under ``torch.use_deterministic_algorithms(True)``.
        deterministic_by_flag: without that flag they may differ, because faster kernels serve.
    """

    devices: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    features: frozenset[str] = frozenset(FEATURES)
    max_head_dim: int | None = None
    min_arch: int = 0
    deterministic: bool = True
    deterministic_by_flag: bool = False

    def __post_init__(self) -> None:
        known = (*FEATURES, *DERIVATIVE_FEATURES, *STATISTICS_FEATURES, *FP8_FEATURES, *CACHE_FEATURES)
        unknown = self.features - set(known)
        if unknown:
            raise ValueError(f"capabilities name unknown features {sorted(unknown)}; known: {known}")


class Backend:
    """One implementation of the spec.

    ``out`` is contiguous and shaped ``inputs.out_shape()``; ``lse`` and ``lse_low`` are contiguous fp32 (fp64 for fp64
    inputs) and shaped ``inputs.lse_shape()``; ``numerics.py`` explains both. All backends define them alike, so one may
    run forward and another backward.
    """

    name: str
    capabilities: Capabilities
    computes_weights: bool = False  # has ``weights`` and their gradient; else the formula gives them
    prepares_more: bool = False  # prepared runs take the tensors of problem.MORE, too
    checks_cache_values: bool = False  # attend_to_cache itself makes the checks of kv_cache.check_cache_values

    def unavailable_reason(self) -> str | None:
        """The reason why this backend cannot run on this machine at all; None if it can."""
        return None

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """The reasons why this backend cannot serve ``problem``; [] means it can. Cheap; reads no tensor values."""
        missing = self.unavailable_reason()
        return [missing] if missing else capability_reasons(self.capabilities, problem)

    def automatic_reasons(self, problem: Problem) -> list[str]:
        """The reasons why this backend, which can serve ``problem``, should do so by name only; [] allows selection."""
        return []

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        """``(out, lse, lse_low)``. A backend that only serves caches has neither this nor ``backward``."""
        raise NotImplementedError(f"the {self.name} backend serves caches alone")

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
        """The gradients of the inputs named in ``needs`` (members of ``problem.DIFFERENTIABLE``)."""
        raise NotImplementedError(f"the {self.name} backend serves caches alone")

    def jvp(self, tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """The tangents of ``out`` and ``lse`` as the inputs move along ``tangents``.

        ``results`` are those of a forward pass, by any backend. Only one that declares "jvp" is asked, here and below.
        """
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'jvp'")

    def backward_jvp(
        self, rows: Rows, moved: Rows, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        """The tangents of the gradients named in ``needs``.

        Args:
            rows: what the backward pass is given.
            moved: the tangents of ``dout`` and ``dlse``, None where they stand still, and those of ``out`` and ``lse``,
                which ``jvp`` computes from ``tangents``.
            tangents: those of the inputs.
            inputs: the tensors.
            spec: the scalars.
            needs: members of ``problem.DIFFERENTIABLE``.
        """
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'jvp'")

    def statistics(self, inputs: Inputs, spec: AttentionSpec) -> Statistics:
        """The statistics of the weights. Only a backend that declares "statistics" is asked, here and below."""
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'statistics'")

    def forward_fp8(
        self, q: Quantized, k: Quantized, v: Quantized, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of operands in e4m3. Only a backend that declares "fp8" is asked.

        ``inputs`` has the other tensors; its q, k and v have only the shapes, and the dtype of ``out``.
        """
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'fp8'")

    def statistics_backward(
        self, gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        """The gradients of the inputs named in ``needs``, among which v is not."""
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'statistics'")

    def weights(self, inputs: Inputs, spec: AttentionSpec, *, averages: bool, dtype: torch.dtype) -> Tensor:
        """The weights ``(B, H_q, S_q, S_kv)`` of a dense call without dropout, or ``averages`` over its heads.

        Only a backend that ``computes_weights`` is asked, here and below.
        """
        raise NotImplementedError(f"the {self.name} backend does not compute weights")

    def weights_backward(self, dweights: Tensor, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> Grads:
        """The gradients named in ``needs``, among which v is not. If ``dweights`` has no heads it is of averages."""
        raise NotImplementedError(f"the {self.name} backend does not compute weights")

    def prepared_weights(
        self, inputs: Inputs, spec: AttentionSpec, *, averages: bool, dtype: torch.dtype
    ) -> tuple[Callable[..., Tensor], Run] | None:
        """``weights`` as a function of q and k for calls like this one, which has no other tensors; and of their
        gradient, q and k that of ``weights_backward``, (dq, dk). On the terms of ``prepared_forward``.
        """
        return None

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Append the new keys and values, if any, to the cache, and return ``(out, lse)`` of attention to all of it.

        ``out`` and ``lse`` are like those of ``forward``. It is called only if the backend declares "cache". On a
        device it must not wait for lengths or block tables, but use bounds that the host knows.
        """
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'cache'")

    def prepared_forward(
        self, inputs: Inputs, spec: AttentionSpec, *, keep: bool, heads_first: bool = False, apart: bool = False
    ) -> Run | None:
        """``forward`` for calls like this one, as a function of q, k, v and, if ``prepares_more``, of ``problem.MORE``.

        The function reads only the addresses of the tensors: it takes their shapes and strides from ``inputs``, and may
        be given any view that begins at the same element. Of ``MORE`` it is given all or, if all are None, none. It
        returns ``(out, *kept)``, where ``kept`` is lse and lse_low, or without ``apart`` one tensor ``(2, ...)`` of
        both; without ``keep`` it returns ``(out,)``. With ``heads_first`` the dimensions 1 and 2 of out are exchanged,
        whose memory stays as it is. None means that calls like this one have to use ``forward``.
        """
        return None

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
        """A function ``(dout, out, *kept, q, k, v, *more) -> (dq, dk, dv, ...)``, on the terms of ``prepared_forward``.

        ``dout`` is on the meta device and has the strides that gradients of out will have; in host memory they may have
        others. ``needs`` names q, k, v, and those of bias and sinks whose gradients follow.
        """
        return None

    def prepared_for_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
        """``attend_to_cache`` for calls like this one, as a function of q, k_cache, v_cache, cache_lengths, k, v,
        block_table.

        The last three may be None; there are no other tensors. The function checks lengths and page numbers. None means
        that calls like this one have to use ``attend_to_cache``.
        """
        return None


def capability_reasons(can: Capabilities, problem: Problem) -> list[str]:
    """The reasons against ``problem`` that follow from a capability table."""
    reasons = []
    if can.devices and problem.device not in can.devices:
        reasons.append(f"device {problem.device} (has {', '.join(sorted(can.devices))})")
    if problem.device == "cuda" and problem.arch < can.min_arch:
        reasons.append(f"compute capability {problem.arch / 10:.1f} (needs {can.min_arch / 10:.1f})")
    if problem.dtype not in can.dtypes:
        reasons.append(f"dtype {problem.dtype} (has {', '.join(str(d) for d in can.dtypes)})")
    if can.max_head_dim is not None and max(problem.head_dim_qk, problem.head_dim_v) > can.max_head_dim:
        dims = f"{problem.head_dim_qk}/{problem.head_dim_v}"
        reasons.append(f"head dim {dims} (at most {can.max_head_dim})")
    reasons += [f"no {feature}" for feature in sorted(problem.features - can.features)]
    if problem.deterministic and not can.deterministic:
        reasons.append("not deterministic")
    return reasons
