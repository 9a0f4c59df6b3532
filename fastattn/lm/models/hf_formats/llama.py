"""The formats of Llama and its kin: Qwen 2 and 3, Mistral, Phi-3, Gemma 2 and 3. A family is one call of ``_family``.

They share the names of Llama's tensors and settings; a family has the difference. Of Llama 3.1 the rotary scaling is
read, of the others none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastattn.errors import DataError
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Table, Tensors, is_tied, refuse
from fastattn.nn.rotary import RotaryScaling

Fields = dict[str, Any]  # of a TransformerConfig
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _read(fields: Json, tensors: Tensors) -> Fields:
    """The settings that the whole family has."""
    rope = _rope(fields)
    return {
        "vocab_size": fields["vocab_size"],
        "width": fields["hidden_size"],
        "layers": fields["num_hidden_layers"],
        "heads": fields["num_attention_heads"],
        "kv_heads": fields.get("num_key_value_heads"),
        "head_dim": fields.get("head_dim"),
        "mlp_width": fields["intermediate_size"],
        "max_length": fields["max_position_embeddings"],
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "rope_base": rope.get("rope_theta") or fields.get("rope_theta") or 10000.0,
        "rope_scaling": _scaling(rope, fields),
        "dropout": fields.get("attention_dropout", 0.0),
        "tie_embeddings": is_tied(
            tensors, "lm_head.weight", "model.embed_tokens.weight", fields.get("tie_word_embeddings", False)
        ),
    }


def _rope(fields: Json) -> Json:
    """The settings of the rotation; where the kinds of layers have their own, those of the layers without a window."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return rope.get(_GLOBAL) or rope


def _scaling(rope: Json, fields: Json) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise DataError(f"The rotary scaling is {kind!r} in config.json; fastattn has 'default' and 'llama3'.")
    refuse(rope, {"partial_rotary_factor": 1.0})
    if kind == "default":
        return None
    length = rope.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    return RotaryScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length)


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
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_llama(fields: Json) -> Fields:
    bias = fields.get("attention_bias", False)
    refuse(fields, {"hidden_act": "silu", "mlp_bias": bias})
    return {"bias": bias}


def _write_llama(config: TransformerConfig) -> Json:
    return {"attention_bias": config.bias, "mlp_bias": config.bias}


def _read_qwen(fields: Json) -> Fields:
    refuse(fields, {"hidden_act": "silu", "attention_bias": False})
    return _read_layers(fields, fields.get("use_sliding_window", False))


def _write_qwen(config: TransformerConfig) -> Json:
    has_window = config.window is not None
    return {"use_sliding_window": has_window, **_write_layers(config)}


def _read_mistral(fields: Json) -> Fields:
    refuse(fields, {"hidden_act": "silu"})
    window = fields.get("sliding_window")
    return {"window": None if window is None else window - 1}


def _write_mistral(config: TransformerConfig) -> Json:
    return {"sliding_window": None if config.window is None else config.window + 1}


def _read_gemma(fields: Json) -> Fields:
    refuse(fields, {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False})
    if fields.get("use_bidirectional_attention"):
        raise DataError("use_bidirectional_attention is set in config.json: fastattn has Gemma's decoders alone.")
    every = (fields.get("rope_parameters") or {}).get(_LOCAL) or {}
    found = {
        "norm": "rms-zero",
        "norm_place": "both",
        "activation": "geglu",
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": fields.get("query_pre_attn_scalar", 256) ** -0.5,
        "softcap": fields.get("attn_logit_softcapping"),
        "logit_softcap": fields.get("final_logit_softcapping"),
        "local_rope_base": every.get("rope_theta") or fields.get("rope_local_base_freq"),
        "qk_norm": fields["model_type"] == "gemma3_text",
    }
    return found | _read_layers(fields, True)


