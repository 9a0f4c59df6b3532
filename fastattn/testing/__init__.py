"""What decides whether a backend is right: the cases, their inputs, and the tolerance rule. Shipped."""

from fastattn.testing.cases import Case, grid
from fastattn.testing.inputs import Sample, make
from fastattn.testing.tolerance import Row, assert_within, measure, poisoned

__all__ = ["Case", "Row", "Sample", "assert_within", "grid", "make", "measure", "poisoned"]
