"""torch's transformer layers on ``MultiHeadAttention``: the same results without the calls that do nothing.

``replace_attention`` gives these classes to the layers whose attention it replaced. A layer whose submodules are
torch's own, without hooks, computes by their functions; any other calls its submodules, as torch's code does. In
inference an encoder drops padding once, runs all its layers on the tokens that are left, and pads the result with
zeros, under the conditions under which torch's encoder does so by nested tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from fastattn.nested import Unpadded
from fastattn.nn.attention import MultiHeadAttention, recorded_by_fx
from fastattn.torch_internals import autocast_dtype, calls_only_forward, is_in_forward_mode, is_traced, is_transformed

_FEED_FORWARD = {
    "linear1": nn.Linear, "dropout": nn.Dropout, "linear2": nn.Linear, "norm1": nn.LayerNorm, "norm2": nn.LayerNorm,
    "dropout1": nn.Dropout, "dropout2": nn.Dropout,
}  # fmt: skip
_ENCODER_PARTS: dict[str, type] = {"self_attn": MultiHeadAttention, **_FEED_FORWARD}
_DECODER_PARTS: dict[str, type] = {
    **_ENCODER_PARTS, "multihead_attn": MultiHeadAttention, "norm3": nn.LayerNorm, "dropout3": nn.Dropout
}  # fmt: skip
_WITH_WEIGHTS, _WEIGHTS = (nn.Linear, nn.LayerNorm), {"weight", "bias"}
_METHODS = {"_sa_block", "_mha_block", "_ff_block"}  # of torch's layers, which a user may have replaced

Attend = Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer``, with the same arguments and results."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch's."""
        if isinstance(src, Proxy):
            return recorded_by_fx(self, src, src_mask, src_key_padding_mask, is_causal)
        if not _is_eager(src) or not _has_plain_parts(self, _ENCODER_PARTS):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return _encode(self, src, _self_attention(self, src_key_padding_mask, src_mask, is_causal))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, with the same arguments and results."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        if isinstance(tgt, Proxy):
            return recorded_by_fx(self, tgt, memory, *masks)
        if not _is_eager(tgt) or not _has_plain_parts(self, _DECODER_PARTS):
            return super().forward(tgt, memory, *masks)
        attend = _self_attention(self, tgt_key_padding_mask, tgt_mask, tgt_is_causal)
        across, options = self.multihead_attn.forward, (memory_key_padding_mask, False, memory_mask, True)

        def attend_to_memory(x: Tensor) -> Tensor:
            return across(x, memory, memory, *options, memory_is_causal)[0]

        parts, x = self._modules, tgt
        if self.norm_first:
            x = x + _dropped(parts["dropout1"], attend(_normed(parts["norm1"], x)))
            x = x + _dropped(parts["dropout2"], attend_to_memory(_normed(parts["norm2"], x)))
            return x + _dropped(parts["dropout3"], _fed_forward(self, _normed(parts["norm3"], x)))
        x = _normed(parts["norm1"], x + _dropped(parts["dropout1"], attend(x)))
        x = _normed(parts["norm2"], x + _dropped(parts["dropout2"], attend_to_memory(x)))
        return _normed(parts["norm3"], x + _dropped(parts["dropout3"], _fed_forward(self, x)))


class TransformerEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder``, with the same arguments and results."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch's."""
        if isinstance(src, Proxy):
            return recorded_by_fx(self, src, mask, src_key_padding_mask, is_causal)
        layers = list(self.layers)
        if mask is not None or is_causal or not _is_eager(src) or not all(map(_is_plain_layer, layers)):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        tokens = self._tokens(src, src_key_padding_mask)
        if tokens is None:
            for layer in layers:
                src = _encode(layer, src, _self_attention(layer, src_key_padding_mask))
        else:
            src = tokens.values
            for layer in layers:
                src = _encode(layer, src, _packed_attention(layer, tokens))
            src = tokens.padded(src)
        return src if self.norm is None else self.norm(src)

    def _tokens(self, src: Tensor, padding: Tensor | None) -> Unpadded | None:
        """The tokens without padding, where torch drops it, too: in inference, if no token follows it."""
        if padding is None or padding.dtype != torch.bool or src.dim() != 3 or padding.shape != src.shape[:2]:
            return None
        drops = getattr(self, "use_nested_tensor", False) and torch.backends.mha.get_fastpath_enabled()
        if not drops or self.layers[0].training:
            return None
        if is_transformed() or is_traced() or is_in_forward_mode() or src.is_meta:
            return None
        is_tracked = torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters()))
        return None if is_tracked or autocast_dtype(src.device.type) is not None else Unpadded.of(src, padding)


def _is_eager(x: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or x.is_nested)


def _has_plain_parts(layer: nn.Module, parts: dict[str, type]) -> bool:
    """Whether calling the submodules of a layer does no more than their functions."""
    if _METHODS & vars(layer).keys():
        return False
    children = layer._modules
    for name, kind in parts.items():
        child = children[name]
        if child is None or not calls_only_forward(child, kind):
            return False
        if kind in _WITH_WEIGHTS and not child._parameters.keys() >= _WEIGHTS:
            return False  # sharding and pruning keep them elsewhere
    return True


def _is_plain_layer(layer: nn.Module) -> bool:
    return calls_only_forward(layer, TransformerEncoderLayer) and _has_plain_parts(layer, _ENCODER_PARTS)


def _self_attention(layer: Any, padding: Tensor | None, mask: Tensor | None = None, is_causal: bool = False) -> Attend:
    attend = layer.self_attn.forward
    return lambda x: attend(x, x, x, padding, False, mask, True, is_causal)[0]


def _packed_attention(layer: Any, tokens: Unpadded) -> Attend:
    module, boundaries = layer.self_attn, (tokens.offsets, tokens.offsets, tokens.longest, tokens.longest)
    positions = None if module.rotary is None else tokens.positions()
    return lambda x: module._of_packed(x, x, x, boundaries, positions)


def _encode(layer: Any, x: Tensor, attend: Attend) -> Tensor:
    """A layer of an encoder, with the functions of its submodules."""
    parts = layer._modules
    if layer.norm_first:
        x = x + _dropped(parts["dropout1"], attend(_normed(parts["norm1"], x)))
        return x + _dropped(parts["dropout2"], _fed_forward(layer, _normed(parts["norm2"], x)))
    x = _normed(parts["norm1"], x + _dropped(parts["dropout1"], attend(x)))
    return _normed(parts["norm2"], x + _dropped(parts["dropout2"], _fed_forward(layer, x)))


def _fed_forward(layer: Any, x: Tensor) -> Tensor:
    parts = layer._modules
    x = _projected(parts["linear1"], x)
    x = torch.relu_(x) if layer.activation is F.relu else layer.activation(x)
    return _projected(parts["linear2"], _dropped(parts["dropout"], x))


def _projected(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module._parameters["weight"], module._parameters["bias"])


def _normed(module: Any, x: Tensor) -> Tensor:
    own = module._parameters
    return torch.layer_norm(x, module.normalized_shape, own["weight"], own["bias"], module.eps)


def _dropped(module: Any, x: Tensor) -> Tensor:
    return F.dropout(x, module.p, True, module.inplace) if module.training and module.p else x


_CLASSES: dict[type, type] = {
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
}


def upgrade_layers(model: nn.Module) -> None:
    """Give torch's own transformer layers inside ``model`` the classes of this module, if their attention is ours."""
    for module in model.modules():
        ours = _CLASSES.get(type(module))
        if ours is not None and any(isinstance(child, MultiHeadAttention) for child in module.modules()):
            module.__class__ = ours
