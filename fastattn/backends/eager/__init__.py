"""The reference formula as a backend: available everywhere, quadratic in memory, last in the order of preference."""

from __future__ import annotations

from fastattn import reference
from fastattn.backends.base import Backend, Capabilities
from fastattn.problem import CACHE_FEATURES, DERIVATIVE_FEATURES, FEATURES, STATISTICS_FEATURES


class EagerBackend(Backend):
    name = "eager"
    capabilities = Capabilities(
        features=frozenset(FEATURES + DERIVATIVE_FEATURES + STATISTICS_FEATURES + CACHE_FEATURES) - {"batch invariant"}
    )
    forward = staticmethod(reference.forward)
    backward = staticmethod(reference.backward)
    jvp = staticmethod(reference.jvp)
    backward_jvp = staticmethod(reference.backward_jvp)
    statistics = staticmethod(reference.statistics)
    statistics_backward = staticmethod(reference.statistics_backward)
    attend_to_cache = staticmethod(reference.attend_to_cache)


BACKEND = EagerBackend()
