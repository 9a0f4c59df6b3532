"""The exceptions of the package and the one way their messages are built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

# What torch, flash-attn, xformers and others call the arguments that have another name here.
NAMES_ELSEWHERE = {
    "is_causal": "causal=",
    "attn_mask": "mask= (True: attend) or bias= (added to the scores)",
    "attn_bias": "bias=",
    "key_padding_mask": "mask= (True: attend)",
    "score_mod": "bias=, softcap= or alibi_slopes=",
    "block_mask": "mask= or intervals=",
    "window_size": "window=",
    "sliding_window": "window=",
    "softmax_scale": "scale=",
    "logits_soft_cap": "softcap=",
    "s_aux": "sinks=",
    "dropout": "dropout_p=",
    "p": "dropout_p=",
    "return_attn_probs": "return_weights=",
    "need_weights": "return_weights=",
    "return_softmax_lse": "return_lse=",
    "cu_seqlens_k": "cu_seqlens_kv=",
    "max_seqlen_k": "max_seqlen_kv=",
    "cache_seqlens": "cache_lengths=",
    "page_table": "block_table=",
    "enable_gqa": "nothing in its place: fewer key/value heads are allowed",
}


class InputError(ValueError, RuntimeError):
    """An argument is wrong for every backend: its type, shape, device or value.

    It is both a ValueError and a RuntimeError, because torch raises either for such arguments.
    """


class UnsupportedError(NotImplementedError):
    """The input is valid, but the backend asked for (or every backend) lacks something it needs."""


class DataError(Exception):
    """A file or folder is missing, empty, damaged or not of the expected kind; the CLI exits with 2."""


def input_error(argument: str, given: object, allowed: str, todo: str) -> InputError:
    """An InputError that names the argument, what was given, what is allowed and what to do."""
    return InputError(f"{argument}: got {given}; allowed: {allowed}. {todo}")


def unsupported_error(asked: str, reasons: Mapping[str, Sequence[str]]) -> UnsupportedError:
    """An UnsupportedError that lists, for each backend asked, why it cannot serve the problem."""
    lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
    return UnsupportedError(
        f"{asked}\n" + "\n".join(lines) + "\nUse backend=None to let fastattn choose, or see fastattn.explain(...)."
    )


def name_error(function: Callable[..., object], given: Iterable[str]) -> TypeError:
    """A TypeError for the first name that is no argument of ``function``, with the argument that was meant."""
    has = [name for name, it in inspect.signature(function).parameters.items() if it.kind is not it.VAR_KEYWORD]
    name = next(iter(given))
    close = difflib.get_close_matches(name, has, 1)
    meant = NAMES_ELSEWHERE.get(name) or (f"{close[0]}=" if close else None)
    hint = f" Did you mean {meant}?" if meant else ""
    allowed = ", ".join(has)
    return TypeError(f"{function.__name__}() got an unexpected argument '{name}'.{hint} Allowed: {allowed}.")
