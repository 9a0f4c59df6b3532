"""The grid of test cases for tests, ``fastattn verify`` and benchmarks. Each feature of the spec has rows here.

Lengths are at most 128, so that Triton's interpreter can run the grid too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastattn.problem import DIFFERENTIABLE
from fastattn.spec import Anchor

Mask = Literal["random", "empty rows", "all false", "padding"]
Intervals = Literal["random", "one", "blocks"]
Memory = Literal["contiguous", "BHSD", "sliced", "strided", "strided head dim", "expanded", "shared"]
Bias = Literal["normal", "padding", "offset", "infinity"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """A problem without its values, which ``inputs.make`` draws.

    Attributes:
        id: unique in the grid.
        group: its part of the grid.
        B, S_q, S_kv, H_q, H_kv, D_qk, D_v: sizes; see ``lengths`` for packed ones.
        dtype: of q, k and v.
        lengths: ``(s_q, s_kv)`` of each sequence of a packed batch; B, S_q and S_kv are then ignored. None: dense.
        scale, softcap, left, right, anchor, dropout_p: as in ``AttentionSpec``; scale None is ``D_qk ** -0.5``.
        bias: shape of the bias, broadcast where 1.
        mask: "random" ``(B, H_q, S_q, S_kv)``; "empty rows" ``(1, 1, S_q, S_kv)``, every third row keeps nothing;
            "all false"; "padding" ``(B, 1, 1, S_kv)``, the last keys of each batch entry are masked.
        alibi, sinks: whether there are slopes, sinks.
        per_sequence: slopes and sinks have a row for each batch entry (packed: each sequence).
        segments: number of documents in each row of the batch; 0 is no segments.
        intervals: ranges of each query row: "random" ``(B, H_q, S_q, 3, 2)``, which overlap, reach outside the keys, or
            are empty; "one" ``(1, 1, S_q, 1, 2)``; "blocks" ``(B, 1, S_q, 4, 2)``, blocks of 16 keys that 16 rows
            share, out of order. None: none.
        extras_dtype: dtype of bias and sinks; None is ``dtype``.
        memory: "contiguous"; "BHSD", a transposed view; "sliced", q, k and v cut from one fused buffer (needs equal
            lengths and head dims); "strided", every second row of a buffer whose rows are not aligned;
            "strided head dim", the last dimension has stride 2; "expanded", all heads are views of the first; "shared",
            v is k itself (needs equal head dims).
        bias_values: "normal"; "padding", the most negative number of the dtype at a third of the places; "offset", the
            same as normal on top of a large number that a row shares; "infinity", -inf at a third of the places.
        magnitude: factor on q and k.
        nan_rows: key and value rows that no query keeps hold NaN.
        dlse: lse has a gradient too.
        needs: gradients to compute; ``Sample.needs`` leaves out those of tensors that the case lacks.
    """

    id: str
    group: str = ""
    B: int = 2
    S_q: int = 37
    S_kv: int = 37
    H_q: int = 2
    H_kv: int = 2
    D_qk: int = 32
    D_v: int = 32
    dtype: torch.dtype = torch.float32
    lengths: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    anchor: Anchor = "lower_right"
    dropout_p: float = 0.0
    bias: tuple[int, int, int, int] | None = None
    mask: Mask | None = None
    alibi: bool = False
    sinks: bool = False
    per_sequence: bool = False
    segments: int = 0
    intervals: Intervals | None = None
    extras_dtype: torch.dtype | None = None
    memory: Memory = "contiguous"
    bias_values: Bias = "normal"
    magnitude: float = 1.0
    nan_rows: bool = False
    dlse: bool = False
    needs: tuple[str, ...] = DIFFERENTIABLE


def _sizes(s_q: int, s_kv: int, **more: Any) -> dict[str, Any]:
    return {"S_q": s_q, "S_kv": s_kv, **more}


def _dims(d_qk: int, d_v: int, **more: Any) -> dict[str, Any]:
    return {"D_qk": d_qk, "D_v": d_v, **more}


_CAUSAL: dict[str, Any] = {"right": 0}
_UPPER: dict[str, Any] = {"anchor": "upper_left"}
_GQA: dict[str, Any] = {"H_q": 4, "H_kv": 2}
_PACKED: dict[str, Any] = {"lengths": ((17, 17), (1, 1), (33, 33), (5, 5))}
_RAGGED: dict[str, Any] = {"lengths": ((7, 21), (0, 9), (34, 13), (5, 0), (0, 0), (1, 40))}

# Name -> what differs from the defaults of Case.
_TABLE: dict[str, dict[str, dict[str, Any]]] = {
    "shape": {
        "plain": {},
        "powers of two": _sizes(64, 64, D_qk=64, D_v=64),
        "longest": _sizes(128, 128),
        "one token": _sizes(1, 1),
        "one query": _sizes(1, 65),
        "one key": _sizes(65, 1),
        "more keys": _sizes(33, 97),
        "more queries": _sizes(97, 33),
        "past a tile": _sizes(65, 127),
        "no query": _sizes(0, 9),
        "no key": _sizes(9, 0, dlse=True),
        "no batch": {"B": 0},
        "lse gradient": {"dlse": True},
        "only dq": {"needs": ("q",)},
        "only dk and dv": {"needs": ("k", "v")},
    },
    "heads": {
        "gqa": _GQA,
        "gqa of three": {"H_q": 6, "H_kv": 2, **_CAUSAL},
        "mqa": {"H_q": 5, "H_kv": 1},
    },
    "head dim": {
        "D 8": _dims(8, 8),
        "D 16": _dims(16, 16),
        "D 40": _dims(40, 40, **_CAUSAL),
        "D 96": _dims(96, 96),
        "D 128": _dims(128, 128, **_CAUSAL),
        "D 192 and 128": _dims(192, 128, B=1),
        "D 256": _dims(256, 256, B=1, **_CAUSAL),
        "D 512": _dims(512, 512, B=1, **_CAUSAL),
        "D 512 and 1024": _dims(512, 1024, B=1, H_q=1, H_kv=1, S_q=9),
        "wider v": _dims(16, 64),
        "odd": _dims(33, 17),
    },
    "band": {
        "causal": _CAUSAL,
        "causal, more keys": _sizes(33, 97, **_CAUSAL),
        "causal, empty rows": _sizes(97, 33, dlse=True, **_CAUSAL),
        "causal, one query": _sizes(1, 65, **_CAUSAL),
        "causal, upper left, more keys": _sizes(33, 97, **_CAUSAL, **_UPPER),
        "causal, upper left, more queries": _sizes(97, 33, **_CAUSAL, **_UPPER),
        "window": _sizes(127, 127, left=20, right=9),
        "window, causal": _sizes(127, 127, left=16, right=0),
        "window, left": {"left": 5},
        "window, right": {"right": 7},
        "anticausal": {"left": 0},
        "diagonal": {"left": 0, "right": 0},
        "window, more keys": _sizes(20, 90, left=6, right=3),
        "window, empty rows": _sizes(90, 30, left=8, right=4, dlse=True),
        "window, upper left, unused keys": _sizes(20, 90, left=6, right=3, nan_rows=True, **_UPPER),
        "window, upper left, empty rows": _sizes(90, 30, left=4, right=2, **_UPPER),
        "wide window": {"left": 500, "right": 500},
    },
    "mask": {
        "mask": {"mask": "random"},
        "mask, empty rows": {"mask": "empty rows", "dlse": True},
        "mask, all false": {"mask": "all false", "dlse": True},
        "padding": {"mask": "padding", "nan_rows": True},
        "mask, gqa, causal": {"mask": "random", **_GQA, **_CAUSAL},
    },
    "bias": {
        "bias": {"bias": (2, 2, 37, 37)},
        "bias, shared by the batch": {"bias": (1, 2, 37, 37), **_CAUSAL},
        "bias, shared by the heads": {"bias": (2, 1, 37, 37)},
        "bias of keys": {"bias": (2, 1, 1, 37)},
        "bias of queries": {"bias": (1, 1, 37, 1), "sinks": True},
        "bias, ragged": _sizes(19, 50, bias=(1, 2, 19, 50), mask="empty rows"),
        "bias, fp32": {"bias": (1, 2, 37, 37), "sinks": True, "extras_dtype": torch.float32},
    },
    "alibi": {
        "alibi": {"alibi": True},
        "alibi, causal, more keys": _sizes(20, 50, alibi=True, **_CAUSAL),
        "alibi, per sequence": {"alibi": True, "per_sequence": True},
    },
    "sinks": {
        "sinks": {"sinks": True},
        "sinks, empty rows": _sizes(60, 20, sinks=True, dlse=True, **_CAUSAL),
        "sinks, per sequence": {"sinks": True, "per_sequence": True, **_GQA},
        "sinks, no key": _sizes(9, 0, sinks=True, dlse=True),
    },
    "segments": {
        "segments": {"segments": 3},
        "segments, causal": {"segments": 4, **_CAUSAL, **_GQA},
        "segments, ragged": _sizes(50, 23, segments=3, dlse=True),
    },
    "intervals": {
        "intervals": {"intervals": "random", "dlse": True},
        "one interval, causal": {"intervals": "one", **_GQA, **_CAUSAL},
        "intervals of blocks": _sizes(70, 128, intervals="blocks", B=1),
        "intervals, packed": {**_RAGGED, "intervals": "random", "left": 9, "dropout_p": 0.2},
    },
    "softcap": {
        "softcap": {"softcap": 2.0, "magnitude": 2.0},
        "softcap, causal": {"softcap": 30.0, **_CAUSAL, "dlse": True},
    },
    "dropout": {
        "dropout": {"dropout_p": 0.3},
        "dropout, gqa, causal": {"dropout_p": 0.1, **_GQA, **_CAUSAL, "dlse": True},
        "dropout of everything": {"dropout_p": 1.0},
    },
    "memory": {
        "BHSD": {"memory": "BHSD"},
        "sliced": {"memory": "sliced", **_GQA},
        "strided": {"memory": "strided", **_CAUSAL},
        "strided head dim": {"memory": "strided head dim"},
        "sliced, packed": {"memory": "sliced", **_PACKED, **_GQA},
    },
    "packed": {
        "packed": _PACKED,
        "packed, causal": {**_PACKED, **_CAUSAL, **_GQA},
        "packed, zero lengths": {**_RAGGED, "nan_rows": True, "dlse": True},
        "packed, zero lengths, causal": {**_RAGGED, **_CAUSAL},
        "packed, window": {**_RAGGED, "left": 6, "right": 2},
        "packed, alibi, sinks": {**_RAGGED, "alibi": True, "sinks": True, "per_sequence": True, "dlse": True},
        "packed, shared sinks": {**_PACKED, "sinks": True, "softcap": 5.0},
        "packed, dropout": {**_RAGGED, "dropout_p": 0.2, **_GQA},
        "packed, one sequence": {"lengths": ((40, 40),), "memory": "strided", **_CAUSAL},
        "packed, no token": {"lengths": ((0, 0), (0, 0))},
    },
    "values": {
        "large logits": {"magnitude": 8.0},
        "large logits, causal": {"magnitude": 8.0, "dlse": True, **_CAUSAL},
        "small logits": {"magnitude": 1e-3},
        "scale": {"scale": 0.5},
        "negative scale": {"scale": -0.3},
        "zero scale": {"scale": 0.0},
    },
    "together": {
        "softcap, window, sinks, gqa": {"softcap": 8.0, "left": 11, "right": 0, "sinks": True, **_GQA},
        "bias, mask, alibi, dropout": {"bias": (2, 1, 37, 37), "mask": "random", "alibi": True, "dropout_p": 0.2},
        "segments, window, bias": {"segments": 3, "left": 9, "right": 9, "bias": (1, 2, 37, 37)},
        "everything": _sizes(
            29, 45, H_q=4, H_kv=2, D_qk=24, D_v=40, softcap=6.0, left=20, right=8, dropout_p=0.15, bias=(2, 4, 29, 45),
            mask="random", alibi=True, sinks=True, segments=2, memory="strided", dlse=True,
        ),
        "intervals and the rest": _sizes(
            41, 67, **_GQA, intervals="random", softcap=6.0, left=40, bias=(1, 4, 41, 67), mask="random", alibi=True,
            sinks=True, dropout_p=0.15, dlse=True,
        ),
        "everything, packed": dict(
            **_RAGGED, H_q=4, H_kv=1, D_qk=40, D_v=24, softcap=6.0, left=9, right=4, dropout_p=0.15, alibi=True,
            sinks=True, per_sequence=True, memory="strided", dlse=True,
        ),
    },
}  # fmt: skip

# The cases that run in every dtype, and those of the quick grid.
_EVERY_DTYPE = (
    "plain", "one token", "one query", "causal, empty rows", "gqa of three", "D 128", "D 192 and 128", "odd", "window",
    "mask, empty rows", "padding", "bias, shared by the batch", "bias, fp32", "alibi", "sinks", "segments",
    "intervals", "intervals of blocks", "softcap", "dropout", "sliced", "packed, zero lengths", "large logits",
    "everything", "everything, packed",
)  # fmt: skip
_QUICK = (
    "plain", "causal, empty rows", "gqa of three", "D 192 and 128", "window", "padding", "dropout", "sliced",
    "packed, zero lengths", "everything", "everything, packed",
)  # fmt: skip


def grid(dtypes: Sequence[torch.dtype] | None = None, quick: bool = False) -> list[Case]:
    """The grid: every case in fp32, and a selection in the other dtypes.

    Args:
        dtypes: None is fp32, fp16, bf16 and fp64.
        quick: about a dozen cases for each dtype.
    """
    cases = []
    for dtype in DTYPES if dtypes is None else dtypes:
        for group, rows in _TABLE.items():
            for name, changes in rows.items():
                is_walked = name in _QUICK if quick else dtype == torch.float32 or name in _EVERY_DTYPE
                if is_walked:
                    cases.append(_case(name, group, dtype, changes))
    return cases


def _case(name: str, group: str, dtype: torch.dtype, changes: dict[str, Any]) -> Case:
    short = str(dtype).removeprefix("torch.")
    return Case(id=f"{name} [{short}]", group=group, dtype=dtype, **changes)
