"""The format of T5Gemma: an encoder-decoder of Gemma 2's blocks, with cross-attention and norms of its own."""

from __future__ import annotations

import dataclasses

from fastattn.errors import DataError
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Table, Tensors, is_tied
from fastattn.lm.models.hf_formats.llama import GEMMA2

_SIDES = ("encoder", "decoder")


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    encoder, decoder = (GEMMA2.read(fields[side], tensors) for side in _SIDES)
    if dataclasses.replace(encoder, layers=decoder.layers, global_layers=decoder.global_layers) != decoder:
        raise DataError("The encoder and the decoder of config.json differ in more than their layers.")
    if encoder.softcap is not None or encoder.window is not None:
        raise DataError("config.json has a cap of the scores or a window, which fastattn lacks beside cross-attention.")
    said = fields.get("tie_word_embeddings", True)
    return dataclasses.replace(
        encoder,
        kind="encoder-decoder",
        decoder_layers=decoder.layers,
        dropout=fields.get("dropout_rate", 0.0),
        tie_embeddings=is_tied(tensors, "lm_head.out_proj.weight", "model.decoder.embed_tokens.weight", said),
    )


def _write(config: TransformerConfig) -> Json:
    layers = {"encoder": config.layers, "decoder": config.decoder_layers or config.layers}
    sides = {side: GEMMA2.write(dataclasses.replace(config, layers=layers[side])) for side in _SIDES}
    for fields in sides.values():
        fields["sliding_window"] = fields["sliding_window"] or 4096  # they want one where no layer has it, too
    return sides | {
        "vocab_size": config.vocab_size,
        "dropout_rate": config.dropout,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
    }


_SELF: Table = GEMMA2.blocks["blocks"][1] | {
    "attention_norm": "pre_self_attn_layernorm",
    "attention_out_norm": "post_self_attn_layernorm",
}
_CROSS: Table = {
    "cross_norm": "pre_cross_attn_layernorm",
    "cross_out_norm": "post_cross_attn_layernorm",
    "cross_attention.q": "cross_attn.q_proj",
    "cross_attention.kv": "cross_attn.k_proj cross_attn.v_proj",
    "cross_attention.out": "cross_attn.o_proj",
}
T5GEMMA = HFFormat(
    model_type="t5gemma",
    kind="encoder-decoder",
    prefix="",
    architecture="T5GemmaForConditionalGeneration",
    read=_read,
    write=_write,
    outside={
        "embedding": "model.decoder.embed_tokens",
        "encoder.norm": "model.encoder.norm",
        "decoder.norm": "model.decoder.norm",
        "head": "lm_head.out_proj",
    },
    blocks={
        "encoder.blocks": ("model.encoder.layers", _SELF),
        "decoder.blocks": ("model.decoder.layers", _SELF | _CROSS),
    },
    copies={"model.encoder.embed_tokens.weight": "model.decoder.embed_tokens.weight"},
    unused=r"lm_head\.out_proj\.weight$",
)
