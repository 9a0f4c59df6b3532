"""The configurations of the kernels of derivatives, statistics and e4m3, for most GPUs alike.

The first have smaller tiles than ``table.py``: they hold twice the operands of a forward or backward pass. Every row
was chosen by its machine code for sm_80 and sm_90, of e4m3 for sm_89, 90, 100 and 120: no spills with every feature in
use (``python -m benchmarks gates --derived``). None has been measured on a GPU.
"""

from __future__ import annotations

from fastattn.backends.triton import configs
from fastattn.backends.triton.configs import Config
from fastattn.backends.triton.launch import Call, target

# (kernel, bits of an element, head dim): the row of the least head dim that is not below that of the call. Those of
# "<kernel>@<architecture>" go before the others there.
TABLE = {
    ("row_statistics", 16, 128): Config(64, 32, 4, 2),
    ("row_statistics", 16, 256): Config(64, 32, 8, 1),
    ("row_statistics", 32, 128): Config(32, 32, 8, 1),
    ("row_statistics", 32, 256): Config(16, 32, 8, 1),
    ("key_statistics", 16, 128): Config(32, 64, 4, 2),
    ("key_statistics", 16, 256): Config(32, 64, 8, 1),
    ("key_statistics", 32, 128): Config(32, 32, 8, 1),
    ("key_statistics", 32, 256): Config(16, 32, 8, 1),
    ("statistics_dk", 16, 128): Config(32, 64, 8, 1),
    ("statistics_dk", 16, 256): Config(32, 32, 8, 1),
    ("statistics_dk", 32, 128): Config(32, 32, 8, 1),
    ("statistics_dk", 32, 256): Config(16, 16, 8, 1),
    ("statistics_dq", 16, 128): Config(64, 32, 8, 1),
    ("statistics_dq", 16, 256): Config(32, 32, 8, 1),
    ("statistics_dq", 32, 128): Config(32, 32, 8, 1),
    ("statistics_dq", 32, 256): Config(16, 32, 8, 1),
    ("statistics_dbias", 16, 128): Config(64, 32, 8, 1),
    ("statistics_dbias", 16, 256): Config(32, 32, 8, 1),
    ("statistics_dbias", 32, 128): Config(32, 32, 8, 1),
    ("statistics_dbias", 32, 256): Config(16, 32, 8, 1),
    ("forward_fp8", 8, 64): Config(128, 32, 8, 3),
    ("forward_fp8", 8, 128): Config(64, 64, 8, 3),
    ("forward_fp8", 8, 256): Config(32, 32, 8, 2),
    ("forward_fp8@sm_90", 8, 64): Config(128, 64, 8, 3),
    ("forward_fp8@sm_90", 8, 128): Config(128, 64, 8, 3),
    ("forward_fp8@sm_90", 8, 256): Config(64, 32, 8, 2),
    ("forward_fp8@sm_100", 8, 64): Config(128, 64, 8, 3),
    ("forward_fp8@sm_100", 8, 128): Config(64, 64, 8, 3),
    ("forward_fp8@sm_100", 8, 256): Config(64, 32, 8, 2),
    ("jvp", 16, 128): Config(32, 32, 8, 1),
    ("jvp", 16, 256): Config(16, 16, 8, 1),
    ("jvp", 32, 128): Config(16, 32, 8, 1),
    ("jvp", 32, 256): Config(16, 16, 8, 1),
    ("backward_jvp_dkdv", 16, 128): Config(16, 16, 8, 1),
    ("backward_jvp_dkdv", 16, 256): Config(16, 32, 8, 1),
    ("backward_jvp_dkdv", 32, 128): Config(16, 32, 8, 1),
    ("backward_jvp_dkdv", 32, 256): Config(16, 16, 8, 1),
    ("backward_jvp_dq", 16, 128): Config(16, 32, 8, 1),
    ("backward_jvp_dq", 16, 256): Config(16, 32, 8, 1),
    ("backward_jvp_dq", 32, 128): Config(16, 16, 4, 1),
    ("backward_jvp_dq", 32, 256): Config(16, 16, 8, 1),
    ("backward_jvp_dbias", 16, 128): Config(16, 32, 8, 1),
    ("backward_jvp_dbias", 16, 256): Config(16, 32, 8, 1),
    ("backward_jvp_dbias", 32, 128): Config(32, 32, 8, 1),
    ("backward_jvp_dbias", 32, 256): Config(16, 32, 8, 1),
}


def config_of(call: Call, kernel: str, bits: int | None = None) -> Config:
    """The configuration for a call whose elements have so many bits, or those of q."""
    flags, (_, arch) = call.flags, target(call.inputs.q.device)
    if arch == "interpreter":
        return configs.INTERPRETED
    return config_for(kernel, bits or (32 if flags.precise else 16), max(flags.d_qk, flags.d_v), arch)


def config_for(kernel: str, bits: int, head_dim: int, arch: str = "") -> Config:
    """The row of the least head dim that is not below ``head_dim``."""
    least = min(d for k, b, d in TABLE if (k, b) == (kernel, bits) and d >= head_dim)
    return TABLE.get((f"{kernel}@{arch}", bits, least)) or TABLE[kernel, bits, least]