def _write_gemma(config: TransformerConfig) -> Json:
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": _square(1 / (config.attention_scale or config.head_shape.head_dim**-0.5)),
        "attn_logit_softcapping": config.softcap,
        "final_logit_softcapping": config.logit_softcap,
        **_write_layers(config),
    }
    if config.local_rope_base is not None:
        rope = {_GLOBAL: config.rope_base, _LOCAL: config.local_rope_base}
        found["rope_parameters"] = {name: {"rope_type": "default", "rope_theta": x} for name, x in rope.items()}
        found["rope_local_base_freq"] = config.local_rope_base  # of transformers before 5
    return found


def _square(number: float) -> float:
    """The square, as an integer where it is one but for rounding."""
    square = number * number
    return round(square) if abs(square - round(square)) < 1e-6 * square else square


def _read_layers(fields: Json, has_window: bool) -> Fields:
    """The window, and the layers without it."""
    window, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if not has_window or window is None:
        return {}
    kinds = fields.get("layer_types")
    if kinds is None:  # before transformers 5 a rule said it
        period = fields.get("sliding_window_pattern") or {"gemma2": 2, "gemma3_text": 6}.get(fields["model_type"], 0)
        first = fields.get("max_window_layers", 0)
        is_global = [(number + 1) % period == 0 if period else number < first for number in range(layers)]
    else:
        is_global = [kind == _GLOBAL for kind in kinds]
    unlimited = tuple(number for number, sees_all in enumerate(is_global) if sees_all)
    return {} if len(unlimited) == layers else {"window": window - 1, "global_layers": unlimited}


def _write_layers(config: TransformerConfig) -> Json:
    kinds = [
        _GLOBAL if config.window is None or number in config.global_layers else _LOCAL
        for number in range(config.layers)
    ]
    return {"layer_types": kinds, "sliding_window": None if config.window is None else config.window + 1}


_QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_BLOCK: Table = {
    "attention_norm": "input_layernorm",
    "attention.qkv": _QKV,
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.gate_proj mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_QK_NORM: Table = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
_GEMMA: Table = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def _family(
    model_type: str,
    name: str,
    read: Callable[[Json], Fields],
    write: Callable[[TransformerConfig], Json],
    names: Table | None = None,
    **fixed: Any,
) -> HFFormat:
    """The format of a family.

    Args:
        model_type: its name in ``config.json``.
        name: what the names of its classes begin with.
        read: our settings beside those of ``_read``.
        write: theirs beside those of ``_write``.
        names: of the tensors in a block that differ from Llama's.
        fixed: our settings that its models always have.
    """
    return HFFormat(
        model_type=model_type,
        kind="decoder",
        prefix="model.",
        architecture=f"{name}ForCausalLM",
        read=lambda fields, tensors: TransformerConfig(
            **(_read(fields, tensors) | fixed | read(fields | {"model_type": model_type}))
        ),
        write=lambda config: _write(config) | write(config),
        outside={"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
        blocks={"blocks": ("model.layers", _BLOCK | (names or {}))},
        unused=r"(.*rotary_emb\.inv_freq|lm_head\.weight)$",
    )


LLAMA = _family("llama", "Llama", _read_llama, _write_llama)
QWEN2 = _family("qwen2", "Qwen2", _read_qwen, _write_qwen, qkv_bias=True)
QWEN3 = _family("qwen3", "Qwen3", _read_qwen, _write_qwen, _QK_NORM, qk_norm=True)
MISTRAL = _family("mistral", "Mistral", _read_mistral, _write_mistral)
PHI3 = _family(
    "phi3", "Phi3", _read_mistral, _write_mistral,
    {"attention.qkv": "self_attn.qkv_proj", "mlp.up": "mlp.gate_up_proj"},
)  # fmt: skip
GEMMA2 = _family("gemma2", "Gemma2", _read_gemma, _write_gemma, _GEMMA)
GEMMA3 = _family("gemma3_text", "Gemma3", _read_gemma, _write_gemma, _GEMMA | _QK_NORM)
LLAMAS = (LLAMA, QWEN2, QWEN3, MISTRAL, PHI3, GEMMA2, GEMMA3)
