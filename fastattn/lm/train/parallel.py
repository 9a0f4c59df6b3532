"""Training of one model in several processes, which ``torchrun`` starts: ranks, sums, and the model's distribution.

"ddp" keeps the whole model in every process and adds up gradients (Li et al., "PyTorch distributed", 2020); "fsdp"
keeps a part of every weight, gradient and optimizer state in each and gathers a block's weights while it runs (Zhao et
al., "PyTorch FSDP", 2023). With one process, none of this does anything.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastattn.errors import UnsupportedError, input_error
from fastattn.files import replaced_file

Parallel = Literal["auto", "ddp", "fsdp"]
_TIMEOUT = datetime.timedelta(hours=1)  # the others wait while the first process tokenises
_STATE_BYTES = 16  # of a trained parameter: its weight, gradient and two moments in fp32
_FITS = 0.6  # part of a GPU's memory that those may take before activations
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, of which this is number ``rank``; the first one leads: it logs, shows and writes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the processes, on the device of ``values``."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def most(self, *numbers: float) -> list[float]:
        """The greatest that any process gives, of each number."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.most(0)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block, then the others: what it writes, they find."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


ALONE = Ranks()


def ranks() -> Ranks:
    """The processes of this run.

    Raises:
        InputError: ``torchrun`` started several, which have not joined and would overwrite each other's files.
    """
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        given = f"{os.environ['WORLD_SIZE']}, of processes that have not joined"
        raise input_error("WORLD_SIZE", given, "1", "Train inside 'with fastattn.lm.train.parallel.joined(device):'.")
    return ALONE


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes if ``torchrun`` started this one; the device that it is to use, of those of one kind.

    Once in a process; a block inside the block changes nothing.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def check_sharing(batch: int, way: Parallel, processes: Ranks, context: int = 1) -> None:
    """Raise InputError unless ``processes`` can share the rows of a batch and, with "fsdp", the weights.

    With ``context`` above 1 so many of them share each row.
    """
    if processes.size % context:
        todo = "Start a multiple of it with torchrun."
        raise input_error("context_parallel", context, f"a divisor of the {processes.size} processes", todo)
    groups = processes.size // context
    if batch % groups:
        allowed = f"a multiple of the {groups} {'processes' if context == 1 else f'groups of {context} processes'}"
        raise input_error("batch", batch, allowed, "Each takes as many rows as the others.")
    if processes.size == 1 and way == "fsdp":
        raise input_error("parallel", "'fsdp' with one process", "auto, ddp", "Start several with torchrun.")


def wrap_parallel(model: nn.Module, way: Parallel, processes: Ranks) -> nn.Module:
    """Distribute ``model`` over the processes, and return what computes the loss of training: it or a wrapper.

    Args:
        model: on its device, with the same weights in every process.
        way: "auto" is "fsdp" where weights, gradients and optimizer would take most of a GPU, else "ddp".
        processes: from ``ranks``; see ``check_sharing``.
    """
    if processes.size == 1:
        return model
    if way == "fsdp" or (way == "auto" and not _fits(model)):
        for block in blocks_of(model):
            fully_shard(block)
        fully_shard(model)
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _fits(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return True
    needed = _STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return needed <= _FITS * torch.cuda.get_device_properties(device).total_memory


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


@contextlib.contextmanager
def gradients_later(runner: nn.Module, later: bool) -> Iterator[None]:
    """Within the block, with ``later``, gradients are added up in each process and not yet over all."""
    with contextlib.ExitStack() as stack:
        if isinstance(runner, DistributedDataParallel):
            if later:
                stack.enter_context(runner.no_sync())
        elif isinstance(runner, FSDPModule):
            runner.set_requires_gradient_sync(not later)
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether the process holds parts of the weights only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value: Tensor) -> Tensor:
    """A tensor of which the processes hold parts, put together; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_parts(stem: Path, tensors: dict[str, Tensor], processes: Ranks) -> None:
    """Write ``stem.safetensors``: each process its parts, which the first one then puts together.

    Raises:
        UnsupportedError: a tensor has no dimension; torch would write 0 in its place.
    """
    scalars = [name for name, tensor in tensors.items() if not tensor.dim()]
    if scalars:
        raise UnsupportedError(f"{scalars[0]!r} has no dimension: such a tensor cannot be saved with --parallel fsdp.")
    writer = HuggingFaceStorageWriter(str(stem), save_distributed=True, enable_consolidation=True)
    dcp.save(tensors, storage_writer=writer)
    if processes.leads:
        (written,) = stem.glob("*.safetensors")
        with replaced_file(stem.with_name(f"{stem.name}.safetensors")) as temporary:
            written.rename(temporary)
        shutil.rmtree(stem)


def load_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors by name from the safetensors files in ``folder``: each process its parts."""
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
