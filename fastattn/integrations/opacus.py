"""Opacus: the gradient of each sample of ``MultiHeadAttention``, as differentially private training needs it.

Opacus hooks the modules that have parameters and derives ``nn.Linear`` and a few others by formulas of its own. The
projections of ``MultiHeadAttention`` are no module; ``prepare`` makes them one, so that nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.nn import MultiHeadAttention

try:
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler
    from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
except ImportError as error:
    raise ImportError("fastattn.integrations.opacus needs opacus: pip install opacus") from error

_OUTSIDE, _INSIDE = ("in_proj_weight", "in_proj_bias"), ("_in_projection.weight", "_in_projection.bias")


def prepare(model: nn.Module) -> list[str]:
    """Make every ``MultiHeadAttention`` inside ``model`` ready for Opacus, in place. Call it before ``make_private``.

    Results, the parameter objects and the keys of the state_dict stay the same. Use ``replace_attention`` first if a
    model has torch's attention. The layers of ``fastattn.nn`` that are built of ``nn.Linear`` need no preparation. In
    attention to other tokens than the queries, the queries and the keys are projected by all rows of
    ``in_proj_weight``, of which each uses a part.

    Args:
        model: any module.

    Returns:
        the names of the prepared layers, as in ``model.named_modules()``.

    Raises:
        InputError: a layer has ``add_bias_kv``, ``sinks``, ``kdim`` or ``vdim``, for whose parameters Opacus has no
            formula; or ``qk_norm`` without ``batch_first``.

    Source:
        Yousefpour et al., "Opacus: user-friendly differential privacy library in PyTorch", 2021.

    Example:
        >>> import torch, fastattn
        >>> from opacus import GradSampleModule
        >>> from fastattn.integrations.opacus import prepare
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> names = fastattn.replace_attention(model)
        >>> prepare(model)
        ['self_attn']
        >>> model = GradSampleModule(model)
        >>> model(torch.randn(4, 6, 16)).mean().backward()
        >>> model.self_attn.in_proj_weight.grad_sample.shape
        torch.Size([4, 48, 16])
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is MultiHeadAttention}
    for name, layer in layers.items():
        _refuse_options(name, layer)
    for layer in layers.values():
        register_grad_sampler(type(layer.out_proj))(compute_linear_grad_sample)
        register_norm_sampler(type(layer.out_proj))(compute_linear_norm_sample)
        _project_by_module(layer)
    return list(layers)


def _refuse_options(name: str, layer: MultiHeadAttention) -> None:
    given = [option for option in ("bias_k", "sinks") if getattr(layer, option) is not None]
    given += ["kdim or vdim"] if layer.in_proj_weight is None else []
    given += ["qk_norm without batch_first"] if layer.q_norm is not None and not layer.batch_first else []
    if given:
        todo = "Opacus needs the formula of each parameter; build the layer without these options."
        raise input_error("model", f"{name} with {', '.join(given)}", "a layer without them", todo)


def _project_by_module(layer: MultiHeadAttention) -> None:
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias
    del layer.in_proj_weight, layer.in_proj_bias
    layer.add_module("_in_projection", linear.train(layer.training))
    layer.__class__ = _Sampled
    layer.register_state_dict_post_hook(_name_as_before)
    layer.register_load_state_dict_pre_hook(_name_as_now)


class _Sampled(MultiHeadAttention):
    """``MultiHeadAttention`` whose projection is a module, which has the parameters."""

    _in_projection: nn.Linear

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        return self._in_projection.weight

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        return self._in_projection.bias

    def _in_proj(self, inputs: tuple[Tensor, ...], rows: tuple[int, ...]) -> list[Tensor]:
        projected = (self._in_projection(x) for x in inputs)
        return [x.split(rows, -1)[n] for n, x in enumerate(projected)]


def _name_as_before(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix, _INSIDE, _OUTSIDE)


def _name_as_now(layer: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    _rename(state, prefix, _OUTSIDE, _INSIDE)


def _rename(state: dict[str, Any], prefix: str, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    for old, new in zip(before, after, strict=True):
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
