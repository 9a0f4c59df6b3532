"""The contract of a backend: what it declares, how it answers, what it computes.

A backend is a folder ``backends/<name>/`` whose ``__init__.py`` exposes ``BACKEND``, an instance of a subclass of
``Backend``, and whose name stands in ``BACKENDS`` in ``backends/__init__.py``. Nothing else registers it.
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

# Serves calls that are alike in the shape, strides, dtype and device of every tensor, and in the spec.
Run = Callable[..., tuple[Tensor, ...]]
# What a forward pass gives: out, lse, and lse_low, which rounding took from lse.
Outputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a backend. A feature of the spec that is not named here is one it lacks.

    Attributes:
        devices: device types; empty means any.
        dtypes: dtypes of q, k and v.
        features: members of ``problem.FEATURES``; ``DERIVATIVE_FEATURES`` for a backend with ``jvp``,
        ``STATISTICS_FEATURES`` for one with ``statistics``, and ``CACHE_FEATURES`` for one with ``attend_to_cache``.
        max_head_dim: largest ``D_qk`` and ``D_v``; None means any.
        min_arch: least CUDA compute capability (major * 10 + minor), where the device is CUDA.
        deterministic: repeated runs give the same bits under ``torch.use_deterministic_algorithms(True)``,
        deterministic_by_flag: and only there; without it faster kernels serve.
    """

    devices: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    features: frozenset[str] = frozenset(FEATURES)
    max_head_dim: int | None = None
    min_arch: int = 0
    deterministic: bool = True
    deterministic_by_flag: bool = False

    def __post_init__(self) -> None:
        known = (*FEATURES, *DERIVATIVE_FEATURES, *STATISTICS_FEATURES, *CACHE_FEATURES)
        unknown = self.features - set(known)
        if unknown:
            raise ValueError(f"capabilities name unknown features {sorted(unknown)}; known: {known}")


class Backend:
    """One implementation of the spec.

    ``out`` is contiguous and shaped ``inputs.out_shape()``; ``lse`` and ``lse_low`` are contiguous fp32 (fp64 for fp64
    inputs) and shaped ``inputs.lse_shape()``; ``numerics.py`` says why there are two. They mean the same in every
    backend, so one may run forward and another backward.
    """

    name: str
    capabilities: Capabilities
    checks_cache_values: bool = False  # attend_to_cache itself raises what cache.check_cache_values would

    def unavailable_reason(self) -> str | None:
        """The reason why this backend cannot run on this machine at all; None if it can."""
        return None

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """The reasons why this backend cannot serve ``problem``; [] means it can. Cheap; reads no tensor values."""
        missing = self.unavailable_reason()
        return [missing] if missing else capability_reasons(self.capabilities, problem)

    def automatic_reasons(self, problem: Problem) -> list[str]:
        """The reasons why this backend, which can serve ``problem``, should only do so by name; [] means it may."""
        return []

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        """``(out, lse, lse_low)``. A backend that serves caches alone has neither this nor ``backward``."""
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

    def statistics_backward(
        self, gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
    ) -> Grads:
        """The gradients of the inputs named in ``needs``, among which v is not."""
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'statistics'")

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, if there are any, in the cache; ``(out, lse)`` of all that it then holds.

        ``out`` and ``lse`` are as those of ``forward``. Only a backend that declares "cache" is asked. On a device it
        must not wait for lengths or block tables: sizes known to the host bound them.
        """
        raise NotImplementedError(f"the {self.name} backend does not declare the feature 'cache'")

    def prepared_forward(self, inputs: Inputs, spec: AttentionSpec, *, keep: bool) -> Run | None:
        """``forward`` for calls like this one, as a function of q, k and v, where there are no other tensors.

        The function reads the addresses of q, k and v alone: their shapes and strides are those of ``inputs``, and it
        may be given any view that begins at the same element. It gives ``(out, *kept)``, what is kept being lse and
        lse_low, or one tensor ``(2, ...)`` of both; without ``keep`` it gives ``(out,)``. None: there is no shorter way
        than ``forward``.
        """
        return None

    def prepared_backward(self, inputs: Inputs, spec: AttentionSpec, dout: Tensor) -> Run | None:
        """``(dq, dk, dv)`` as a function of dout, out, what is kept, and q, k and v; as above.

        ``dout`` is on the meta device and has the strides that gradients will have.
        """
        return None

    def prepared_for_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
        """``attend_to_cache`` for calls like this one, where there are no other tensors than those it is a function of.

        These are q, k_cache, v_cache, cache_lengths, k, v and block_table, the last three of which may be None. It
        checks their values. None: there is no shorter way.
        """
        return None


def capability_reasons(can: Capabilities, problem: Problem) -> list[str]:
    """The part of ``unsupported_reasons`` that a capability table decides."""
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
