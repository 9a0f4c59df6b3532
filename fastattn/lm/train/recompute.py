"""Activation checkpointing that saves attention: memory for a second forward pass of everything else.

A block keeps its input and the output of attention; its norms and projections are computed again in the backward pass.
Attention is the part whose time grows with the square of the length, and whose output is no larger than the input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastattn
from fastattn.lm.train.parallel import blocks_of


def recompute_blocks(model: nn.Module) -> None:
    """Make every block of ``model`` discard its activations except those of attention; the names of weights stay.

    Source:
        Chen et al., "Training deep nets with sublinear memory cost", 2016; selective as in Korthikanti et al.,
        "Reducing activation recomputation in large transformer models", 2022.
    """
    for block in blocks_of(model):
        block.forward = functools.partial(_forgetful, block.forward)


def _forgetful(forward: Any, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)


def _policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in fastattn.SAC_SAVE_OPS else CheckpointPolicy.PREFER_RECOMPUTE
