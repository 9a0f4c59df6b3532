"""The format of BERT, with and without the heads that fastattn has."""

from __future__ import annotations

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Tensors, activation, activation_name, refuse


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    refuse(fields, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    return TransformerConfig(
        kind="encoder",
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        norm="layer",
        norm_place="after",
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        activation=activation(fields.get("hidden_act", "gelu")),
        positions="learned",
        embedding_norm=True,
        token_types=fields.get("type_vocab_size", 2),
        bias=True,
        dropout=fields.get("hidden_dropout_prob", 0.1),
        pooler="bert.pooler.dense.weight" in tensors,
    )


def _write(config: TransformerConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


BERT = HFFormat(
    model_type="bert",
    kind="encoder",
    prefix="bert.",
    architecture="BertModel",
    read=_read,
    write=_write,
    outside={
        "embedding": "bert.embeddings.word_embeddings",
        "position_embedding": "bert.embeddings.position_embeddings",
        "type_embedding": "bert.embeddings.token_type_embeddings",
        "embedding_norm": "bert.embeddings.LayerNorm",
        "pooler": "bert.pooler.dense",
    },
    blocks={
        "blocks": (
            "bert.encoder.layer",
            {
                "attention.qkv": "attention.self.query attention.self.key attention.self.value",
                "attention.out": "attention.output.dense",
                "attention_norm": "attention.output.LayerNorm",
                "mlp.up": "intermediate.dense",
                "mlp.down": "output.dense",
                "mlp_norm": "output.LayerNorm",
            },
        )
    },
    heads={
        "MaskedLM": (
            "BertForMaskedLM",
            {
                "transform": "cls.predictions.transform.dense",
                "norm": "cls.predictions.transform.LayerNorm",
                "bias": "cls.predictions.bias",
            },
        ),
        "SequenceClassifier": ("BertForSequenceClassification", {"output": "classifier"}),
        "TokenClassifier": ("BertForTokenClassification", {"output": "classifier"}),
        "SpanExtractor": ("BertForQuestionAnswering", {"output": "qa_outputs"}),
    },
    also={"BertForPreTraining": "MaskedLM"},
    pools=True,
    unused=r"(bert\.embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|cls\.seq_relationship\..*)$",
)
