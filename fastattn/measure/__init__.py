"""Benchmarks measured: workloads, peers, timing, memory, and the check that precedes each number."""
