"""The format of T5, of version 1.0 (relu) and 1.1 (gated gelu)."""

from __future__ import annotations

from fastattn.errors import DataError
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Table, Tensors, is_tied


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    projection = fields.get("feed_forward_proj", "relu")
    if projection not in ("relu", "gated-gelu"):
        raise DataError(f"feed_forward_proj is {projection!r} in config.json; fastattn has 'relu' and 'gated-gelu'.")
    # Whether the output is scaled, T5's configs say by the word that others have for tied embeddings.
    said = fields.get("tie_word_embeddings", True) is not False
    scaled = fields.get("scale_decoder_outputs", said)
    return TransformerConfig(
        kind="encoder-decoder",
        vocab_size=fields["vocab_size"],
        width=fields["d_model"],
        layers=fields["num_layers"],
        decoder_layers=fields.get("num_decoder_layers"),
        heads=fields["num_heads"],
        head_dim=fields["d_kv"],
        mlp_width=fields["d_ff"],
        max_length=fields.get("n_positions", 512),
        norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        activation="relu" if projection == "relu" else "geglu",
        positions="relative",
        relative_buckets=fields.get("relative_attention_num_buckets", 32),
        relative_distance=fields.get("relative_attention_max_distance", 128),
        attention_scale=1.0,
        logit_scale=fields["d_model"] ** -0.5 if scaled else 1.0,
        dropout=fields.get("dropout_rate", 0.1),
        tie_embeddings="lm_head.weight" not in tensors or is_tied(tensors, "lm_head.weight", "shared.weight", said),
    )


def _write(config: TransformerConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "d_kv": config.head_dim,
        "d_ff": config.hidden,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": "relu" if config.activation == "relu" else "gated-gelu",
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.logit_scale != 1.0,
        "is_encoder_decoder": True,
    }


_SELF = {
    "attention_norm": "layer.0.layer_norm",
    "attention.qkv": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
    "attention.out": "layer.0.SelfAttention.o",
}
_CROSS = {
    "cross_norm": "layer.1.layer_norm",
    "cross_attention.q": "layer.1.EncDecAttention.q",
    "cross_attention.kv": "layer.1.EncDecAttention.k layer.1.EncDecAttention.v",
    "cross_attention.out": "layer.1.EncDecAttention.o",
}


def _mlp(layer: str) -> Table:
    return {
        "mlp_norm": f"{layer}.layer_norm",
        "mlp.up": f"{layer}.DenseReluDense.wi",
        "gated mlp.up": f"{layer}.DenseReluDense.wi_0 {layer}.DenseReluDense.wi_1",
        "mlp.down": f"{layer}.DenseReluDense.wo",
    }


T5 = HFFormat(
    model_type="t5",
    kind="encoder-decoder",
    prefix="",
    architecture="T5ForConditionalGeneration",
    read=_read,
    write=_write,
    outside={
        "embedding": "shared",
        "encoder.relative.embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "decoder.relative.embedding": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.norm": "encoder.final_layer_norm",
        "decoder.norm": "decoder.final_layer_norm",
        "head": "lm_head",
    },
    blocks={
        "encoder.blocks": ("encoder.block", _SELF | _mlp("layer.1")),
        "decoder.blocks": ("decoder.block", _SELF | _CROSS | _mlp("layer.2")),
    },
    unused=r"((encoder|decoder)\.embed_tokens\.weight|lm_head\.weight|.*EncDecAttention\.relative_attention_bias\.weight)$",
)
