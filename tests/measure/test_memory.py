"""Peak memory includes what a call allocates, and excludes what was allocated before."""

import dataclasses

import numpy as np
import pytest
import torch

from fastattn.measure import memory
from fastattn.measure.workload import Workload

MEGABYTE = 1 << 20
needs_linux = pytest.mark.skipif(memory.cannot_measure_process() is not None, reason="needs Linux's clear_refs")


@needs_linux
def test_a_temporary_is_seen_though_it_is_gone_at_the_end():
    torch.ones(100 * MEGABYTE // 4)  # an earlier peak must not hide the next

    def call():
        return float(torch.ones(64 * MEGABYTE // 4).sum())

    peak, result = memory.process_peak(call)
    assert result == 64 * MEGABYTE // 4
    assert 60 * MEGABYTE < peak < 80 * MEGABYTE


@needs_linux
def test_memory_outside_torch_is_seen_too():
    peak, _ = memory.process_peak(lambda: np.ones(32 * MEGABYTE // 8).sum())
    assert 30 * MEGABYTE < peak < 48 * MEGABYTE


@needs_linux
def test_a_fresh_process_weighs_eager_at_its_score_matrices():
    w = Workload(s_q=1024, s_kv=1024, heads_q=4, heads_kv=4, d_qk=16, d_v=16, dtype="fp32", passes=(), memory=True)
    peaks = {(peak.peer, peak.pass_name): peak for peak in memory.in_fresh_process(w, ["eager", "sdpa"], ["forward"])}
    eager, sdpa = peaks["eager", "forward"], peaks["sdpa", "forward"]
    assert eager.verdict.ok and sdpa.verdict.ok
    assert w.score_bytes() <= eager.bytes <= 4 * w.score_bytes()
    assert sdpa.bytes < w.score_bytes()


def test_a_process_that_dies_leaves_what_it_had():
    w = Workload(s_q=8, s_kv=8, heads_q=1, heads_kv=1, d_qk=8, d_v=8, dtype="fp32")
    assert memory.in_fresh_process(w, ["no such peer"], ["forward"]) == []
    assert memory.in_fresh_process(dataclasses.replace(w, s_q=9), ["sdpa"], ["forward"], timeout_s=0.01) == []


def test_available_memory_is_plausible():
    assert 50 * MEGABYTE < memory.available_bytes() < 1 << 50
