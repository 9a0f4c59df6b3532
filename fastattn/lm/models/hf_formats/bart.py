"""The format of BART: the encoder-decoder of 2017 with learned positions and a norm of the embeddings."""

from __future__ import annotations

import torch

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import (
    HFFormat,
    Json,
    Table,
    Tensors,
    activation,
    activation_name,
    is_tied,
    refuse,
)

_OFFSET = 2  # the first rows of the tables of positions are those of padding


def read_bart(fields: Json, tensors: Tensors) -> TransformerConfig:
    refuse(fields, {"decoder_attention_heads": fields["encoder_attention_heads"]})
    refuse(fields, {"decoder_ffn_dim": fields["encoder_ffn_dim"]})
    return TransformerConfig(
        kind="encoder-decoder",
        vocab_size=fields["vocab_size"],
        width=fields["d_model"],
        layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"],
        heads=fields["encoder_attention_heads"],
        mlp_width=fields["encoder_ffn_dim"],
        max_length=fields["max_position_embeddings"],
        position_offset=_OFFSET,
        norm="layer",
        norm_place="after",
        norm_eps=1e-5,
        activation=activation(fields.get("activation_function", "gelu")),
        positions="learned",
        embedding_norm=True,
        embedding_scale=fields["d_model"] ** 0.5 if fields.get("scale_embedding", False) else 1.0,
        bias=True,
        dropout=fields.get("dropout", 0.1),
        tie_embeddings=is_tied(tensors, "lm_head.weight", "model.shared.weight", True),
    )


def write_bart(config: TransformerConfig) -> Json:
    both = {"attention_heads": config.heads, "ffn_dim": config.hidden}
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "decoder_layers": config.decoder_layers,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()},
        "max_position_embeddings": config.max_length,
        "activation_function": activation_name(config),
        "scale_embedding": config.embedding_scale != 1,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    }


_SELF: Table = {
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "mlp_norm": "final_layer_norm",
}
_CROSS: Table = {
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.kv": "encoder_attn.k_proj encoder_attn.v_proj",
    "cross_attention.out": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
}
BART = HFFormat(
    model_type="bart",
    kind="encoder-decoder",
    prefix="",
    architecture="BartForConditionalGeneration",
    read=read_bart,
    write=write_bart,
    outside={"embedding": "model.shared", "head": "lm_head"}
    | {
        f"{side}.{ours}": f"model.{side}.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in (("position_embedding", "embed_positions"), ("embedding_norm", "layernorm_embedding"))
    },
    blocks={
        "encoder.blocks": ("model.encoder.layers", _SELF),
        "decoder.blocks": ("model.decoder.layers", _SELF | _CROSS),
    },
    zeros={"final_logits_bias": lambda config: torch.zeros(1, config.vocab_size)},
    unused=r"(model\.(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight)$",
)
