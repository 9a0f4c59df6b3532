"""A model of each kernel's time on an H200, from what it does: products, exponentials, instructions, bytes, makespan.

Nothing of it has been compared with a run of ours. In one clock a multiprocessor does 4096 FLOP of 16-bit products or
16 exponentials, issues 128 instructions of a lane, and moves 128 bytes of shared memory. These units work side by side,
but not perfectly: a block of keys takes the p-norm of their clocks, between the largest (p infinite) and the sum (p =
1). A prediction is the time between p = 4 and p = 3. At head dim 128, 16k tokens, without a mask, that is 615 to 666
TFLOP/s forward and 576 to 615 backward; FlashAttention-3 is reported to reach 648 and 561 (arXiv 2407.08608), cuDNN
9.19 702 and 612 (NVIDIA's cudnn-frontend, benchmark/sdpa_benchmark_training, H200).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.backends.cuda.backward import STORED_PARTS, TILE_OVERHEAD, ends_earlier_with_parts
from fastattn.backends.cuda.instances import (
    DkdvConfig,
    DqConfig,
    ForwardConfig,
    dkdv_configs,
    dq_configs,
    forward_configs,
    select,
    select_dkdv,
    select_dq,
)
from fastattn.backends.cuda.tools.makespan import MULTIPROCESSORS, Shape, Share, Work, shares
from fastattn.spec import AttentionSpec

PRODUCT_FLOPS = 790e12  # of a large matrix product on this card: power, not the clock, limits it
CLOCK = PRODUCT_FLOPS / (MULTIPROCESSORS * 4096)
MEMORY = 4.2e12  # bytes a second that a copy reads and writes
LAUNCH = 3e-6  # seconds before a kernel's first tile and after its last
SHARPNESS = (4.0, 3.0)  # p of the faster and of the slower end

# Instructions of a lane, from the machine code of nvcc 13.0: for a score, for a number of out that is scaled again, for
# a score and its gradient, for a number of dq that is added to its sum.
PER_SCORE, PER_OUT, PER_GRADIENT, PER_SUM = 6.0, 1.7, 9.6, 7.0
# What each term adds to a score, by machine code for 32 of them; ids are compared only where segments end. Where
# rows are keys, a thread uses two of the eight numbers that a call of Philox gives. SCALED: the product with the scale.
PER_TERM = {"alibi": 3.6, "segments": 0.0, "mask": 10.2, "bias": 11.4, "dropout": 9.4}
TURNED_DROPOUT, SCALED = 26.5, 1.0
CAP_EXPONENTIALS, CAP_INSTRUCTIONS = 2, 6  # that tanh adds to a score: an exponential and a reciprocal


@dataclass(frozen=True)
class Clocks:
    """Clocks of each unit of a multiprocessor for a block of keys times a block of queries."""

    tensor: float
    exponential: float
    issue: float
    shared: float

    @property
    def limit(self) -> str:
        """The unit that takes longest."""
        return max(vars(self), key=lambda name: getattr(self, name))

    def together(self, sharpness: float) -> float:
        return sum(clocks**sharpness for clocks in vars(self).values()) ** (1 / sharpness)


def _by_rows(columns: int, n: int) -> int:
    """Bytes of shared memory that a product [64, columns] [columns, n] reads if both operands lie there."""
    return columns // 16 * (2048 + 32 * n)


def _from_registers(rows: int, columns: int) -> int:
    """The same of a product [64, rows] [rows, columns] whose left operand is in registers."""
    return rows // 16 * 32 * columns


def _caps(x: ForwardConfig | DkdvConfig | DqConfig) -> int:
    """Whether every score is capped; kernels with terms ask, and problems with both are taken not to cap."""
    return x.softcap and not x.terms


def _per_term(terms: Sequence[str], is_turned: bool = False) -> float:
    """Instructions that the terms of a problem add to a score."""
    costs = {**PER_TERM, "dropout": TURNED_DROPOUT} if is_turned else PER_TERM
    return sum(costs.get(name, 0.0) for name in terms) + SCALED * bool(terms)


def forward_clocks(x: ForwardConfig, terms: Sequence[str] = ()) -> Clocks:
    pairs, consumers = x.block_m * x.block_n, x.block_m // 64
    read = consumers * (_by_rows(x.d_qk, x.block_n) + _from_registers(x.block_n, x.d_v))
    per_score = PER_SCORE + CAP_INSTRUCTIONS * _caps(x) + _per_term(terms)
    return Clocks(
        tensor=2 * pairs * (x.d_qk + x.d_v) / 4096,
        exponential=pairs * (1 + CAP_EXPONENTIALS * _caps(x)) / 16,
        issue=(per_score * pairs + PER_OUT * x.block_m * x.d_v) / 128,
        shared=(read + 2 * x.block_n * (x.d_qk + x.d_v)) / 128,
    )


def dkdv_clocks(x: DkdvConfig, terms: Sequence[str] = ()) -> Clocks:
    pairs, scores_computed = x.block_m * x.block_n, 2 if x.is_split else 1
    scores, dp = _by_rows(x.d_qk, x.block_m), _by_rows(x.d_v, x.block_m)
    sums = _from_registers(x.block_m, x.d_qk) + _from_registers(x.block_m, x.d_v)
    read = 2 * scores + dp + sums if x.is_split else 2 * (scores + dp + sums)
    written = 2 * x.block_m * (x.d_qk + x.d_v)
    if x.fused:
        parts = max(2, -(-x.d_qk // 64))  # of 64 columns; the third is added by both consumers
        read += parts * _by_rows(x.block_n, 64)
        written += 2 * pairs + 4 * x.block_m * (x.d_qk + (64 if parts == 3 else 0))
    per_score = PER_GRADIENT + CAP_INSTRUCTIONS * _caps(x) + _per_term(terms, is_turned=True)
    return Clocks(
        tensor=2 * pairs * ((scores_computed + 1 + x.fused) * x.d_qk + 2 * x.d_v) / 4096,
        exponential=scores_computed * pairs * (1 + CAP_EXPONENTIALS * _caps(x)) / 16,
        issue=(scores_computed * per_score * pairs + x.fused * PER_SUM * x.block_m * x.d_qk) / 128,
        shared=(read + written) / 128,
    )


def dq_clocks(x: DqConfig, terms: Sequence[str] = ()) -> Clocks:
    pairs = x.block_m * x.block_n
    read = 2 * (_by_rows(x.d_qk, x.block_n) + _by_rows(x.d_v, x.block_n) + _from_registers(x.block_n, x.d_qk))
    per_score = PER_GRADIENT + CAP_INSTRUCTIONS * _caps(x) + _per_term(terms)
    return Clocks(
        tensor=2 * pairs * (2 * x.d_qk + x.d_v) / 4096,
        exponential=pairs * (1 + CAP_EXPONENTIALS * _caps(x)) / 16,
        issue=per_score * pairs / 128,
        shared=(read + 2 * x.block_n * (x.d_qk + x.d_v)) / 128,
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel of a pass: its tiles and clocks, or with neither the bytes that it moves."""

    name: str
    bytes: float
    work: Work | None = None
    clocks: Clocks | None = None

    def seconds(self, share: Share | None, sharpness: float) -> float:
        computing = 0.0
        if share is not None and self.clocks is not None:
            computing = share.makespan * self.clocks.together(sharpness) / CLOCK
        return LAUNCH + max(computing, self.bytes / MEMORY)


