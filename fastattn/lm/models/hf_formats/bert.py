"""The formats of BERT, RoBERTa and DistilBERT, with and without the heads that fastattn has."""

from __future__ import annotations

from typing import Any

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Table, Tensors, activation, activation_name, refuse

# What all of them have: the blocks of 2017, learned positions, a norm of the embeddings.
_SHARED: dict[str, Any] = {
    "kind": "encoder", "norm": "layer", "norm_place": "after", "positions": "learned", "embedding_norm": True,
    "bias": True,
}  # fmt: skip


def _read(fields: Json, tensors: Tensors, name: str = "bert", offset: int = 0) -> TransformerConfig:
    refuse(fields, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    poolers = (f"{name}.pooler.dense.weight", "classifier.dense.weight")  # RoBERTa's is a part of its classifier
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"] - offset,
        position_offset=offset,
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        activation=activation(fields.get("hidden_act", "gelu")),
        token_types=fields.get("type_vocab_size", 2),
        dropout=fields.get("hidden_dropout_prob", 0.1),
        pooler=any(pooler in tensors for pooler in poolers),
        **_SHARED,
    )


def _write(config: TransformerConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length + config.position_offset,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


def _read_roberta(fields: Json, tensors: Tensors) -> TransformerConfig:
    refuse(fields, {"hidden_act": "gelu"})
    return _read(fields, tensors, "roberta", fields.get("pad_token_id", 1) + 1)  # positions begin after the padding's


def _write_roberta(config: TransformerConfig) -> Json:
    return _write(config) | {"pad_token_id": config.position_offset - 1}


def _read_distilbert(fields: Json, tensors: Tensors) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        width=fields["dim"],
        layers=fields["n_layers"],
        heads=fields["n_heads"],
        mlp_width=fields["hidden_dim"],
        max_length=fields["max_position_embeddings"],
        norm_eps=1e-12,
        activation=activation(fields.get("activation", "gelu")),
        dropout=fields.get("dropout", 0.1),
        pooler="pre_classifier.weight" in tensors,
        pooler_activation="relu" if "pre_classifier.weight" in tensors else "tanh",
        **_SHARED,
    )


def _write_distilbert(config: TransformerConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "hidden_dim": config.hidden,
        "max_position_embeddings": config.max_length,
        "activation": activation_name(config),
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
    }


def _like_bert(model_type: str, name: str, classifier: Table, transform: Table, **more: Any) -> HFFormat:
    """A format with BERT's names of the backbone."""
    return HFFormat(
        model_type=model_type,
        kind="encoder",
        prefix=f"{model_type}.",
        architecture=f"{name}Model",
        outside={
            "embedding": f"{model_type}.embeddings.word_embeddings",
            "position_embedding": f"{model_type}.embeddings.position_embeddings",
            "type_embedding": f"{model_type}.embeddings.token_type_embeddings",
            "embedding_norm": f"{model_type}.embeddings.LayerNorm",
            "pooler": f"{model_type}.pooler.dense",
        },
        blocks={
            "blocks": (
                f"{model_type}.encoder.layer",
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
        heads=_heads(name, classifier, transform),
        pools=True,
        **more,
    )


def _heads(name: str, classifier: Table, transform: Table) -> dict[str, tuple[str, Table]]:
    return {
        "MaskedLM": (f"{name}ForMaskedLM", transform),
        "SequenceClassifier": (f"{name}ForSequenceClassification", classifier),
        "TokenClassifier": (f"{name}ForTokenClassification", {"output": "classifier"}),
        "SpanExtractor": (f"{name}ForQuestionAnswering", {"output": "qa_outputs"}),
    }


BERT = _like_bert(
    "bert", "Bert", {"output": "classifier"},
    {
        "transform": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    },
    read=_read,
    write=_write,
    also={"BertForPreTraining": "MaskedLM"},
    unused=r"(bert\.embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|cls\.seq_relationship\..*)$",
)  # fmt: skip
ROBERTA = _like_bert(
    "roberta", "Roberta", {"backbone.pooler": "classifier.dense", "output": "classifier.out_proj"},
    {"transform": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
    read=_read_roberta,
    write=_write_roberta,
    unused=r"(roberta\.embeddings\.position_ids|lm_head\.decoder\.(weight|bias)|roberta\.pooler\.dense\.(weight|bias))$",
)  # fmt: skip
DISTILBERT = HFFormat(
    model_type="distilbert",
    kind="encoder",
    prefix="distilbert.",
    architecture="DistilBertModel",
    read=_read_distilbert,
    write=_write_distilbert,
    outside={
        "embedding": "distilbert.embeddings.word_embeddings",
        "position_embedding": "distilbert.embeddings.position_embeddings",
        "embedding_norm": "distilbert.embeddings.LayerNorm",
    },
    blocks={
        "blocks": (
            "distilbert.transformer.layer",
            {
                "attention.qkv": "attention.q_lin attention.k_lin attention.v_lin",
                "attention.out": "attention.out_lin",
                "attention_norm": "sa_layer_norm",
                "mlp.up": "ffn.lin1",
                "mlp.down": "ffn.lin2",
                "mlp_norm": "output_layer_norm",
            },
        )
    },
    heads=_heads(
        "DistilBert", {"backbone.pooler": "pre_classifier", "output": "classifier"},
        {"transform": "vocab_transform", "norm": "vocab_layer_norm", "bias": "vocab_projector.bias"},
    ),
    pools=True,
    unused=r"vocab_projector\.weight$",
)  # fmt: skip
