"""The format of Llama, with and without tied embeddings, grouped heads and Llama 3.1's rotary scaling."""

from __future__ import annotations

from fastattn.errors import DataError
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Tensors, is_tied, refuse
from fastattn.nn.rotary import RotaryScaling


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    bias = fields.get("attention_bias", False)
    refuse(fields, {"hidden_act": "silu", "mlp_bias": bias})
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise DataError(f"The rotary scaling is {kind!r} in config.json; fastattn has 'default' and 'llama3'.")
    scaling = None
    if kind == "llama3":
        lengths = (rope.get("original_max_position_embeddings"), fields["max_position_embeddings"])
        scaling = RotaryScaling(
            rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], lengths[0] or lengths[1]
        )
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        kv_heads=fields.get("num_key_value_heads"),
        head_dim=fields.get("head_dim"),
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_base=rope.get("rope_theta") or fields.get("rope_theta") or 10000.0,
        rope_scaling=scaling,
        bias=bias,
        dropout=fields.get("attention_dropout", 0.0),
        tie_embeddings=is_tied(
            tensors, "lm_head.weight", "model.embed_tokens.weight", fields.get("tie_word_embeddings", False)
        ),
    )


def _write(config: TransformerConfig) -> Json:
    rope: Json = {"rope_type": "default", "rope_theta": config.rope_base}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor}
        rope |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
        rope |= {"original_max_position_embeddings": scaling.original_length}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_base,  # of transformers before 5, as is the next
        "rope_scaling": rope if scaling else None,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


LLAMA = HFFormat(
    model_type="llama",
    kind="decoder",
    prefix="model.",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    outside={"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    blocks={
        "blocks": (
            "model.layers",
            {
                "attention_norm": "input_layernorm",
                "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                "attention.out": "self_attn.o_proj",
                "mlp_norm": "post_attention_layernorm",
                "mlp.up": "mlp.gate_proj mlp.up_proj",
                "mlp.down": "mlp.down_proj",
            },
        )
    },
    unused=r"(.*rotary_emb\.inv_freq|lm_head\.weight)$",
)
