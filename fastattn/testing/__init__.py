"""Test cases, their inputs and the tolerance rule, by which backends are judged; part of the package for its users."""

from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample, measure_cache
from fastattn.testing.cases import Case, grid
from fastattn.testing.inputs import Sample, make
from fastattn.testing.tolerance import Row, assert_within, measure, poisoned

__all__ = [
    "CacheCase",
    "Case",
    "Row",
    "Sample",
    "assert_within",
    "cache_grid",
    "grid",
    "make",
    "make_cache_sample",
    "measure",
    "measure_cache",
    "poisoned",
]
