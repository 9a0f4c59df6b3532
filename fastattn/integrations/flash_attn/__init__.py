"""The functions of the flash-attn package (2.8) under their names: import them from here instead, or ``install()``.

Signatures and meanings are those of flash-attn, positions and defaults included: ``(B, S, H, D)`` or packed ``(T, H,
D)`` tensors, ``window_size`` in neighbours with -1 for unbounded, causal aligned lower right, ALiBi slopes without a
sign, ``softcap=0.0`` for none. Differences: any float dtype, head dim and device, and an empty row has lse ``-inf``
(``+inf`` in flash-attn 2).

``python -m fastattn.integrations.flash_attn script.py ...`` runs a script that imports ``flash_attn``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from fastattn.errors import UnsupportedError
from fastattn.integrations.flash_attn import bert_padding
from fastattn.integrations.flash_attn.interface import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from fastattn.integrations.flash_attn.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]

VERSION = "2.8.3"  # of flash-attn, whose signatures these are


def install() -> None:
    """Make ``import flash_attn`` find these functions, for the rest of the process; may be called again.

    It adds ``flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding``. Call it before any code
    imports them.

    Raises:
        UnsupportedError: flash-attn itself is installed.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import install
        >>> install()
        >>> from flash_attn import flash_attn_func
        >>> q = torch.randn(2, 16, 8, 64)
        >>> flash_attn_func(q, q, q, causal=True).shape
        torch.Size([2, 16, 8, 64])
    """
    present = sys.modules.get("flash_attn")
    if getattr(present, "installed_by_fastattn", False):
        return
    if present is not None or importlib.util.find_spec("flash_attn") is not None:
        raise UnsupportedError("flash-attn itself is installed: import from fastattn.integrations.flash_attn instead.")
    public = {name: globals()[name] for name in __all__ if name != "install"}
    top = _module("flash_attn", public | {"__version__": VERSION, "installed_by_fastattn": True, "__path__": []})
    padding = {name: x for name, x in vars(bert_padding).items() if not name.startswith("_")}
    for name, holds in (("flash_attn_interface", public), ("bert_padding", padding)):
        setattr(top, name, _module(f"flash_attn.{name}", holds))


def _module(name: str, holds: dict[str, object]) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package="__path__" in holds)
    vars(module).update(holds)
    sys.modules[name] = module
    return module
