"""Modules on top of ``fastattn.attention``."""

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.cache import KVCache
from fastattn.nn.paged import CacheStep, PagedKVCache, PagedLayer
from fastattn.nn.replace import replace_attention
from fastattn.nn.rotary import Rotary

__all__ = ["CacheStep", "KVCache", "MultiHeadAttention", "PagedKVCache", "PagedLayer", "Rotary", "replace_attention"]
