"""fastattn: fast attention for PyTorch, by several backends that implement one definition."""

import os
import sys

from fastattn.version import __version__

# ``fastattn --help`` needs the command line alone, and torch takes 1.5 s to import.
_HELP = {"-h", "--help", "--version"}
if os.path.basename(sys.argv[0] if sys.argv else "") != "fastattn" or _HELP.isdisjoint(sys.argv[1:]):
    from fastattn import intervals
    from fastattn.decoding import attention_with_kv_cache, explain_with_kv_cache
    from fastattn.dispatch import Explanation, backends, use_backend, use_batch_invariance
    from fastattn.errors import InputError, UnsupportedError
    from fastattn.flops import register_with_torch as _register_flops
    from fastattn.fp8 import attention_fp8
    from fastattn.functional import attention, attention_varlen, explain, explain_varlen, scaled_dot_product_attention
    from fastattn.inspection import attention_weights, plot_attention
    from fastattn.nn import MultiHeadAttention, replace_attention
    from fastattn.ops import SAC_SAVE_OPS
    from fastattn.quantized import Quantized, quantize

    _register_flops()

__all__ = [
    "SAC_SAVE_OPS",
    "Explanation",
    "InputError",
    "MultiHeadAttention",
    "Quantized",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_fp8",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "backends",
    "explain",
    "explain_varlen",
    "explain_with_kv_cache",
    "intervals",
    "plot_attention",
    "quantize",
    "replace_attention",
    "scaled_dot_product_attention",
    "use_backend",
    "use_batch_invariance",
]
