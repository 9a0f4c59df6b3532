"""The format of Marian, the original Transformer: a norm after each part, sinusoidal positions, one table of tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.bart import BART, read_bart, write_bart
from fastattn.lm.models.hf_formats.hf_format import Json, Tensors, refuse


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    refuse(fields, {"decoder_vocab_size": fields["vocab_size"], "share_encoder_decoder_embeddings": True})
    config = read_bart(fields, tensors)
    return dataclasses.replace(config, positions="sinusoidal", position_offset=0, embedding_norm=False)


def _write(config: TransformerConfig) -> Json:
    return write_bart(config) | {"decoder_vocab_size": config.vocab_size, "share_encoder_decoder_embeddings": True}


def _channels(width: int) -> Tensor:
    """Their positions have all sines before all cosines, ours have them in pairs; the channels follow."""
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])


MARIAN = dataclasses.replace(
    BART,
    model_type="marian",
    architecture="MarianMTModel",
    read=_read,
    write=_write,
    outside={"embedding": "model.shared", "head": "lm_head"},
    channels=_channels,
    unused=r"(model\.(encoder|decoder)\.embed_(tokens|positions)\.weight|lm_head\.weight)$",
)