def _rows(shape: Shape) -> tuple[int, int]:
    """Rows of queries and of keys, of all heads."""
    pairs = shape.pairs
    return shape.heads_q * sum(q for q, _ in pairs), shape.heads_kv * sum(kv for _, kv in pairs)


def forward_kernels(shape: Shape) -> list[Kernel]:
    """The kernels of a forward pass."""
    band = shape.left is not None or shape.right is not None
    config = select(forward_configs(), shape.d_qk, shape.d_v, band, shape.softcap, bool(shape.terms))
    rows, keys = _rows(shape)
    moved = 2.0 * (rows + keys) * (shape.d_qk + shape.d_v)
    work = Work("forward", shape, config.block_m, config.block_n)
    name = f"forward {config.block_m} x {config.block_n}"
    return [*_prepare(shape), Kernel(name, moved, work, forward_clocks(config, shape.terms))]


def _prepare(shape: Shape) -> list[Kernel]:
    """The kernel that copies K and V where a term may leave keys out."""
    is_needed = not {"segments", "mask", "bias"}.isdisjoint(shape.terms)
    return [Kernel("prepare", 4.0 * _rows(shape)[1] * (shape.d_qk + shape.d_v))] if is_needed else []


def backward_kernels(shape: Shape, deterministic: bool = False) -> list[Kernel]:
    """The kernels of a backward pass; without atomic additions if it has to be deterministic."""
    fused, problem, terms = None, (shape.d_qk, shape.d_v, shape.softcap), bool(shape.terms)
    if not deterministic:
        fused = select_dkdv(dkdv_configs(), *problem, fused=True, terms=terms)
    dkdv = fused or select_dkdv(dkdv_configs(), *problem, fused=False, terms=terms)
    assert dkdv is not None, "every head dim has a kernel of its own for dk and dv"
    rows, keys = _rows(shape)
    columns = shape.d_qk + shape.d_v
    kernels = [Kernel("preprocess", rows * (4.0 * shape.d_v + (4 * shape.d_qk if fused else 0))), *_prepare(shape)]
    name = f"dkdv{', fused' if fused else ''} {dkdv.block_m} x {dkdv.block_n}"
    band = AttentionSpec(1.0, left=shape.left, right=shape.right)
    group = shape.heads_q // shape.heads_kv
    sizes = (shape.s_q, shape.s_kv, shape.batch * shape.heads_kv, group)
    parts = shape.lengths is None and group > 1
    parts = parts and ends_earlier_with_parts(band, sizes, dkdv.block_m, dkdv.block_n, MULTIPROCESSORS)
    overhead = TILE_OVERHEAD + (STORED_PARTS if parts else 0)
    work = Work("dkdv", shape, dkdv.block_m, dkdv.block_n, overhead=overhead, parts=parts)
    kernels.append(Kernel(name, 2.0 * rows * columns + 4.0 * keys * columns, work, dkdv_clocks(dkdv, shape.terms)))
    if fused:
        kernels.append(Kernel("postprocess", 6.0 * rows * shape.d_qk))
    if parts:
        kernels.append(Kernel("sum of heads", (4.0 * group + 2.0) * keys * columns))
    if fused:
        return kernels
    dq = select_dq(dq_configs(), *problem, terms=terms)
    work = Work("dq", shape, dq.block_m, dq.block_n)
    moved = 2.0 * (rows + keys) * columns + 2.0 * rows * shape.d_qk
    if "bias gradient" in shape.terms:  # cleared, written and added up in fp32
        kernels.append(Kernel("dbias", 12.0 * shape.batch * shape.heads_q * shape.s_q * shape.s_kv))
    return [*kernels, Kernel(f"dq {dq.block_m} x {dq.block_n}", moved, work, dq_clocks(dq, shape.terms))]


