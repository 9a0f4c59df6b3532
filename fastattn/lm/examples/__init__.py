"""The examples that come with fastattn: what ``fastattn example`` runs."""

from fastattn.lm.examples.shipped import EXAMPLES, Result, run_example

__all__ = ["EXAMPLES", "Result", "run_example"]
