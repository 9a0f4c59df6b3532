"""The kernel in e4m3 through Triton's interpreter, judged by the roundings that it may make."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import fastattn
from fastattn import testing
from fastattn.backends import load
from fastattn.backends.triton import launch_fp8
from fastattn.problem import FP8_FEATURES, Problem
from fastattn.testing.fp8 import measure_fp8

SIZES = {"B": 2, "S_q": 70, "S_kv": 133, "H_q": 4, "H_kv": 2}
CASES = (
    testing.Case("causal, D 64", right=0, D_qk=64, D_v=64, dtype=torch.bfloat16, **SIZES),
    testing.Case("window, head dims no power of two", left=20, right=5, D_qk=40, D_v=24, **SIZES),
    testing.Case("mask, softcap, sinks", softcap=3.0, sinks=True, mask="padding", D_qk=32, D_v=64, **SIZES),
    testing.Case("bias, ALiBi, segments", bias=(1, 4, 70, 133), alibi=True, segments=3, D_qk=16, D_v=16, **SIZES),
    testing.Case("two blocks of rows, D 128", right=0, D_qk=128, D_v=128, **{**SIZES, "B": 1, "S_q": 150, "H_q": 2}),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_against_the_formula(case):
    testing.assert_within(measure_fp8("triton", testing.make(case)))


def test_a_forgotten_scale_is_found(monkeypatch):
    """The judge sees a kernel that takes the scale of the wrong block of rows."""
    monkeypatch.setattr(launch_fp8, "BLOCK", 64)
    assert not all(row.ok for row in measure_fp8("triton", testing.make(CASES[-1])))


def test_a_value_that_no_row_keeps_may_be_nan():
    sample = testing.make(CASES[2])
    mask = torch.ones(1, 1, 70, 133, dtype=torch.bool)
    mask[..., 100:] = False
    q, k, v = (x.clone() for x in (sample.inputs.q, sample.inputs.k, sample.inputs.v))
    k[:, 100:], v[:, 100:] = float("nan"), float("inf")
    out = fastattn.attention_fp8(q, k, v, mask=mask, backend="triton")
    torch.testing.assert_close(out, fastattn.attention_fp8(q, k[:, :100], v[:, :100], backend="triton"))


def test_wide_heads_are_refused_with_a_reason():
    sample = testing.make(dataclasses.replace(CASES[0], D_qk=264, D_v=264))
    asked = Problem.of(sample.inputs, sample.spec, also=FP8_FEATURES)
    assert load("triton").unsupported_reasons(asked) == ["fp8 at head dim 264/264 (at most 256)"]
