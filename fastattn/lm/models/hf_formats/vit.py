"""The format of ViT, alone and with the classification head."""

from __future__ import annotations

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Tensors, activation, activation_name, refuse


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    refuse(fields, {"qkv_bias": True, "pooler_act": "tanh", "pooler_output_size": fields["hidden_size"]})
    return TransformerConfig(
        kind="vision",
        vocab_size=0,
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        norm="layer",
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        activation=activation(fields.get("hidden_act", "gelu")),
        positions="learned",
        bias=True,
        dropout=fields.get("hidden_dropout_prob", 0.0),
        pooler="vit.pooler.dense.weight" in tensors,
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        channels=fields.get("num_channels", 3),
    )


def _write(config: TransformerConfig) -> Json:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "qkv_bias": config.bias,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
    }


VIT = HFFormat(
    model_type="vit",
    kind="vision",
    prefix="vit.",
    architecture="ViTModel",
    read=_read,
    write=_write,
    outside={
        "class_token": "vit.embeddings.cls_token",
        "position_embedding.weight": "vit.embeddings.position_embeddings",
        "patches": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "pooler": "vit.pooler.dense",
    },
    blocks={
        "blocks": (
            "vit.encoder.layer",
            {
                "attention_norm": "layernorm_before",
                "attention.qkv": "attention.attention.query attention.attention.key attention.attention.value",
                "attention.out": "attention.output.dense",
                "mlp_norm": "layernorm_after",
                "mlp.up": "intermediate.dense",
                "mlp.down": "output.dense",
            },
        )
    },
    heads={"SequenceClassifier": ("ViTForImageClassification", {"output": "classifier"})},
    shapes={
        "vit.embeddings.cls_token": lambda config: (1, 1, config.width),
        "vit.embeddings.position_embeddings": lambda config: (1, config.image_tokens, config.width),
        "vit.embeddings.patch_embeddings.projection.weight": lambda config: (
            config.width,
            config.channels,
            config.patch_size,
            config.patch_size,
        ),
    },
)
