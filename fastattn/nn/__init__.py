"""Modules on top of ``fastattn.attention``."""

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.cache import KVCache
from fastattn.nn.paged import CacheStep, PagedKVCache
from fastattn.nn.replace import replace_attention
from fastattn.nn.rotary import Rotary

__all__ = ["CacheStep", "KVCache", "MultiHeadAttention", "PagedKVCache", "Rotary", "replace_attention"]
