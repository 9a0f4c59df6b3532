"""The reference formula as a backend: always right, always available, quadratic in memory. The last resort."""

from __future__ import annotations

from fastattn import reference
from fastattn.backends.base import Backend, Capabilities


class EagerBackend(Backend):
    name = "eager"
    capabilities = Capabilities()
    forward = staticmethod(reference.forward)
    backward = staticmethod(reference.backward)


BACKEND = EagerBackend()
