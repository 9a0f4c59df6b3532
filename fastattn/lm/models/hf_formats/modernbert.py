"""The format of ModernBERT: rotary positions, gated MLPs, and windows in two of three layers."""

from __future__ import annotations

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Table, Tensors, refuse

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_WINDOW = 128  # where the settings do not say it


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    off = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), False)
    refuse(fields, off | {"hidden_activation": "gelu", "classifier_activation": "gelu", "decoder_bias": True})
    layers, every = fields["num_hidden_layers"], fields.get("global_attn_every_n_layers", 3)
    kinds = fields.get("layer_types") or [_LOCAL if number % every else _GLOBAL for number in range(layers)]
    rope = fields.get("rope_parameters") or {}
    bases = [
        rope.get(kind, {}).get("rope_theta") or fields.get(name) or usual
        for kind, name, usual in ((_GLOBAL, "global_rope_theta", 160000.0), (_LOCAL, "local_rope_theta", 10000.0))
    ]
    unlimited = tuple(number for number, kind in enumerate(kinds) if kind == _GLOBAL)
    has_window = len(unlimited) < layers
    return TransformerConfig(
        kind="encoder",
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=layers,
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        norm="layer",
        norm_eps=fields.get("norm_eps", 1e-5),
        first_norm=False,
        activation="geglu-exact",
        embedding_norm=True,
        rope_base=bases[0],
        local_rope_base=bases[1],
        window=fields.get("local_attention", _WINDOW) // 2 if has_window else None,
        global_layers=unlimited if has_window else (),
        head_transform=True,
        dropout=fields.get("mlp_dropout", 0.0),
    )


def _write(config: TransformerConfig) -> Json:
    kinds = [
        _GLOBAL if config.window is None or number in config.global_layers else _LOCAL
        for number in range(config.layers)
    ]
    rope = {_GLOBAL: config.rope_base, _LOCAL: config.local_rope_base or config.rope_base}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "norm_eps": config.norm_eps,
        "layer_types": kinds,
        "local_attention": _WINDOW if config.window is None else 2 * config.window,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": base} for name, base in rope.items()},
        "global_rope_theta": rope[_GLOBAL],  # of transformers before 5, as is the next
        "local_rope_theta": rope[_LOCAL],
        "mlp_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "embedding_dropout": config.dropout,
        "tie_word_embeddings": True,
        **dict.fromkeys(("cls_token_id", "sep_token_id")),  # their defaults lie beyond a small vocabulary
    }


_HEAD: Table = {"transform.dense": "head.dense", "transform.norm": "head.norm", "output": "classifier"}
MODERNBERT = HFFormat(
    model_type="modernbert",
    kind="encoder",
    prefix="model.",
    architecture="ModernBertModel",
    read=_read,
    write=_write,
    outside={
        "embedding": "model.embeddings.tok_embeddings",
        "embedding_norm": "model.embeddings.norm",
        "norm": "model.final_norm",
    },
    blocks={
        "blocks": (
            "model.layers",
            {
                "attention_norm": "attn_norm",
                "attention.qkv": "attn.Wqkv",
                "attention.out": "attn.Wo",
                "mlp_norm": "mlp_norm",
                "mlp.up": "mlp.Wi",
                "mlp.down": "mlp.Wo",
            },
        )
    },
    heads={
        "MaskedLM": (
            "ModernBertForMaskedLM",
            {"transform": "head.dense", "norm": "head.norm", "bias": "decoder.bias"},
        ),
        "SequenceClassifier": ("ModernBertForSequenceClassification", _HEAD),
        "TokenClassifier": ("ModernBertForTokenClassification", _HEAD),
        "SpanExtractor": ("ModernBertForQuestionAnswering", _HEAD),
    },
    poolings={"first": "cls", "mean": "mean"},
    unused=r"decoder\.weight$",
)
