"""What a transformer is made of: one frozen dataclass, its checks and its presets. No tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastattn.errors import input_error

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu"]
Positions = Literal["rope", "learned"]
AttentionKind = Literal["fastattn", "eager"]


class HeadShape(NamedTuple):
    """The sizes of one attention layer: H_q, H_kv, D."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder language model.

    Attributes:
        vocab_size: number of tokens.
        width: C, the size of the residual stream.
        layers: number of blocks.
        heads: H_q.
        kv_heads: H_kv, a divisor of ``heads``; None is ``heads``. See ``head_shape``.
        head_dim: D; None is ``width // heads``. See ``head_shape``.
        mlp_width: hidden size of the MLP; None is ``4 * width``, or two thirds of it for SwiGLU, which has three
            matrices, rounded up to a multiple of 32. See ``hidden``.
        max_length: most tokens in a row, in training and in generation.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm), before each half of a block.
        activation: "swiglu" or "gelu".
        positions: "rope" (rotary) or "learned" (a table added to the embedding).
        rope_base: of "rope": the longest wavelength is ``2 pi * rope_base``.
        window: keys that a token sees before itself; None is all of them.
        softcap: ``softcap * tanh(scores / softcap)``; None is off.
        sinks: one learned logit per head that takes part in the softmax and has no value.
        qk_norm: normalise queries and keys of each head (with ``norm``) before the rotation.
        bias: biases in the linear layers.
        tie_embeddings: use the embedding as the output layer too.
        dropout: probability of dropping attention weights and the outputs of each half block, in training.
        attention: "fastattn" lets fastattn choose its backend; "eager" is the plain formula, for comparison.

    Raises:
        InputError: a value is out of range or two of them do not fit.

    Example:
        >>> from fastattn.models import TransformerConfig
        >>> TransformerConfig(vocab_size=1000, width=256, layers=4, heads=8, kv_heads=2).head_shape
        HeadShape(heads=8, kv_heads=2, head_dim=32)
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    max_length: int = 1024
    norm: Norm = "rms"
    activation: Activation = "swiglu"
    positions: Positions = "rope"
    rope_base: float = 10000.0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: bool = False
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    attention: AttentionKind = "fastattn"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "max_length"):
            _positive_int(name, getattr(self, name))
        for name in ("kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name))
        kinds = {"norm": Norm, "activation": Activation, "positions": Positions, "attention": AttentionKind}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                names = " or ".join(repr(x) for x in get_args(kind))
                raise input_error(name, repr(getattr(self, name)), names, "Choose one of them.")
        self._check_heads()
        self._check_numbers()

    def _check_heads(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            todo = "Choose heads that divide width, or give head_dim."
            raise input_error("heads", self.heads, f"a divisor of width {self.width}", todo)
        heads, kv_heads, head_dim = self.head_shape
        if heads % kv_heads:
            todo = "Each key/value head serves heads // kv_heads query heads."
            raise input_error("kv_heads", kv_heads, f"a divisor of heads {heads}", todo)
        if self.positions == "rope" and head_dim % 2:
            todo = "Rotary positions turn pairs of head dims; or take positions='learned'."
            raise input_error("head_dim", head_dim, "an even number", todo)

    def _check_numbers(self) -> None:
        if self.window is not None and (not isinstance(self.window, int) or self.window < 0):
            raise input_error("window", self.window, "an int >= 0, or None", "None lets a token see all before it.")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise input_error("softcap", self.softcap, "a positive number, or None", "None turns it off.")
        if not 0 < self.rope_base < float("inf"):
            raise input_error("rope_base", self.rope_base, "a positive number", "10000 is the usual value.")
        if not 0.0 <= self.dropout < 1.0:
            raise input_error("dropout", self.dropout, "a probability in [0, 1)", "0 turns it off.")

    @property
    def head_shape(self) -> HeadShape:
        """H_q, H_kv and D with the defaults filled in."""
        return HeadShape(self.heads, self.kv_heads or self.heads, self.head_dim or self.width // self.heads)

    @property
    def hidden(self) -> int:
        """Hidden size of the MLP with the default filled in."""
        if self.mlp_width is not None:
            return self.mlp_width
        if self.activation == "gelu":
            return 4 * self.width
        return -(-8 * self.width // 3 // 32) * 32

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TransformerConfig:
        """The inverse of ``to_dict``; raises InputError for an unknown or a missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            todo = "A newer fastattn may have written it."
            raise input_error("config", f"unknown fields {unknown}", f"the fields {sorted(known)}", todo)
        missing = {"vocab_size", "width", "layers", "heads"} - set(fields)
        if missing:
            raise input_error("config", f"no {sorted(missing)}", "all four sizes of the model", "Add what is missing.")
        return cls(**fields)


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise input_error(name, repr(value), "a positive int", "Give a size.")


_GPT2: dict[str, Any] = {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True}
_MODERN: dict[str, Any] = {"qk_norm": True}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "max_length": 256} | _MODERN,
    "small": {"width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "max_length": 512} | _MODERN,
    "base": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 4, "max_length": 2048} | _MODERN,
    "large": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "max_length": 4096} | _MODERN,
    "gpt2-124m": {"width": 768, "layers": 12, "heads": 12} | _GPT2,
    "gpt2-350m": {"width": 1024, "layers": 24, "heads": 16} | _GPT2,
}


def preset(name: str, vocab_size: int) -> TransformerConfig:
    """A named size of model: the "gpt2-*" ones in GPT-2's form, the others with RoPE, RMSNorm, SwiGLU and GQA.

    Args:
        name: a key of ``PRESETS``. Change single fields with ``dataclasses.replace``.
        vocab_size: number of tokens of the tokenizer.

    Raises:
        InputError: there is no preset of this name.

    Example:
        >>> from fastattn.models import preset
        >>> preset("gpt2-124m", vocab_size=50257).width
        768
    """
    if name not in PRESETS:
        raise input_error("preset", repr(name), ", ".join(PRESETS), "Choose one of them.")
    return TransformerConfig(vocab_size=vocab_size, **PRESETS[name])
