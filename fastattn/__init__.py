"""fastattn: fast attention, one definition of it, and a transformer that trains on it.

The public names stand in ``api.py``. They are loaded with torch: at once if it is imported already, else when it is or
when one of them is asked for. So ``fastattn --help`` need not wait for torch, and the operators are there whenever
torch is.
"""

import importlib
import threading
from typing import TYPE_CHECKING

from fastattn.imports import when_imported
from fastattn.version import __version__ as __version__

if TYPE_CHECKING:
    from fastattn.api import *  # noqa: F403

_loading = threading.local()


def _load() -> None:
    if getattr(_loading, "now", False):
        return  # the API imports torch, whose import asks for the API
    _loading.now = True
    try:
        api = importlib.import_module("fastattn.api")
    finally:
        _loading.now = False
    if hasattr(api, "__all__"):  # else another thread imports it, and waits for torch in this one: it goes on there
        globals().update({name: getattr(api, name) for name in api.__all__}, __all__=api.__all__)


def __getattr__(name: str) -> object:
    if not getattr(_loading, "now", False) and (name == "__all__" or not name.startswith("__")):
        _load()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    if "__all__" not in globals():
        _load()
    return sorted(globals())


when_imported("torch", _load)
