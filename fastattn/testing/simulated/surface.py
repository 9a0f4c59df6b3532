"""The functions and classes of ``torch.cuda`` that a CPU build of torch lacks, over the simulated device."""

from __future__ import annotations

import time
import types
from typing import Any

import torch

from fastattn.testing.simulated.machine import DEVICES, Machine

Patch = tuple[object, str, object]
CUDA_VERSION = "13.0"
_CUDA = 1  # c10::DeviceType::CUDA


def patches(machine: Machine) -> list[Patch]:
    """``(owner, name, value)`` of every attribute that is replaced while the devices are present."""
    functions = {
        **_facts(machine), **_current(machine), **_streams(machine), **_memory(machine), **_waiting(machine),
    }  # fmt: skip
    found: list[Patch] = [(torch.cuda, name, value) for name, value in functions.items()]
    found += [(torch.cuda.graphs, name, functions[name]) for name in ("CUDAGraph", "is_current_stream_capturing")]
    found += [(torch.cuda.memory, name, value) for name, value in _memory(machine).items()]
    found += [(torch.cuda.random, name, functions[name]) for name in ("device_count", "current_device")]
    found += [(torch.cuda.streams, name, functions[name]) for name in ("Stream", "Event")]
    found += [(torch._C, "_host_emptyCache", lambda: None)]
    found += [(torch._C, "_cuda_getCurrentRawStream", lambda device: machine.library.sim_stream(device))]
    found += [(torch.UntypedStorage, "resize_", _resize)]
    found += [(torch._C, "_cuda_getDevice", lambda: machine.library.sim_device())]
    return [*found, (torch.version, "cuda", CUDA_VERSION), (torch.backends.cuda, "is_built", lambda: True)]


_resize_on_host = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return _resize_on_host(storage, size)
    if size:
        raise NotImplementedError("the simulated device makes no storage larger")
    torch.ops.fastattn_simulated.release(storage._cdata)
    return storage


def _facts(machine: Machine) -> dict[str, object]:
    properties = types.SimpleNamespace(
        name=machine.name, major=machine.capability[0], minor=machine.capability[1], warp_size=32,
        multi_processor_count=machine.multiprocessors, L2_cache_size=machine.l2_bytes,
        total_memory=machine.memory_bytes, shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
    )  # fmt: skip
    generators = tuple(torch.Generator(device=f"cuda:{i}") for i in range(DEVICES))
    for generator in generators:
        torch.ops.fastattn_simulated.use_generator(generator)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: DEVICES,
        "get_device_capability": lambda device=None: machine.capability,
        "get_device_name": lambda device=None: machine.name,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: [f"sm_{machine.capability[0]}{machine.capability[1]}"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "default_generators": generators,
    }


def _current(machine: Machine) -> dict[str, object]:
    library = machine.library

    def exchange(device: int) -> int:
        if device >= DEVICES:
            raise RuntimeError("CUDA error: invalid device ordinal")
        before: int = library.sim_exchange_device(device)
        if 0 <= device != before:
            for tell in machine.turned:
                tell(device)
        return before

    return {
        "current_device": lambda: library.sim_device(),  # torch hashes it, which a function of ctypes refuses
        "set_device": lambda device: exchange(_index(machine, device)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": lambda device: exchange(device),  # torch wants a function of its own
    }


def _index(machine: Machine, device: Any) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return machine.library.sim_device() if index is None else index


class Stream(torch.Stream):
    """``torch.cuda.Stream``."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: int) -> Stream:
        if known:
            return super().__new__(cls, **known)
        at = torch.cuda.current_device() if device is None else torch.device(device).index or 0
        return super().__new__(cls, device=f"cuda:{at}")

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


def Event(enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:
    """``torch.cuda.Event``; an instance of torch.Event, because torch measures time only between those."""
    return torch.Event(device="cuda", enable_timing=enable_timing)


def _streams(machine: Machine) -> dict[str, object]:
    library = machine.library

    def current(device: Any = None) -> Stream:
        at = _index(machine, device)
        return Stream(stream_id=library.sim_stream(at), device_index=at, device_type=_CUDA)

    class Graph:
        """``torch.cuda.CUDAGraph``."""

        def __init__(self, keep_graph: bool = False) -> None:
            self._graph: int | None = None

        def capture_begin(self, pool: object = None, **_: object) -> None:
            self._graph = library.sim_begin_capture()

        def capture_end(self) -> None:
            library.sim_end_capture()

        def replay(self) -> None:
            if self._graph is None:
                raise RuntimeError("called CUDAGraph::replay without a preceding successful capture")
            library.sim_replay(self._graph)

        def pool(self) -> tuple[int, int]:
            return 0, 0

        def reset(self) -> None:
            if self._graph is not None:
                library.sim_free_graph(self._graph)
            self._graph = None

        __del__ = reset

    return {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "current_stream": current,
        "default_stream": lambda device=None: Stream(
            stream_id=0, device_index=_index(machine, device), device_type=_CUDA
        ),
        "_set_stream_by_id": lambda stream_id, device_index, device_type: library.sim_set_stream(
            device_index, stream_id
        ),
        "is_current_stream_capturing": lambda: bool(library.sim_is_capturing()),
    }


def _memory(machine: Machine) -> dict[str, object]:
    library = machine.library

    def free(device: Any = None) -> tuple[int, int]:
        return machine.memory_bytes - library.sim_held(_index(machine, device)), machine.memory_bytes

    return {
        "memory_allocated": lambda device=None: library.sim_held(_index(machine, device)),
        "memory_reserved": lambda device=None: library.sim_held(_index(machine, device)),
        "max_memory_allocated": lambda device=None: library.sim_peak(_index(machine, device)),
        "reset_peak_memory_stats": lambda device=None: library.sim_reset_peak(_index(machine, device)),
        "mem_get_info": free,
        "empty_cache": lambda: None,
    }


def _waiting(machine: Machine) -> dict[str, object]:
    def set_mode(mode: int | str) -> None:
        machine.refuses_waits = mode in (2, "error")

    return {
        "synchronize": lambda device=None: machine.wait(),
        "set_sync_debug_mode": set_mode,
        "get_sync_debug_mode": lambda: 2 if machine.refuses_waits else 0,
        "_sleep": lambda cycles: time.sleep(0),
    }


def alias_on_host(x: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same memory, for the interpreter and the emulator."""
    return torch.ops.fastattn_simulated.alias_on_host(x)
