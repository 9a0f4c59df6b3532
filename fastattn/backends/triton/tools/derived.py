"""The builds of the kernels of derivatives, statistics and e4m3, and how each is launched."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from fastattn.backends.triton.tools.builds import EVERYTHING, Build, problem_of
from fastattn.kv_cache import FP8
from fastattn.problem import Inputs, Rows, Tangents
from fastattn.quantized import BLOCK, Quantized, transposed
from fastattn.spec import AttentionSpec

KERNELS = (
    "jvp", "backward_jvp_dkdv", "backward_jvp_dq", "backward_jvp_dbias", "row_statistics", "key_statistics",
    "statistics_dk", "statistics_dq", "statistics_dbias", "forward_fp8",
)  # fmt: skip


def all_builds() -> list[Build]:
    """Every row of the table, with little and with everything in use.

    For two generations of GPUs, and in e4m3 for those that multiply it.
    """
    from fastattn.backends.triton.derived_configs import TABLE

    found = []
    for kernel, bits, head_dim in (row for row in TABLE if "@" not in row[0]):
        targets = ("sm_89", "sm_90", "sm_100", "sm_120") if bits == 8 else ("sm_80", "sm_90")
        least = "bias causal" if kernel.endswith("dbias") else "causal"
        most = EVERYTHING.replace(" dropout", "") if bits == 8 else EVERYTHING
        for target, what in itertools.product(targets, (least, most)):
            found.append(Build("default", target, kernel, what, bits, head_dim))
    return found


def launch(build: Build) -> None:
    """Launch the kernel of a build on tensors without memory."""
    inputs, spec = problem_of(build)
    if build.kernel == "forward_fp8":
        _launch_fp8(inputs, spec)
    elif build.kernel.startswith(("jvp", "backward_jvp")):
        _launch_derivative(build.kernel, inputs, spec)
    else:
        _launch_statistics(build.kernel, inputs, spec)


def _launch_derivative(kernel: str, inputs: Inputs, spec: AttentionSpec) -> None:
    from fastattn.backends.triton import launch_derivatives

    out, lse = inputs.q.new_empty(inputs.out_shape()), _of_rows(inputs)
    tangents, rows = Tangents(inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks), Rows(out, lse, out, lse, lse)
    if kernel == "jvp":
        launch_derivatives.jvp(tangents, rows, inputs, spec)
    else:
        pass_ = launch_derivatives.BackwardJvp.of(rows, rows, tangents, inputs, spec)
        getattr(pass_, kernel.removeprefix("backward_jvp_"))()


def _launch_statistics(kernel: str, inputs: Inputs, spec: AttentionSpec) -> None:
    from fastattn.backends.triton import launch_statistics
    from fastattn.backends.triton.statistics import OfRows

    pass_ = launch_statistics.Pass.of(inputs, spec)
    of_keys = launch_statistics.of_keys(*(inputs.q.new_empty(inputs.key_shape(), dtype=torch.float32),) * 2)
    given = OfRows(_of_rows(inputs), _of_rows(inputs), None), of_keys._replace(key_max=None)
    if kernel == "row_statistics":
        pass_.rows(OfRows(None, None, pass_.largest_key), *given)
    elif kernel == "key_statistics":
        pass_.keys(of_keys)
    else:
        getattr(pass_, kernel.removeprefix("statistics_"))(*given)


def _launch_fp8(inputs: Inputs, spec: AttentionSpec) -> None:
    from fastattn.backends.triton import launch_fp8

    blocks = -(-inputs.max_seqlen_q // BLOCK)
    q, k, v = (
        Quantized(x.to(FP8), x.new_empty(x.shape[0], x.shape[2], blocks, dtype=torch.float32), x.dtype)
        for x in (inputs.q, inputs.k, inputs.v)
    )
    launch_fp8.forward(q, k, dataclasses.replace(v, values=transposed(v.values)), inputs, spec)


def _of_rows(inputs: Inputs) -> torch.Tensor:
    return inputs.q.new_empty(inputs.lse_shape(), dtype=torch.float32)
