"""Models of every form with weights that make their choices differ, in fp64 so that rounding decides nothing."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastattn.lm.models import Decoder, EncoderDecoder, TransformerConfig

BASE = TransformerConfig(vocab_size=258, width=32, layers=2, heads=4, kv_heads=2, max_length=40)
DECODERS = {
    "rotary": {},
    "window": {"window": 6, "softcap": 5.0, "sinks": True},
    "gemma": {
        "window": 5, "global_layers": (1,), "local_rope_base": 50.0, "norm": "rms-zero", "norm_place": "both",
        "logit_softcap": 9.0, "activation": "geglu", "embedding_scale": 5.0,
    },
    "gpt-2": {"positions": "learned", "norm": "layer", "activation": "gelu", "bias": True},
    "alibi": {"positions": "alibi", "window": 9},
    "relative": {"positions": "relative", "attention_scale": 1.0},
    "no positions": {"positions": "none", "qk_norm": True, "kv_heads": 1},
}  # fmt: skip
ENCODER_DECODERS = {
    "modern": {},
    "original": {"positions": "sinusoidal", "norm_place": "after", "norm": "layer", "activation": "relu", "bias": True},
    "t5": {"positions": "relative", "attention_scale": 1.0, "head_dim": 16, "activation": "relu"},
}


def make(kind, **fields):
    torch.manual_seed(3)
    config = dataclasses.replace(BASE, kind="decoder" if kind is Decoder else "encoder-decoder", **fields)
    model = kind(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if "embedding" in name else 0.3)
    return model


@pytest.fixture(scope="package", params=DECODERS)
def decoder(request):
    return make(Decoder, **DECODERS[request.param])


@pytest.fixture(scope="package", params=ENCODER_DECODERS)
def encoder_decoder(request):
    return make(EncoderDecoder, **ENCODER_DECODERS[request.param])


@pytest.fixture(scope="package")
def model():
    return make(Decoder, window=12)


@pytest.fixture(scope="package")
def tokenizer():
    """Every byte a token of its own, with the ids of fastattn's two marks before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|start|>": 0, "<|end|>": 1} | {character: 2 + n for n, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
