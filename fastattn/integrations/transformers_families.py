"""Properties of model families in transformers: use of its attention interface, and statements of causality.

transformers omits a mask if causality alone is meant. Its SDPA function then reads ``is_causal`` of the layer, and
assumes that a layer without it is causal. That is right for families whose layers all state ``is_causal`` and which
transformers itself allows to use SDPA, or FlashAttention for pure decoders, since SDPA lacks the sinks and caps of
some. Every other family gets complete masks, as with its own eager attention. The mask function and the attention
function both call ``may_leave_masks_out``, so that they agree.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from types import ModuleType
from typing import Any

import torch

from fastattn.errors import UnsupportedError

DECODER = r"self\.is_causal = (True|not getattr\(config\b)"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the registry through which modeling code calls attention


def may_leave_masks_out(config: Any) -> bool:
    """Whether the layers of this configuration, and of those inside it, all state whether they are causal."""
    # every layer asks: of most classes two values are all that may differ from one configuration to the next
    is_eager = not torch.compiler.is_compiling()
    states = _of_plain_classes.get(type(config)) if is_eager else None
    if states is not None:
        values = object.__getattribute__(config, "__dict__")
        if "sub_configs" not in values:
            says_otherwise = values.get("is_causal") is False or values.get("use_bidirectional_attention")
            return states and not says_otherwise
    # decoders turned into encoders, or with images that see all of themselves: layers and masks may disagree
    if _value(config, "is_causal", True) is False or _value(config, "use_bidirectional_attention", None):
        return False
    if is_eager and _is_plain(type(config)):
        _of_plain_classes[type(config)] = _says_what_is_causal(type(config))
    inner = [_value(config, name, None) for name in _value(config, "sub_configs", ())]
    return _says_what_is_causal(type(config)) and all(
        may_leave_masks_out(each) for each in inner if each is not None and not isinstance(each, dict)
    )


# Configuration classes without configurations inside them, and whether the layers of their models state causality.
_of_plain_classes: dict[type, bool] = {}


def _is_plain(config_class: Any) -> bool:
    """Whether a class has no default for what ``may_leave_masks_out`` reads, and its models are loaded for good."""
    has_defaults = any(_may_find(config_class, name) for name in ("is_causal", "use_bidirectional_attention"))
    return not (has_defaults or getattr(config_class, "sub_configs", None) or _modeling(config_class) is None)


def _value(config: Any, name: str, default: Any) -> Any:
    """``getattr`` of a configuration, past transformers' ``__getattribute__``, which takes long for every layer."""
    if not torch.compiler.is_compiling():
        values = object.__getattribute__(config, "__dict__")
        if name in values:
            return values[name]
        config_class: Any = type(config)
        if not _may_find(config_class, name):
            return default
    return getattr(config, name, default)


@functools.cache
def _may_find(config_class: type, name: str) -> bool:
    """Whether instances have an attribute that is not among their values."""
    renamed = getattr(config_class, "attribute_map", {})
    return name in renamed or hasattr(config_class, name) or hasattr(config_class, "__getattr__")


def refuse_outsiders(config: Any) -> None:
    """Raise UnsupportedError for families that compute attention themselves: they would add boolean masks to scores."""
    # each forward pass asks: the functions behind this take longer than a look into a set
    if (is_eager := not torch.compiler.is_compiling()) and type(config) in _insiders:
        return
    if not _uses_the_interface(type(config)):
        raise UnsupportedError(
            f"attn_implementation='fastattn': models of the family {getattr(config, 'model_type', '') or 'unknown'!r} "
            f"({type(config).__name__}) compute attention themselves, not through transformers' AttentionInterface, so "
            "fastattn cannot serve them. Use attn_implementation='eager'."
        )
    if is_eager and _modeling(type(config)) is not None:
        _insiders.add(type(config))


_insiders: set[type] = set()  # configuration classes whose models call attention through the interface


def refuse_tables(config: Any, name: str) -> None:
    """Raise UnsupportedError for families that look a layer class up by the name, in a table that lacks it."""
    modeling = _modeling(type(config))
    tables = (table for of, table in getattr(modeling, "__dict__", {}).items() if of.endswith("_ATTENTION_CLASSES"))
    lacking = next((table for table in tables if name not in table), None)
    if lacking is not None:
        ways = f"attn_implementation={' or '.join(map(repr, lacking))}"
        then = f", then model.set_attn_implementation({name!r}) for its other layers" * _calls_interface(modeling)
        raise UnsupportedError(
            f"attn_implementation={name!r}: models of the family {config.model_type!r} ({type(config).__name__}) "
            f"choose the class of an attention layer by this name, and have none for it. Use {ways}{then}."
        )


def expects_float_masks(config: Any) -> bool:
    """Whether a family was written for eager's floating masks: its layers may add them to scores, or extend them."""
    return not _served_by_sdpa(type(config))


@torch.compiler.assume_constant_result
def _served_by_sdpa(config_class: type) -> bool:
    return _all_support_sdpa(_modeling(config_class))


@torch.compiler.assume_constant_result
def _says_what_is_causal(config_class: type) -> bool:
    return _layers_say(_modeling(config_class))


@torch.compiler.assume_constant_result
def _uses_the_interface(config_class: type) -> bool:
    return _calls_interface(_modeling(config_class))


def _modeling(config_class: type) -> ModuleType | None:
    """The module that holds the models of a configuration; None if it is not loaded, as with code that has no file."""
    return sys.modules.get(config_class.__module__.replace(".configuration_", ".modeling_"))


@functools.cache
def _all_support_sdpa(modeling: ModuleType | None) -> bool:
    models = _models(modeling)
    return bool(models) and all(x._supports_sdpa for x in models)


@functools.cache
def _layers_say(modeling: ModuleType | None) -> bool:
    """Whether each attention layer of a module states ``is_causal``, and transformers relies on it for every model."""
    models = _models(modeling)
    layers = [x for x in _classes(modeling) if issubclass(x, torch.nn.Module) and INTERFACE in _source(x)]
    if not models or not all(_says(x, "is_causal") for x in layers):
        return False
    if all(x._supports_sdpa for x in models):
        return True
    return all(x._supports_flash_attn for x in models) and all(_says(x, DECODER) for x in layers)


def _models(modeling: ModuleType | None) -> list[Any]:
    return [x for x in _classes(modeling) if hasattr(x, "_supports_sdpa")]


def _says(layer: type, pattern: str) -> bool:
    return any(re.search(pattern, _source(base)) for base in layer.__mro__ if base.__module__ == layer.__module__)


@functools.cache
def _calls_interface(modeling: ModuleType | None) -> bool:
    """Whether a module calls the interface, by the rule of transformers for ``set_attn_implementation``."""
    text = _source(modeling)
    has_layers = re.search(r"^class \w*Attention\w*\(nn\.Module\):", text, re.MULTILINE)
    return not has_layers or f"{INTERFACE}.get_interface(" in text or f"{INTERFACE}[" in text


def _classes(modeling: ModuleType | None) -> list[type]:
    """The classes that a module defines."""
    name = getattr(modeling, "__name__", None)
    return [x for x in getattr(modeling, "__dict__", {}).values() if isinstance(x, type) and x.__module__ == name]


def _source(of: Any) -> str:
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""
