"""The format of GPT-2: Conv1D layers, whose matrices are transposed, and one matrix for queries, keys and values."""

from __future__ import annotations

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import (
    HFFormat,
    Json,
    Tensors,
    activation,
    activation_name,
    is_tied,
    refuse,
)


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    refuse(fields, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        width=fields["n_embd"],
        layers=fields["n_layer"],
        heads=fields["n_head"],
        mlp_width=fields.get("n_inner"),
        max_length=fields["n_positions"],
        norm="layer",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=activation(fields.get("activation_function", "gelu_new")),
        positions="learned",
        bias=True,
        dropout=fields.get("resid_pdrop", 0.1),
        attention_scale=None if fields.get("scale_attn_weights", True) else 1.0,
        tie_embeddings=is_tied(
            tensors, "lm_head.weight", "transformer.wte.weight", fields.get("tie_word_embeddings", True)
        ),
    )


def _write(config: TransformerConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation_name(config),
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tie_embeddings,
    } | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)


GPT2 = HFFormat(
    model_type="gpt2",
    kind="decoder",
    prefix="transformer.",
    architecture="GPT2LMHeadModel",
    read=_read,
    write=_write,
    outside={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    blocks={
        "blocks": (
            "transformer.h",
            {
                "attention_norm": "ln_1",
                "attention.qkv": "attn.c_attn",
                "attention.out": "attn.c_proj",
                "mlp_norm": "ln_2",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
            },
        )
    },
    transposed=True,
    unused=r"(transformer\.h\.\d+\.attn\.(masked_)?bias|lm_head\.weight)$",
)
