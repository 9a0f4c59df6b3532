"""What a model is trained to do: losses, as sums over labels, of a model and a batch. No loop, no data reading."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.train.data import IGNORED, Batch


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each token's successor in nats, summed over the labels of the batch."""
    logits = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)  # [B, S, V]
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
