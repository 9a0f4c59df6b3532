"""Differential attention: the difference of two attention maps, in one call of the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.errors import input_error
from fastattn.nn.attention import Window
from fastattn.nn.self_attention import Call, SelfAttention

EPS = 1e-5  # of the paper's code


class DifferentialAttention(SelfAttention):
    """Self-attention whose heads subtract a second attention map from the first, which cancels common noise.

        [q1; q2], [k1; k2], v = heads(x W_q^T), heads(x W_k^T), heads(x W_v^T)          D/2, D/2 and D wide
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
        head   = (softmax(q1 k1^T / sqrt(D/2)) - lambda softmax(q2 k2^T / sqrt(D/2))) v
        out    = concat((1 - lambda_init) RMSNorm(head)) W_o^T

    with ``lambda_init = 0.8 - 0.6 exp(-0.3 depth)``. Both maps come from one call: a head's two queries are padded
    with zeros to D, ``[q1; 0]`` and ``[0; q2]``, and read the key ``[k1; k2]`` and the value as grouped heads, so that
    keys and values are read once and a cache holds no value twice.

    Args:
        depth: number of the layer in its model, counted from 0.
        embed_dim: E, the width of the tokens.
        num_heads: H, pairs of maps; half as many as a transformer of this size has heads.
        num_kv_heads: H_kv, divides ``num_heads``; None is ``num_heads``.
        head_dim: D, even, the width of a value; None is ``E // H``.
        rope: turns the two halves of a query, each by itself.
        rotary_dim: dims of each half that are turned; None is all.
        qk_norm: RMSNorm over each half of the queries and keys.
        dropout: of each map by itself.
        bias, window and the others: as in ``SelfAttention``.

    Raises:
        InputError: an argument is out of range.

    Source:
        Ye et al., "Differential transformer", 2024. Grouped heads pair the first maps of query and key with each
        other, as the paper's FlashAttention code does.

    Example:
        >>> import torch
        >>> from fastattn.nn import DifferentialAttention
        >>> layer = DifferentialAttention(64, 4, depth=2, num_kv_heads=2, window=(None, 0), rope=True)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        depth: int = 0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        window: Window | None = None,
        softcap: float | None = None,
        rope: bool | float = False,
        rotary_dim: int | None = None,
        qk_norm: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, dropout=dropout,
            window=window, softcap=softcap, rope=rope, rotary_dim=rotary_dim, qk_norm=qk_norm, backend=backend,
            device=device, dtype=dtype,
        )  # fmt: skip
        if depth < 0:
            raise input_error("depth", depth, "an int >= 0", "The first layer has depth 0.")
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        drawn = torch.empty(4, self.scored_dim, device=device, dtype=dtype).normal_(std=0.1)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (nn.Parameter(x.clone()) for x in drawn)
        self.subln = nn.RMSNorm(self.head_dim, eps=EPS, device=device, dtype=dtype)

    @staticmethod
    def _scored_dim(head_dim: int) -> int:
        if head_dim % 2:
            raise input_error("head_dim", head_dim, "an even number", "Each of the two maps has one half.")
        return head_dim // 2

    def _combined(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        first, second = q.unflatten(2, (self.num_heads, 2)).unbind(3)
        half = self.scored_dim
        q = torch.stack((F.pad(first, (0, half)), F.pad(second, (half, 0))), dim=3).flatten(2, 3)
        k = k.unflatten(2, (self.num_kv_heads, 2)).flatten(3)
        first, second = self._attend(q, k, v, call).unflatten(2, (self.num_heads, 2)).unbind(3)
        return self.subln(first - self._lambda().to(first.dtype) * second) * (1 - self.lambda_init)

    def _lambda(self) -> Tensor:
        """The factor of the second map, at least in fp32."""
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        pairs = ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        first, second = ((a.to(dtype) * b.to(dtype)).sum().exp() for a, b in pairs)
        return first - second + self.lambda_init
