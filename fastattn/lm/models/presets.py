"""Named sizes of models: configs without the vocabulary, which comes from a tokenizer."""

from __future__ import annotations

from typing import Any

from fastattn.errors import input_error
from fastattn.lm.models.config import TransformerConfig

Fields = dict[str, Any]
_MODERN: Fields = {"qk_norm": True}  # Qwen3's
_MODERN_BERT: Fields = {
    "kind": "encoder", "norm": "layer", "first_norm": False, "activation": "geglu-exact", "embedding_norm": True,
    "head_transform": True,
}  # fmt: skip
_T5_GEMMA: Fields = {
    "kind": "encoder-decoder", "norm": "rms-zero", "norm_place": "both", "activation": "geglu",
}  # fmt: skip
_GPT2: Fields = {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True}
_BERT: Fields = {
    "kind": "encoder", "norm": "layer", "norm_place": "after", "norm_eps": 1e-12, "activation": "gelu-exact",
    "positions": "learned", "bias": True, "embedding_norm": True, "token_types": 2, "max_length": 512,
}  # fmt: skip
_ORIGINAL: Fields = {
    "kind": "encoder-decoder", "norm": "layer", "norm_place": "after", "activation": "relu", "bias": True,
    "positions": "sinusoidal",
}  # fmt: skip
_T5: Fields = {
    "kind": "encoder-decoder", "activation": "relu", "positions": "relative", "attention_scale": 1.0, "head_dim": 64,
    "max_length": 512,
}  # fmt: skip
_VIT: Fields = {
    "kind": "vision", "norm": "layer", "norm_eps": 1e-12, "activation": "gelu-exact", "positions": "learned",
    "bias": True,
}  # fmt: skip
_IMAGE_TEXT: Fields = {"kind": "image-text"} | _MODERN  # PaliGemma's, with Qwen3 for text


def _scaled(width: int) -> Fields:
    return {"embedding_scale": width**0.5}


PRESETS: dict[str, Fields] = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "max_length": 256} | _MODERN,
    "small": {"width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "max_length": 512} | _MODERN,
    "base": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 4, "max_length": 2048} | _MODERN,
    "large": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "max_length": 4096} | _MODERN,
    "gpt2-124m": {"width": 768, "layers": 12, "heads": 12} | _GPT2,
    "gpt2-350m": {"width": 1024, "layers": 24, "heads": 16} | _GPT2,
    "encoder-mini": {"width": 128, "layers": 2, "heads": 4, "max_length": 256} | _MODERN_BERT,
    "encoder-tiny": {"width": 128, "layers": 4, "heads": 4, "max_length": 256} | _MODERN_BERT,
    "encoder-small": {"width": 384, "layers": 6, "heads": 6, "max_length": 512} | _MODERN_BERT,
    "bert-tiny": {"width": 128, "layers": 2, "heads": 2} | _BERT,
    "bert-base": {"width": 768, "layers": 12, "heads": 12} | _BERT,
    "seq2seq-mini": {"width": 128, "layers": 2, "heads": 4, "max_length": 256} | _scaled(128) | _T5_GEMMA,
    "seq2seq-tiny": {"width": 128, "layers": 3, "heads": 4, "max_length": 256} | _scaled(128) | _T5_GEMMA,
    "seq2seq-small": {"width": 384, "layers": 6, "heads": 6, "max_length": 512} | _scaled(384) | _T5_GEMMA,
    "transformer-base": {"width": 512, "layers": 6, "heads": 8} | _scaled(512) | _ORIGINAL,
    "transformer-big": {"width": 1024, "layers": 6, "heads": 16} | _scaled(1024) | _ORIGINAL,
    "t5-small": {"width": 512, "layers": 6, "heads": 8, "logit_scale": 512**-0.5} | _T5,
    "t5-base": {"width": 768, "layers": 12, "heads": 12, "logit_scale": 768**-0.5} | _T5,
    "vit-mini": {"width": 128, "layers": 4, "heads": 4, "image_size": 32, "patch_size": 4} | _VIT,
    "vit-tiny": {"width": 192, "layers": 12, "heads": 3} | _VIT,
    "vit-base": {"width": 768, "layers": 12, "heads": 12} | _VIT,
    "image-text-mini": {"width": 128, "layers": 2, "vision_layers": 2, "heads": 4, "max_length": 256, "image_size": 32,
                        "patch_size": 8} | _IMAGE_TEXT,
    "image-text-tiny": {"width": 192, "layers": 4, "vision_layers": 4, "heads": 3, "max_length": 256, "image_size": 96,
                        "patch_size": 8} | _IMAGE_TEXT,
    "image-text-small": {"width": 384, "layers": 6, "vision_layers": 6, "heads": 6, "max_length": 512} | _IMAGE_TEXT,
}  # fmt: skip


def preset(name: str, vocab_size: int = 0) -> TransformerConfig:
    """A named size of model.

    Each is a model of transformers, so it can be exported. "tiny", "small", "base" and "large" are Qwen3's, with
    RMSNorm, SwiGLU, rotary positions, norms on queries and keys, and fewer key/value heads; "encoder" are ModernBERT's
    without windows, "seq2seq" T5Gemma's without caps and windows, "transformer" the original, which Marian has, and
    "image-text" PaliGemma's with a ViT and Qwen3. The others have the form of the paper that names them.

    Args:
        name: a key of ``PRESETS``. Change single fields with ``dataclasses.replace``.
        vocab_size: number of tokens of the tokenizer; 0 for images.

    Raises:
        InputError: there is no preset of this name.

    Example:
        >>> from fastattn.lm.models import preset
        >>> preset("gpt2-124m", vocab_size=50257).width
        768
    """
    if name not in PRESETS:
        raise input_error("preset", repr(name), ", ".join(PRESETS), "Choose one of them.")
    fields: Fields = {"vocab_size": vocab_size} | PRESETS[name]
    return TransformerConfig(**fields)
