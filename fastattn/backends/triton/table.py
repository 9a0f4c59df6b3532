"""The tiles: blocks, warps and pipeline stages of each kernel. ``python -m benchmarks tune`` rewrites this file.

``(arch, kernel, bits of an element, head dim): (BLOCK_M, BLOCK_N, num_warps, num_stages)``; a head dim between two
rows takes the larger one, an architecture without rows those of "default". Every row compiles without spilling, and
within the shared memory of its architecture: ``make gates``.
"""

TABLE: dict[tuple[str, str, int, int], tuple[int, int, int, int]] = {
    ("default", "dbias", 16, 64): (64, 32, 4, 1),
    ("default", "dbias", 16, 128): (64, 32, 4, 1),
    ("default", "dbias", 16, 256): (32, 32, 4, 1),
    ("default", "dbias", 32, 64): (32, 32, 4, 1),
    ("default", "dbias", 32, 128): (32, 32, 4, 1),
    ("default", "dbias", 32, 256): (16, 32, 4, 1),
    ("default", "dkdv", 16, 64): (32, 64, 4, 1),
    ("default", "dkdv", 16, 128): (32, 64, 4, 1),
    ("default", "dkdv", 16, 256): (32, 32, 8, 1),
    ("default", "dkdv", 32, 64): (32, 32, 4, 1),
    ("default", "dkdv", 32, 128): (32, 32, 8, 1),
    ("default", "dkdv", 32, 256): (16, 32, 8, 1),
    ("default", "dq", 16, 64): (64, 32, 4, 1),
    ("default", "dq", 16, 128): (64, 32, 4, 1),
    ("default", "dq", 16, 256): (32, 32, 8, 1),
    ("default", "dq", 32, 64): (32, 32, 4, 1),
    ("default", "dq", 32, 128): (32, 32, 8, 1),
    ("default", "dq", 32, 256): (16, 32, 8, 1),
    ("default", "forward", 16, 64): (64, 32, 4, 2),
    ("default", "forward", 16, 128): (64, 32, 4, 2),
    ("default", "forward", 16, 256): (64, 32, 4, 1),
    ("default", "forward", 32, 64): (32, 32, 4, 1),
    ("default", "forward", 32, 128): (32, 32, 4, 1),
    ("default", "forward", 32, 256): (16, 32, 8, 1),
    ("sm_90", "forward", 16, 64): (128, 128, 8, 3),
    ("sm_90", "forward", 16, 128): (128, 128, 8, 2),
    ("sm_90", "forward", 16, 256): (128, 64, 8, 2),
    ("sm_90", "dkdv", 16, 64): (64, 128, 8, 2),
    ("sm_90", "dkdv", 16, 128): (64, 128, 8, 2),
    ("sm_90", "dkdv", 16, 256): (32, 64, 8, 1),
    ("sm_90", "dq", 16, 64): (128, 64, 8, 2),
    ("sm_90", "dq", 16, 128): (128, 64, 8, 2),
    ("sm_90", "dq", 16, 256): (64, 32, 8, 2),
}
