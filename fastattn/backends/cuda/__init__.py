"""CUDA C++ for Hopper (sm_90a): the kernels of ``csrc/``, built with the package or compiled at first use.

Not yet run on a GPU, so it serves only if it is asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.backends.base import QKV, Backend, Capabilities, Outputs, Run
from fastattn.backends.cuda import abi, backward, counters, decode, library, nvrtc, plans
from fastattn.backends.cuda.terms import Terms
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Grads, Inputs, Problem
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import current_raw_stream

ARCH = 90  # wgmma and setmaxnreg exist on sm_90a alone
MAX_HEAD_DIM = 256


@functools.cache
def _delivered() -> tuple[library.Library | nvrtc.NvrtcKernels | None, str]:
    """The launcher of the kernels and how it was obtained; None and the reason if there is none."""
    not_built = "not built with the package"
    if nvrtc.is_watched():
        not_built = f"{nvrtc.WATCHDOG} is set, and a library has no watchdog"
    elif (path := library.find()) is not None:
        try:
            how = "built with the package" if path == library.PATH else "built by `fastattn build --cuda`"
            return library.Library(path), how
        except OSError as error:
            not_built = str(error)
    try:
        return nvrtc.NvrtcKernels(), f"{not_built}; compiled at first use by NVRTC {nvrtc.version()}"
    except nvrtc.NvrtcError as error:
        return None, f"unavailable: {not_built}, and {error}"


def _kernels() -> library.Library | nvrtc.NvrtcKernels:
    kernels, how = _delivered()
    if kernels is None:
        raise RuntimeError(how)
    return kernels


def _sees_gpu() -> bool:
    return torch.cuda.is_available() and torch.version.cuda is not None


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """The stream to launch on, with its device current; 0 for host memory, on which tests run emulated kernels."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield current_raw_stream(device)


def delivery() -> str:
    """The source of the CUDA kernels: built, compiled at first use, or the reason why there are none."""
    return _delivered()[1]


class CudaBackend(Backend):
    name = "cuda"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=(torch.float16, torch.bfloat16),
        features=frozenset({"band", "softcap", "sinks", "packed", "gqa", "mixed head dims"})
        | {"alibi", "segments", "dropout", "mask", "bias"}
        | {"cache", "append", "paged cache", "fp8 cache", "tree", "rotary", "prompt", "batch invariant"},
        max_head_dim=MAX_HEAD_DIM,
        min_arch=ARCH,
        deterministic_by_flag=True,
    )

    def unavailable_reason(self) -> str | None:
        kernels, how = _delivered()
        if kernels is None:
            return how
        return None if _sees_gpu() else "no GPU that torch sees"

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        reasons = super().unsupported_reasons(problem)
        if problem.arch > ARCH:
            reasons.append(f"compute capability {problem.arch / 10:.1f} (made for {ARCH / 10:.1f} alone)")
        for name, size in (("D_qk", problem.head_dim_qk), ("D_v", problem.head_dim_v)):
            step = 16 if "fp8 cache" in problem.features else 8  # elements of 16 bytes of the cache or of q
            if size % step:
                reasons.append(f"head dim {name} = {size} (multiples of {step})")
        return reasons

    def automatic_reasons(self, problem: Problem) -> list[str]:
        """The reason against automatic selection: no kernel has run on a GPU yet."""
        return ["not yet run on a GPU"]

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        kernels = _kernels()
        inputs, spec = abi.prepared(inputs, spec)
        results, terms = abi.results(inputs), Terms.of(inputs, spec)
        with _current_stream(inputs.q.device) as stream:
            counter = counters.of_stream(inputs.q.device, stream) if counters.draws(inputs, spec) else None
            kernels.launch(abi.FORWARD, abi.forward_fields(terms, spec, results, stream, counter))
        return results

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
        launch = functools.partial(_kernels().launch, abi.BACKWARD)
        problem = backward.BackwardProblem(dout, dlse, out, lse, lse_low, inputs, spec, tuple(needs))
        with _current_stream(inputs.q.device) as stream:
            return backward.backward(problem, launch, _multiprocessors(inputs.q.device), stream)

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        launch, device = functools.partial(_kernels().launch, abi.DECODE), inputs.q.device
        with _current_stream(device) as stream:
            return decode.attend(launch, inputs, spec, _multiprocessors(device), stream)

    def prepared_forward(
        self, inputs: Inputs, spec: AttentionSpec, *, keep: bool, heads_first: bool = False, apart: bool = False
    ) -> Run | None:
        with _current_stream(inputs.q.device):
            prepare, multiprocessors = _kernels().prepared, _multiprocessors(inputs.q.device)
            return plans.forward(prepare, inputs, spec, multiprocessors, keep=keep, heads_first=heads_first)

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
        with _current_stream(inputs.q.device):
            prepare, multiprocessors = _kernels().prepared, _multiprocessors(inputs.q.device)
            return plans.backward_pass(prepare, inputs, spec, dout, multiprocessors, heads_first=heads_first)

    def prepared_for_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
        with _current_stream(inputs.q.device):
            multiprocessors = _multiprocessors(inputs.q.device)
            return plans.for_cache(_kernels().prepared, inputs, spec, multiprocessors, self.attend_to_cache)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """The number of blocks that run at a time; 1 on an emulated device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


BACKEND = CudaBackend()
