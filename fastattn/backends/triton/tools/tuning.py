"""Choosing the configurations of the Triton backend by measurement, and writing them where the backend reads them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastattn.backends.triton import table
from fastattn.files import write_text
from fastattn.kv_cache import FP8, CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

Key = tuple[str, str, int, int]
Config = tuple[int, int, int, int]
Timer = Callable[[Callable[[], object]], float]
TABLE_FILE = Path(table.__file__)
KERNELS = tuple(sorted({kind for _, kind, _, _ in table.TABLE}))
HEAD_DIMS = (64, 128, 256, 512)
TOKENS, HEADS = 16384, 16


@dataclass(frozen=True)
class Measured:
    """One candidate for one row.

    Attributes:
        key: the row: ``(arch, kernel, bits, head dim)``.
        config: ``(BLOCK_M, BLOCK_N, num_warps, num_stages)``.
        seconds: its time; infinite if it does not run.
        failure: the reason why it does not run.
    """

    key: Key
    config: Config
    seconds: float
    failure: str | None = None


def arch_of(device: torch.device) -> str:
    """The name under which the table has, or will have, rows for the GPU ``device``."""
    import triton

    from fastattn.backends.triton import configs

    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    return configs.chip_name(target.backend, target.arch)


def row_of(key: Key) -> Config:
    """The configuration that the backend uses now for a row: that of the row, or of the one used in its place."""
    from fastattn.backends.triton import configs

    arch, kind, bits, head_dim = key
    kernel = kind.partition(" ")[0]
    return tuple(configs.config_for(arch, kernel, bits, head_dim, features_of(kind)))  # type: ignore[return-value]


def features_of(kind: str) -> frozenset[str]:
    """The features that a kind of row is measured with, besides the causal mask."""
    kernel, _, count = kind.partition(" ")
    heavy = ("softcap", "alibi") if kernel == "decode" else ("dropout", "mask", "softcap", "alibi")
    caches = {"paged": {"paged"}, "e4m3": {"paged", "e4m3", "softcap", "alibi"}}
    return frozenset(caches.get(count) or heavy[: {"": 0, "one": 1, "several": 2, "many": 4}[count]])


def candidates(kernel: str, bits: int, now: Config) -> list[Config]:
    """The configurations worth measuring, that of the table among them."""
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rows, columns = ((32, 64, 128), (64, 128)) if kernel.startswith("backward_dkdv") else ((64, 128), (32, 64, 128))
    if kernel.startswith("decode"):
        rows, columns = now[:1], (32, 64, 128)  # decoding is measured with one query row in each sequence
    elif bits == 32:
        rows, columns = (16, 32, 64), (32, 64)
    stages = (1,) if kernel == "backward_dbias" else (1, 2, 3, 4, 5)
    found = list(itertools.product(rows, columns, (4, 8), stages))
    return [now, *(config for config in found if config != now)]


def measured(key: Key, todo: Iterable[Config], timer: Timer, device: torch.device) -> Iterator[Measured]:
    """Time each of ``todo`` on a causal problem of 16k tokens with ``features_of`` its kind, and a bias for ``dbias``.

    Decoding is timed on caches of 16k positions for four sequences, paged except for the rows "decode"; prompts of
    rows "forward paged" on the same caches, with 4k rows in each sequence.
    """
    from fastattn.backends.triton import configs

    work = _work(key, device)
    for config in todo:
        try:
            yield Measured(key, config, timer(lambda config=config: work(configs.Config(*config))))  # type: ignore[misc]
        except Exception as error:  # a configuration that needs more than the GPU has is a failed result
            yield Measured(key, config, float("inf"), f"{type(error).__name__}: {error}".splitlines()[0][:120])


def fastest(results: Sequence[Measured], now: Config, least_gain: float = 0.02) -> Config:
    """The fastest configuration, or that of the table if none is faster by ``least_gain``, which exceeds noise."""
    best = min(results, key=lambda result: result.seconds)
    of_table = next((result.seconds for result in results if result.config == now), float("inf"))
    return best.config if best.seconds < of_table * (1 - least_gain) else now


def text_of(rows: dict[Key, Config]) -> str:
    """The source of ``table.py`` with these rows."""
    head = TABLE_FILE.read_text(encoding="utf-8").partition("TABLE:")[0]
    lines = "".join(f"    {str(key).replace(chr(39), chr(34))}: {config},\n" for key, config in sorted(rows.items()))
    return f"{head}TABLE: dict[tuple[str, str, int, int], tuple[int, int, int, int]] = {{\n{lines}}}\n"


def write(rows: dict[Key, Config], path: Path = TABLE_FILE) -> None:
    """Replace the table, whole or not at all."""
    write_text(path, text_of(rows))


def _work(key: Key, device: torch.device) -> Callable[[tuple[int, ...]], object]:
    """A function that runs the kernel of a row with a given configuration."""
    from fastattn.backends.triton import launch

    _, kind, bits, d = key
    kernel, features = kind.partition(" ")[0], features_of(kind)
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    if kernel == "decode" or "paged" in features:
        return _decoding(kernel, d, dtype, device, features)
    tokens, heads = (TOKENS, HEADS) if device.type == "cuda" else (32, 1)
    batch = 4 if device.type == "cuda" else 1
    q, k, v, dout = (torch.randn(batch, tokens // batch, heads, d, device=device, dtype=dtype) for _ in range(4))
    s = q.shape[1]
    bias = torch.randn(1, heads, s, s, device=device, dtype=dtype) if kernel == "backward_dbias" else None
    mask = torch.rand(1, 1, s, s, device=device) < 0.9 if "mask" in features else None
    rng_state = torch.tensor([1, 2], device=device) if "dropout" in features else None
    slopes = _slopes(heads, device, features)
    inputs = Inputs(
        q, k, v, bias=bias, mask=mask, alibi_slopes=slopes, rng_state=rng_state, max_seqlen_q=s, max_seqlen_kv=s
    )
    spec = AttentionSpec(d**-0.5, _softcap(features), right=0, dropout_p=0.0 if rng_state is None else 0.1)
    if kernel == "forward":
        return lambda config: launch.forward(inputs, spec, config)  # type: ignore[arg-type]
    out, lse, low = launch.forward(inputs, spec)
    return getattr(launch.Backward.of(dout, None, out, lse, low, inputs, spec), kernel.removeprefix("backward_"))


def _decoding(
    kernel: str, d: int, dtype: torch.dtype, device: torch.device, features: frozenset[str]
) -> Callable[[tuple[int, ...]], object]:
    from fastattn.backends.triton import launch_decode

    batch, page_size = 4, 16
    pages = (TOKENS if device.type == "cuda" else 32) // page_size
    shape = (batch * pages, page_size, 4, d)
    k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    if "e4m3" in features:
        k, v = k.to(FP8), v.to(FP8)
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    lengths = torch.full((batch,), pages * page_size, device=device, dtype=torch.int32)
    rows = 1 if kernel == "decode" else 16 * pages // batch
    q = torch.randn(batch, rows, HEADS, d, device=device, dtype=dtype)
    if not features:  # one page for each sequence
        k, v = (x.view(batch, pages * page_size, 4, d) for x in (k, v))
    slopes = _slopes(HEADS, device, features)
    inputs = CacheInputs(
        q, k, v, lengths, block_table=table if features else None, alibi_slopes=slopes, max_seqlen_q=rows
    )
    spec = AttentionSpec(d**-0.5, _softcap(features), right=0)
    if kernel == "forward":
        out, lse = torch.empty_like(q), torch.empty(inputs.lse_shape(), device=device)
        return lambda config: launch_decode.attend_as_prompt(inputs, spec, out, lse, config)  # type: ignore[arg-type]
    return lambda config: launch_decode.attend_to_cache(inputs, spec, config)  # type: ignore[arg-type]


def _slopes(heads: int, device: torch.device, features: frozenset[str]) -> torch.Tensor | None:
    return torch.rand(1, heads, device=device) if "alibi" in features else None


def _softcap(features: frozenset[str]) -> float | None:
    return 30.0 if "softcap" in features else None
