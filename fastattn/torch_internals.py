"""Private functions of torch that tell how a call is watched or transformed, and what happens without each.

Seen in torch 2.11, 2.13 and 2.14. If a version lacks one of them, calls count as transformed or watched and take the
general path of ``autograd.py``, which takes longer and changes no result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch


def _always(*_: Any) -> bool:
    return True


def _found(module: Any, name: str) -> Callable[..., Any]:
    return getattr(module, name, _always)


# Whether vmap, grad, jvp or another transform of torch.func is active. Without it: always.
is_transformed = _found(torch._C, "_are_functorch_transforms_active")
# Whether torch.jit.trace records; how many TorchDispatchModes are on; whether autocast is on for any device. Without
# them: always.
is_traced = _found(torch._C, "_is_tracing")
_dispatch_modes = _found(torch._C, "_len_torch_dispatch_stack")
_is_autocast = _found(torch._C, "_is_any_autocast_enabled")
# torch.are_deterministic_algorithms_enabled, of which it is all. Without it: that function.
is_deterministic: Callable[[], bool] = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
_parse_key = getattr(torch._C, "_dispatch_key_parse", None)
_VMAP_MODE: Any = None if _parse_key is None else _parse_key("VmapMode")
_includes_key: Callable[[Any], bool] = _found(torch._C, "_dispatch_tls_is_dispatch_key_included")
_forward_mode: Any = torch.autograd.forward_ad
_profiler: Any = torch.autograd.profiler


# Device types that autocast knows. Asking torch.amp.is_autocast_available in a compiled call is refused in torch 2.11.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "maia", torch._C._get_privateuse1_backend_name())
_AUTOCAST_DEVICES = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a device type; None if it is off there, or does not know the device (meta)."""
    is_on = device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def has_dispatch_modes() -> bool:
    """Whether a TorchDispatchMode is on."""
    return bool(_dispatch_modes())


def is_in_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed. Without ``_current_level``: no, and jvp raises torch's error."""
    return getattr(_forward_mode, "_current_level", -1) >= 0


def is_batch_of_gradients() -> bool:
    """Whether a backward pass runs once for a batch of gradients, by ``is_grads_batched`` of ``torch.autograd.grad``.

    Then gradients have no memory of their own: torch runs it by its first vmap, which is no transform of torch.func.
    """
    return _includes_key(_VMAP_MODE)


def is_exported_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` records a program. Asking torch imports the exporter: only where it already is."""
    return "torch.onnx._internal.exporter._core" in sys.modules and torch.onnx.is_in_onnx_export()


def is_inside_another_jvp() -> bool:
    """Whether the transform that runs now, one of torch.func, is inside a jvp. Without these names: no."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    stack: Sequence[Any] = getattr(functorch, "get_interpreter_stack", tuple)() or ()
    return any(outer.key() == functorch.TransformType.Jvp for outer in stack[:-1])


def is_observed() -> bool:
    """Whether a profiler records or forward-mode derivatives are computed, which ``tensor_check`` does not see."""
    return bool(getattr(_profiler, "_is_profiler_enabled", True) or getattr(_forward_mode, "_current_level", -1) >= 0)


def is_watched() -> bool:
    """Whether a compiler, tracer, profiler, dispatch mode, autocast or transform is active."""
    return bool(
        torch.compiler.is_compiling()
        or is_transformed()
        or _dispatch_modes()
        or _is_autocast()
        or is_traced()
        or is_in_forward_mode()
        or getattr(_profiler, "_is_profiler_enabled", True)
    )


def _found_tensor_check() -> Callable[[Sequence[torch.Tensor]], Callable[..., bool]] | None:
    guards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    if guards is None:
        return None
    return lambda tensors: guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


# From tensors, a function that says in C++ whether others agree with them in type, shape, strides, dtype, device, need
# of a gradient and dispatch keys (of the thread's state, too: autocast, modes, transforms). Without it: None.
tensor_check = _found_tensor_check()


def current_raw_stream(device: torch.device) -> int:
    """The handle of the current stream of a CUDA device, without an object around it; 0 for host memory."""
    if device.type != "cuda":
        return 0
    handle = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if handle is None else handle(device.index)


def current_device() -> int:
    """The index of the current CUDA device of this thread, without asking whether CUDA is initialised."""
    index = getattr(torch._C, "_cuda_getDevice", None)
    return torch.cuda.current_device() if index is None else index()


# A context without __torch_function__ of subclasses, and tensors without memory that belong to a subclass: what a lazy
# tensor is made of. Both are in every supported version; without them importing fastattn.nn fails.
without_torch_function = torch._C.DisableTorchFunctionSubclass
make_wrapper: Callable[..., Any] = torch.Tensor._make_wrapper_subclass

# torch's flash kernel for CPUs. The forward is bound in C++, which takes 5 us less than torch.ops. In every supported
# version; without it importing the portable backend fails.
flash_on_cpu: Callable[..., Any] = torch._scaled_dot_product_flash_attention_for_cpu
flash_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def dispatch_keys(device: str) -> Any:
    """The key set with which a kernel of torch's is called as if for ``device``, for example "CUDA"."""
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))


def jagged_lengths(x: Any) -> tuple[int | None, int | None]:
    """Shortest and longest length of a jagged nested tensor, or None for those that it has not stored."""
    return getattr(x, "_maybe_min_seqlen", None), getattr(x, "_maybe_max_seqlen", None)


# torch's attention layer as one function, forward only. In every supported version; without it importing fastattn.nn
# fails.
multi_head_attention: Callable[..., Any] = torch._native_multi_head_attention

# Whether hooks are registered for all modules. Without it: always.
_has_global_hooks = _found(torch.nn.modules.module, "_has_any_global_hook")


def calls_only_forward(module: torch.nn.Module, kind: type) -> bool:
    """Whether calling ``module`` calls ``kind.forward`` and nothing else: no hook, no other forward."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or _has_global_hooks()
    )