@dataclass(frozen=True)
class Prediction:
    """Of a pass: seconds at the faster and at the slower end; and of its longest kernel name, limit and imbalance."""

    seconds: tuple[float, float]
    kernel: str
    limit: str
    imbalance: float


def predict(passes: Sequence[Sequence[Kernel]]) -> list[Prediction]:
    """The prediction for each pass, given as its kernels.

    Raises:
        BuildError: the schedulers cannot be compiled here.
    """
    works = list(dict.fromkeys(kernel.work for kernels in passes for kernel in kernels if kernel.work))
    share_of: dict[Work | None, Share] = dict(zip(works, shares(works), strict=True))

    def prediction(kernels: Sequence[Kernel]) -> Prediction:
        faster, slower = ([kernel.seconds(share_of.get(kernel.work), p) for kernel in kernels] for p in SHARPNESS)
        seconds, longest = max(zip(faster, kernels, strict=True), key=lambda one: one[0])
        computes = longest.clocks is not None and seconds > LAUNCH + longest.bytes / MEMORY
        limit = longest.clocks.limit if computes and longest.clocks else "memory"
        imbalance = share_of[longest.work].imbalance if longest.work else 1.0
        return Prediction((sum(faster), sum(slower)), longest.name, limit, imbalance)

    return [prediction(kernels) for kernels in passes]
