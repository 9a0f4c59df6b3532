"""Measuring attention: workloads, peers, timing, memory, and the correctness check that precedes each number."""
