"""C++ for CPUs: attention to a cache, read once, where it lies and as it is stored. Built from ``csrc/cpu/``.

It serves the few query rows of a decoding step; prompts and everything else are left to ``portable``. It chooses from
instruction sets at run time (AVX-512, AVX2, or what every x86-64 has), and works with the threads of torch.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from fastattn.backends.base import Backend, Capabilities, Run, capability_reasons
from fastattn.backends.cpu import decode, library
from fastattn.kv_cache import CacheInputs
from fastattn.problem import CACHE_FEATURES, FEATURES, Problem
from fastattn.spec import AttentionSpec

TESTED = ("x86_64",)  # kinds of machines on which it has run


def delivery() -> str:
    """How the kernels come to this machine: built, compiled at first use, or why there are none."""
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
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES + CACHE_FEATURES) - {"strided head dim", "prompt"},
        max_head_dim=256,
    )
    checks_cache_values = True

    def unavailable_reason(self) -> str | None:
        found, how = library.delivered()
        return how if found is None else None

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """As the contract has it; but the library is built only for a call that it could serve."""
        if "cache" not in problem.features:
            return ["attention to a cache alone"]
        if reasons := capability_reasons(self.capabilities, problem):
            return reasons
        missing = self.unavailable_reason()
        return [missing] if missing else []

    def automatic_reasons(self, problem: Problem) -> list[str]:
        kind = platform.machine()
        return [] if kind in TESTED else [f"not yet run on {kind}"]

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return decode.attend(_library(), inputs, spec)

    def prepared_for_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
        return decode.prepared(_library(), inputs, spec)


BACKEND = CpuBackend()
