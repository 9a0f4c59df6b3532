"""The config of a transformer: one frozen dataclass and its checks. Named sizes are in ``presets.py``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastattn.errors import input_error
from fastattn.nn.rotary import RotaryScaling

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "image-text"]
Norm = Literal["rms", "rms-zero", "layer"]
NormPlace = Literal["before", "after", "both"]
Activation = Literal["swiglu", "geglu", "geglu-exact", "gelu", "gelu-exact", "relu"]
Positions = Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"]
AttentionKind = Literal["fastattn", "eager"]
PoolerActivation = Literal["tanh", "relu"]

GATED = ("swiglu", "geglu", "geglu-exact")
_CHOICES = {
    "kind": Kind,
    "norm": Norm,
    "norm_place": NormPlace,
    "activation": Activation,
    "positions": Positions,
    "attention": AttentionKind,
    "pooler_activation": PoolerActivation,
}


class HeadShape(NamedTuple):
    """The sizes of one attention layer: H_q, H_kv, D."""

    heads: int
    kv_heads: int
    head_dim: int


_LIMITS = {
    "vocab_size": 1 << 24, "width": 1 << 17, "layers": 1024, "decoder_layers": 1024, "vision_layers": 1024,
    "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1 << 13, "mlp_width": 1 << 20, "image_size": 1 << 14,
}  # fmt: skip


@dataclass(frozen=True)
class TransformerConfig:
    """A transformer: decoder, encoder, encoder-decoder, encoder of images, or decoder of text about an image.

    Attributes:
        vocab_size: number of tokens; 0 for images.
        width: C, the size of the residual stream.
        layers: number of blocks; those of the encoder if there are two stacks.
        heads: H_q.
        kv_heads: H_kv, a divisor of ``heads``; None is ``heads``. See ``head_shape``.
        head_dim: D; None is ``width // heads``. See ``head_shape``.
        mlp_width: hidden size of the MLP; None is ``4 * width``, or two thirds of it for the gated activations, which
            have three matrices, rounded up to a multiple of 32. See ``hidden``.
        max_length: most tokens in a row, in training and in generation, without those of an image. Of images it is
            ``image_tokens``.
        norm: "rms" (RMSNorm), "rms-zero" (RMSNorm times 1 + weight, as Gemma has it) or "layer" (LayerNorm).
        activation: "swiglu" or "geglu" (gated by silu or gelu), "gelu", both with the tanh form of gelu unless their
            name ends in "-exact", or "relu".
        positions: "rope" (rotary), "learned" (a table added to the embedding), "sinusoidal" (the original sines, added
            likewise), "alibi" (linear in the distance), "relative" (T5's learned bias for each distance) or "none".
        rope_base: of "rope": the longest wavelength is ``2 pi * rope_base``.
        window: keys that a token sees before itself, and behind itself in an encoder; None is all of them.
        global_layers: numbers of the layers without the window, from 0.
        local_rope_base: ``rope_base`` of the layers with the window; None is the same.
        softcap: ``softcap * tanh(scores / softcap)``; None is off.
        sinks: one learned logit per head that takes part in the softmax and has no value.
        qk_norm: normalise queries and keys of each head (with ``norm``) before the rotation.
        bias: biases in the linear layers.
        qkv_bias: biases of queries, keys and values; None is ``bias``.
        tie_embeddings: use the embedding as the output layer too.
        dropout: probability of dropping attention weights and the outputs of each part of a block, in training.
        attention: "fastattn" lets fastattn choose its backend; "eager" is the plain formula, for comparison.
        kind: "decoder", "encoder", "encoder-decoder", "vision" or "image-text". See ``make_model``.
        decoder_layers: blocks of the decoder of an encoder-decoder; None is ``layers``.
        norm_place: "before" each part of a block (and once at the end), "after" it is added, as in 2017 and BERT, or
            "both" before each part and on its output, as in Gemma 2.
        first_norm: the first block has a norm before its attention; ModernBERT's has none.
        norm_eps: added to the variance; None is 1e-6 for "rms" and 1e-5 for "layer".
        rope_scaling: of "rope": Llama 3.1's; None leaves the frequencies.
        relative_buckets: of "relative": number of classes of distances.
        relative_distance: of "relative": farther than this is one class.
        attention_scale: factor on the scores; None is ``head_dim ** -0.5``.
        embedding_scale: factor on the embedding of a token.
        embedding_norm: normalise the sum of the embeddings.
        logit_scale: factor on the final states before the output layer.
        logit_softcap: ``logit_softcap * tanh(logits / logit_softcap)``; None is off.
        position_offset: of "learned": the row of the first position in the table; RoBERTa and BART have 2.
        token_types: kinds of tokens with an embedding each (BERT's sentence A and B); 0 is none.
        pooler: a layer on the first token for classification, as BERT has it.
        pooler_activation: "tanh" or "relu", after that layer.
        head_transform: heads for labels and spans have a layer, its activation and a norm before their output layer, as
            ModernBERT's and every head for masked tokens.
        image_size: height and width of an image.
        patch_size: height and width of a patch, which becomes a token.
        channels: of an image.
        vision_layers: blocks of the encoder of images, of "image-text".

    Raises:
        InputError: a value is out of range or two of them do not fit.

    Example:
        >>> from fastattn.lm.models import TransformerConfig
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
    kind: Kind = "decoder"
    decoder_layers: int | None = None
    norm_place: NormPlace = "before"
    norm_eps: float | None = None
    rope_scaling: RotaryScaling | None = None
    relative_buckets: int = 32
    relative_distance: int = 128
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    logit_scale: float = 1.0
    token_types: int = 0
    pooler: bool = False
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    global_layers: tuple[int, ...] = ()
    local_rope_base: float | None = None
    qkv_bias: bool | None = None
    first_norm: bool = True
    logit_softcap: float | None = None
    position_offset: int = 0
    pooler_activation: PoolerActivation = "tanh"
    vision_layers: int | None = None
    head_transform: bool = False

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                names = " or ".join(repr(x) for x in get_args(kind))
                raise input_error(name, repr(getattr(self, name)), names, "Choose one of them.")
        sizes = ["width", "layers", "heads", "max_length", "relative_buckets", "relative_distance"]
        sizes += [] if self.kind == "vision" else ["vocab_size"]
        sizes += ["image_size", "patch_size", "channels"] if self.has_images else []
        sizes += ["vision_layers"] if self.kind == "image-text" else []
        given = ("kv_heads", "head_dim", "mlp_width", "decoder_layers")
        for name in sizes + [name for name in given if getattr(self, name) is not None]:
            _positive_int(name, getattr(self, name))
        self._check_limits()
        self._check_heads()
        self._check_numbers()
        self._check_kind()

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

    def _check_limits(self) -> None:
        """Sizes beyond those of any model, which a damaged or hostile file may claim."""
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise input_error(name, value, f"at most {most:,}", "No model of this kind is as large.")

    def _check_numbers(self) -> None:
        if self.window is not None and (not isinstance(self.window, int) or self.window < 0):
            raise input_error("window", self.window, "an int >= 0, or None", "None lets a token see all before it.")
        if not all(isinstance(x, int) and 0 <= x < self.layers for x in self.global_layers):
            allowed = f"numbers of layers, 0 ... {self.layers - 1}"
            raise input_error("global_layers", self.global_layers, allowed, "The others have the window.")
        if not 0 <= self.position_offset < 1 << 10:
            raise input_error("position_offset", self.position_offset, "an int in [0, 1024)", "0 is the usual.")
        for name in ("softcap", "norm_eps", "attention_scale", "logit_softcap", "local_rope_base"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise input_error(name, value, "a positive number, or None", "None is the default or turns it off.")
        for name in ("rope_base", "embedding_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise input_error(name, getattr(self, name), "a positive number", "Leave it out for the usual value.")
        if not 0.0 <= self.dropout < 1.0:
            raise input_error("dropout", self.dropout, "a probability in [0, 1)", "0 turns it off.")
        if self.positions == "relative" and (
            self.relative_buckets % 4 or self.exact_distances >= self.relative_distance
        ):
            todo = "T5 has 32 buckets for distances up to 128."
            allowed = "a multiple of 4, with relative_distance more than half of it"
            raise input_error("relative_buckets", self.relative_buckets, allowed, todo)

    def _check_kind(self) -> None:
        belongs = {
            "decoder_layers": (self.decoder_layers is not None, ("encoder-decoder",)),
            "token_types": (bool(self.token_types), ("encoder",)),
            "pooler": (self.pooler, ("encoder", "vision")),
            "head_transform": (self.head_transform, ("encoder",)),
            "vision_layers": (self.vision_layers is not None, ("image-text",)),
        }
        for name, (is_given, kinds) in belongs.items():
            if is_given and self.kind not in kinds:
                allowed = f"its default, as kind is {self.kind!r}"
                raise input_error(name, getattr(self, name), allowed, f"It belongs to kind {' or '.join(kinds)}.")
        if self.kind == "image-text" and (self.window is not None or self.positions == "relative"):
            given = f"window {self.window}, positions {self.positions!r}"
            raise input_error("kind", f"'image-text' with {given}", "no window, and other positions", "Leave them out.")
        if self.has_images and self.image_size % self.patch_size:
            todo = "An image is cut into whole patches."
            raise input_error("patch_size", self.patch_size, f"a divisor of image_size {self.image_size}", todo)
        if self.positions == "sinusoidal" and self.width % 2:
            raise input_error(
                "width", self.width, "an even number", "Sinusoidal positions are pairs of sine and cosine."
            )

    @property
    def head_shape(self) -> HeadShape:
        """H_q, H_kv and D with the defaults filled in."""
        return HeadShape(self.heads, self.kv_heads or self.heads, self.head_dim or self.width // self.heads)

    @property
    def hidden(self) -> int:
        """Hidden size of the MLP with the default filled in."""
        if self.mlp_width is not None:
            return self.mlp_width
        if self.activation not in GATED:
            return 4 * self.width
        return -(-8 * self.width // 3 // 32) * 32

    @property
    def has_images(self) -> bool:
        """Whether the model reads images."""
        return self.kind in ("vision", "image-text")

    @property
    def prefix(self) -> int:
        """Tokens before those of text: of an image that is read first."""
        return self.image_tokens if self.kind == "image-text" else 0

    @property
    def vision(self) -> TransformerConfig:
        """The config of the encoder of images in an "image-text" model: a ViT of its width."""
        return TransformerConfig(
            0, self.width, self.vision_layers or 0, self.heads, kind="vision", norm="layer", norm_eps=1e-5,
            activation="gelu-exact", positions="learned", bias=True, dropout=self.dropout, attention=self.attention,
            image_size=self.image_size, patch_size=self.patch_size, channels=self.channels,
        )  # fmt: skip

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: its patches, and one for the whole."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @property
    def longest(self) -> int:
        """Most tokens in a row, without those of an image before text."""
        return self.image_tokens if self.kind == "vision" else self.max_length

    @property
    def cache_window(self) -> int | None:
        """The window of the keys that have to be kept: none where a layer sees all of them."""
        return None if self.global_layers else self.window

    @property
    def exact_distances(self) -> int:
        """Of "relative": distances from 0 on that have a class of their own, in the direction with the most."""
        return self.relative_buckets // (4 if self.kind in ("encoder", "vision") else 2)

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
        scaling = fields.get("rope_scaling")
        typed = {"rope_scaling": RotaryScaling(**scaling) if isinstance(scaling, dict) else scaling}
        return cls(**(fields | typed | {"global_layers": tuple(fields.get("global_layers", ()))}))


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise input_error(name, repr(value), "a positive int", "Give a size.")
