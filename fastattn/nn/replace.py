"""``replace_attention``: put ``MultiHeadAttention`` where a model has ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastattn.errors import input_error
from fastattn.nn.attention import MultiHeadAttention, keep_from_shortcut
from fastattn.nn.transformer import upgrade_layers


def replace_attention(model: nn.Module, *, backend: str | None = None) -> list[str]:
    """Replace every ``torch.nn.MultiheadAttention`` inside ``model``, in place, by ``MultiHeadAttention``.

    The new modules take over the old ones' parameters, parametrizations, hooks and mode, the very same objects:
    optimizers, tied weights and hook handles stay valid, and the model's state_dict does not change. A module that is
    used in several places is replaced by one module in all of them. Subclasses of ``nn.MultiheadAttention`` are left
    unchanged, as they may compute something else, and named in a warning. ``nn.TransformerEncoderLayer`` no longer
    takes its inference shortcut, which would not call the new modules. Call this before sharding or compiling the
    model.

    Args:
        model: any module.
        backend: for the new modules; a name from ``fastattn.backends()``, or None to choose for each call.

    Returns:
        the names of the replaced modules, as in ``model.named_modules()``.

    Raises:
        InputError: ``model`` is not a module, is itself the attention module, or there is no such backend.

    Example:
        >>> import torch, fastattn
        >>> model = torch.nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        >>> fastattn.replace_attention(model)
        ['encoder.layers.0.self_attn', 'decoder.layers.0.self_attn', 'decoder.layers.0.multihead_attn']
    """
    if not isinstance(model, nn.Module):
        raise input_error(
            "model", type(model).__name__, "a torch.nn.Module", "Pass the model that holds the attention."
        )
    if type(model) is nn.MultiheadAttention:
        todo = "Pass the module that holds it, or build a fastattn.MultiHeadAttention and load its state_dict."
        raise input_error("model", "a nn.MultiheadAttention itself", "a module that contains some", todo)
    names = [name for name, module in model.named_modules() if _is_replaceable(module)]
    new = {model.get_submodule(name): _converted(model.get_submodule(name), backend) for name in names}
    _warn_of_others([name for name, module in model.named_modules() if _is_other(module) and module not in new])
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
    upgrade_layers(model)
    return names


def _is_replaceable(module: nn.Module) -> bool:
    """Whether a module is torch's own attention, or has the class that torch makes of it for parametrizations."""
    kind = type(module)
    return kind is nn.MultiheadAttention or (is_parametrized(module) and kind.__bases__ == (nn.MultiheadAttention,))


def _is_other(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiHeadAttention)


def _warn_of_others(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"replace_attention left {', '.join(names)} alone: subclasses of nn.MultiheadAttention, which may compute "
            "something else",
            stacklevel=3,
        )


def _converted(old: nn.Module, backend: str | None) -> MultiHeadAttention:
    """``old`` as a ``MultiHeadAttention`` that shares its parameters, submodules and hooks."""
    assert isinstance(old, nn.MultiheadAttention)
    new = MultiHeadAttention(
        old.embed_dim,
        old.num_heads,
        old.dropout,
        bias=old.in_proj_bias is not None,
        add_bias_kv=old.bias_k is not None,
        add_zero_attn=old.add_zero_attn,
        kdim=old.kdim,
        vdim=old.vdim,
        batch_first=old.batch_first,
        device="meta",
        backend=backend,
    )
    vars(new).update(vars(old))  # without the new options both classes have the same attributes
    new._modules = dict(old._modules)
    keep_from_shortcut(new)
    if is_parametrized(old):  # torch implements parametrizations as properties of a class made for the module
        properties = {name: x for name, x in vars(type(old)).items() if name not in ("__dict__", "__weakref__")}
        new.__class__ = type(type(old).__name__, (MultiHeadAttention,), properties)
    return new
