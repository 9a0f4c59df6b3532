"""Modules on top of ``fastattn.attention``."""

from fastattn.nn.cache import KVCache
from fastattn.nn.rotary import Rotary

__all__ = ["KVCache", "Rotary"]
