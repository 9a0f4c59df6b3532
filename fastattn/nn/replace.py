"""``replace_attention``: put ``MultiHeadAttention`` where a model has ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from torch import nn

from fastattn.errors import input_error
from fastattn.nn.attention import MultiHeadAttention


def replace_attention(model: nn.Module, *, backend: str | None = None) -> list[str]:
    """Replace every ``torch.nn.MultiheadAttention`` inside ``model``, in place, by ``MultiHeadAttention``.

    The new modules take over the old ones' parameters, hooks and mode, the very same objects: optimizers, tied
    weights and hook handles stay valid, and the model's state_dict does not change. A module that stands in several
    places is replaced by one that stands in all of them. Subclasses of ``nn.MultiheadAttention`` are left alone, as
    they may compute something else. ``nn.TransformerEncoder`` is kept from its inference shortcut, which would not
    call the new modules. Call it before sharding or compiling the model.

    Args:
        model: any module.
        backend: for the new modules; a name from ``fastattn.backends()``, or None to choose for each call.

    Returns:
        the names of what was replaced, as ``model.named_modules()`` gives them.

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
    names = [name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention]
    new = {model.get_submodule(name): _converted(model.get_submodule(name), backend) for name in names}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, MultiHeadAttention) for m in module.modules()
        ):
            module.use_nested_tensor = False
    return names


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
    # With the new options off both kinds hold the same entries, but for the one that torch's shortcut reads.
    vars(new).update({name: x for name, x in vars(old).items() if name != "_qkv_same_embed_dim"})
    return new
