"""The memory of a launch: the tensors that the struct of a pass points to, as csrc/common/params.h describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastattn.backends.cuda import abi
from fastattn.backends.cuda.instances import AnyConfig, DkdvConfig
from fastattn.backends.cuda.terms import SEGMENT_ROWS

Given = Mapping[str, int]
OF_INPUTS = {"q": ("q", "qk"), "k": ("kv", "qk"), "v": ("kv", "v"), "dout": ("q", "v")}  # rows and columns


def spans_of(struct: abi.Abi, given: Given, configs: Iterable[AnyConfig]) -> list[tuple[int, int]]:
    """The address and the bytes of each tensor of a pass with these kernels."""
    sizes = _of_cache(given) if struct is abi.DECODE else _of_pass(struct, given, configs)
    return [(given[name], size) for name, size in sizes.items() if given.get(name)]


def _of_pass(struct: abi.Abi, given: Given, configs: Iterable[AnyConfig]) -> dict[str, int]:
    batch = 1 if given["cu_seqlens_q"] else given["batch"]
    sizes = _results(given, batch) | _workspace(given, batch, configs) | _terms(given, batch)
    for name in struct.addresses:
        if (of := name.removeprefix("terms.given_")) in OF_INPUTS and name not in sizes:
            stride = f"{of}_{{}}_stride" if of == name else f"numbers.given_{of}_strides.{{}}"
            sizes[name] = _strided(given, of, batch, stride)
    return sizes


def _of_cache(given: Given) -> dict[str, int]:
    is_packed, sequences, pages = bool(given["cu_seqlens_q"]), given["batch"], given["pages"]
    batch, heads, heads_kv = 1 if is_packed else sequences, given["heads_q"], given["heads_kv"]
    rows, parts = batch * given["seqlen_q"], given["splits"] * batch * given["seqlen_q"] * heads
    by_row = is_packed and given["new_keys"] < 0
    new = (1, given["seqlen_q"]) if by_row else (sequences, max(given["new_keys"], 0) or given["seqlen_q"])
    trees = 1 if given["shares_tree"] and not is_packed else batch
    sizes = {
        "q": _strided(given, "q", batch, "q_{}_stride"), "out": 2 * rows * heads * given["head_dim_v"],
        "lse": 4 * rows * heads, "partial_out": 4 * parts * given["head_dim_v"], "partial_lse": 8 * parts,
        "sinks": 4 * heads * (sequences if given["sinks_batch_stride"] else 1), 
        "cache_lengths": 4 * sequences if given["cache_lengths"] else 0,
        "block_table": 4 * ((sequences - 1) * given["table_stride"] + -(-given["capacity"] // given["page_size"])),
        "cu_seqlens_q": 4 * (sequences + 1), "depths": 4 * rows,
        "tree": 4 * given["tree_words"] * trees * given["seqlen_q"],
    }  # fmt: skip
    for name, columns in (("k", given["head_dim_qk"]), ("v", given["head_dim_v"])):
        steps = [[given[f"{x}_{axis}_stride"] for axis in ("batch", "row", "head")] for x in (name, f"new_{name}")]
        width, cache = 1 if given["is_e4m3"] else 2, (pages, given["page_size"], heads_kv)
        sizes[f"{name}_cache"] = width * (columns + _last(cache, steps[0]))
        sizes[f"new_{name}"] = 2 * (columns + _last((*new, heads_kv), steps[1])) if all(new) else 0
        sizes[f"{name}_scale"] = 4 * heads_kv * (pages if given[f"{name}_scale_stride"] else 1)
    return sizes


def _strided(given: Given, name: str, batch: int, stride: str) -> int:
    side, columns = OF_INPUTS[name]
    extents = batch, given[f"seqlen_{side}"], given[f"heads_{side}"]
    steps = [given[stride.format(axis)] for axis in ("batch", "row", "head")]
    return 2 * (given[f"head_dim_{columns}"] + _last(extents, steps)) if all(extents) else 0


def _last(extents: Sequence[int], steps: Sequence[int]) -> int:
    """How far behind the first element the last one lies."""
    return sum((size - 1) * step for size, step in zip(extents, steps, strict=True))


def _results(given: Given, batch: int) -> dict[str, int]:
    rows_q, rows_kv = batch * given["seqlen_q"] * given["heads_q"], batch * given["seqlen_kv"] * given["heads_kv"]
    dim_qk, dim_v, bounds = given["head_dim_qk"], given["head_dim_v"], 4 * (given["batch"] + 1)
    heads = 4 * given["heads_q"]
    return {
        "out": 2 * rows_q * dim_v, "lse": 4 * rows_q, "lse_low": 4 * rows_q, "dlse": 4 * rows_q,
        "dq": 2 * rows_q * dim_qk, "dk": 2 * rows_kv * dim_qk, "dv": 2 * rows_kv * dim_v,
        "dbias": 4 * rows_q * given["seqlen_kv"], "dsinks": heads * given["batch"],
        "sinks": heads * (given["batch"] if given["sinks_batch_stride"] else 1),
        "cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "counter": 4,
    }  # fmt: skip


def _workspace(given: Given, batch: int, configs: Iterable[AnyConfig]) -> dict[str, int]:
    rows_q, rows_kv = (batch * given["heads_q"] * given.get(f"padded_{side}", 0) for side in ("q", "kv"))
    found = {"lse_parts": 8 * rows_q, "delta": 4 * rows_q, "dq_sums": 4 * rows_q * given.get("sum_columns", 0)}
    for config in configs:
        if isinstance(config, DkdvConfig):
            found |= {"dk_parts": 4 * rows_kv * config.d_qk, "dv_parts": 4 * rows_kv * config.d_v}
    return found


def _terms(given: Given, batch: int) -> dict[str, int]:
    heads, slopes = given["heads_q"], given["numbers.slopes_batch_stride"]
    found = {"terms.alibi_slopes": 4 * heads * (given["batch"] if slopes else 1), "terms.rng_state": 16}
    strides = [given[f"numbers.ids_{side}_batch_stride"] for side in ("q", "kv")]
    ranges = given["batch"] if any(strides) else 1
    for side, stride in zip(("q", "kv"), strides, strict=True):
        rows = given[f"seqlen_{side}"]
        found[f"terms.segment_ids_{side}"] = 8 * rows * (batch if stride else 1)
        found[f"terms.ranges_{side}"] = 16 * ranges * -(-rows // SEGMENT_ROWS)
    extents = (batch, heads, given["seqlen_q"], given["seqlen_kv"])
    for name, width in (("mask", 1), ("bias", 4 if given["numbers.bias_is_float"] else 2)):
        steps = [given[f"numbers.{name}_strides.{axis}"] for axis in ("batch", "head", "query", "key")]
        found[f"terms.{name}"] = width * (1 + _last(extents, steps))
    for name, columns in (("k", "qk"), ("v", "v")):
        if given[f"terms.given_{name}"]:  # then k and v are memory that the kernels fill
            found[name] = 2 * batch * given["seqlen_kv"] * given["heads_kv"] * given[f"head_dim_{columns}"]
    return found
