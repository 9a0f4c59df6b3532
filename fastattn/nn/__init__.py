"""Modules on top of ``fastattn.attention``."""

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.cache import KVCache
from fastattn.nn.differential import DifferentialAttention
from fastattn.nn.latent import LatentAttention
from fastattn.nn.paged import CacheStep, PagedKVCache, PagedLayer
from fastattn.nn.replace import replace_attention
from fastattn.nn.rotary import Rotary
from fastattn.nn.self_attention import GatedAttention, SelfAttention
from fastattn.trees import tree_mask

__all__ = [
    "CacheStep", "DifferentialAttention", "GatedAttention", "KVCache", "LatentAttention", "MultiHeadAttention",
    "PagedKVCache", "PagedLayer", "Rotary", "SelfAttention", "replace_attention", "tree_mask",
]  # fmt: skip
