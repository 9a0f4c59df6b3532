"""NaN in one row of q, k or v: it reaches the rows that keep it, all of each, and leaves the others as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.testing.inputs import Sample
from fastattn.testing.tolerance import Results, Row, Yardstick
from fastattn.testing.ways import WAYS, Way, ways_of

SPOILED = {"NaN": "heads first", "NaN in a cache": "cache"}  # and the way of ``ways.WAYS`` in which it is called


def spoiled_ways_of(sample: Sample) -> list[str]:
    """The names in SPOILED that can express the problem: no dropout, which may drop every NaN of a row."""
    able, inputs = ways_of(sample), sample.inputs
    is_fit = sample.spec.dropout_p == 0 and min(inputs.q.shape[1], inputs.k.shape[1]) > 0
    return [name for name, way in SPOILED.items() if way in able and is_fit]


def measure_spoiled(name: str, sample: Sample, backend: str, *, yardstick: Yardstick | None = None) -> list[Row]:
    """Judge ``out`` with NaN in a row of q, of k and of v: in the rows that it does not reach, as without it.

    Raises:
        AssertionError: a row that it reaches is not NaN.
    """
    yardstick, rows = yardstick or Yardstick(sample), []
    for tensor in "qkv":
        found = _without_reached(tensor, sample, WAYS[SPOILED[name]], backend)
        rows += yardstick.judge(found, f", {name}, {tensor}")
    return rows


def _without_reached(tensor: str, sample: Sample, way: Way, backend: str) -> Results:
    """``out``, the exact result standing in the rows that the NaN reaches."""
    clean = getattr(sample.inputs, tensor)
    at = clean.shape[1] * 2 // 3
    dirty = clean.index_fill(1, torch.tensor([at], device=clean.device), float("nan"))
    reached = _reached(tensor, at, sample).transpose(1, 2)[..., None]
    given = Sample(sample.case, sample.inputs.replace(**{tensor: dirty}), sample.spec, sample.dout, sample.dlse)
    out = way(given, backend)["out"]
    assert bool(out.isnan()[reached.expand(out.shape)].all()), f"NaN in {tensor} does not reach all rows that keep it"
    exact, _, _ = reference.forward(sample.inputs, sample.spec)
    return {"out": torch.where(reached, exact, out)}


def _reached(tensor: str, at: int, sample: Sample) -> Tensor:
    """``(B, H_q, S_q)``: True where a row keeps position ``at`` of k or v, or is that of q and keeps a key."""
    inputs = sample.inputs
    kept = reference.keep_matrix(inputs, sample.spec, reference.Positions.of(inputs))
    full = (inputs.batch, inputs.heads_q, inputs.q.shape[1], inputs.k.shape[1])
    kept = kept.expand(full)
    if tensor != "q":
        return kept[..., at]
    rows = torch.arange(full[2], device=kept.device) == at
    return kept.any(-1) & rows
