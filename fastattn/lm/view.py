"""The attention of a model on a text, as a picture and as an HTML page that opens offline."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import fastattn
from fastattn.errors import DataError, input_error
from fastattn.files import write_text
from fastattn.lm.models import EncoderDecoder, recorded_weights
from fastattn.lm.train.special_tokens import SpecialTokens

_MOST = 1 << 24  # weights in a page, which takes 3 bytes for each


@dataclass(frozen=True)
class AttentionView:
    """The attention weights of a text.

    Attributes:
        weights: ``(H_q, S_q, S_kv)`` of each layer, by the kind of attention, as ``recorded_weights`` names them.
        tokens: the text of each key, by kind.
        query_tokens: the text of each query, by kind.
    """

    weights: dict[str, list[Tensor]]
    tokens: dict[str, list[str]]
    query_tokens: dict[str, list[str]]

    def plot(self, path: str | Path, kind: str | None = None) -> Path:
        """A picture of one kind of attention: see ``fastattn.plot_attention``."""
        kind = kind or next(iter(self.weights))
        if kind not in self.weights:
            raise input_error("kind", repr(kind), ", ".join(self.weights), "Choose one of them.")
        layers = self.weights[kind]
        return fastattn.plot_attention(layers, path, tokens=self.tokens[kind], query_tokens=self.query_tokens[kind])

    def write_html(self, path: str | Path, title: str = "Attention") -> Path:
        """A page with every head, the weights of a chosen token, entropies and rollout. It loads nothing.

        Raises:
            InputError: there are more weights than a browser can be expected to show.
        """
        count = sum(layer.numel() for layers in self.weights.values() for layer in layers)
        if count > _MOST:
            raise input_error("text", f"{count:,} weights", f"at most {_MOST:,}", "Take a shorter text.")
        kinds = [
            {
                "name": kind,
                "tokens": self.tokens[kind],
                "queries": self.query_tokens[kind],
                "layers": [{"heads": len(layer), "weights": _packed(layer)} for layer in layers],
            }
            for kind, layers in self.weights.items()
        ]
        page = resources.files("fastattn.lm").joinpath("attention_view.html").read_text(encoding="utf-8")
        content = json.dumps(kinds).replace("<", "\\u003c")  # so that no token ends the script
        write_text(Path(path), page.replace("{{title}}", html.escape(title)).replace("{{data}}", content))
        return Path(path)


def attention_of(model: Any, tokenizer: Tokenizer, text: str, target: str | None = None) -> AttentionView:
    """The attention weights of a model that reads a text.

    Args:
        model: any of ``fastattn.lm.models`` that reads tokens, with a head or without.
        tokenizer: of the model.
        text: what it reads.
        target: what an encoder-decoder writes, of which the attention is shown; for the others None.

    Raises:
        DataError: the text has no tokens, or more than the model reads.
        InputError: ``target`` for a model that writes none, or none for one that does.

    Example:
        >>> from fastattn.lm.models import Decoder, preset
        >>> from fastattn.lm.train.tokens import train_tokenizer
        >>> from fastattn.lm.view import attention_of
        >>> view = attention_of(Decoder(preset("tiny", 270)), train_tokenizer(["a cat"], 270), "a cat")
        >>> view.tokens["self"][:2], len(view.weights["self"])
        (['<|start|>', 'a'], 4)
    """
    special = SpecialTokens.of(tokenizer)
    is_pair = isinstance(model, EncoderDecoder)
    if is_pair != (target is not None):
        allowed = "the text that it writes" if is_pair else "None, as the model writes no other text"
        raise input_error("target", repr(target), allowed, "An encoder-decoder reads one and writes another.")
    ids = [*special.opening(), *tokenizer.encode(text, add_special_tokens=False).ids]
    if model.config.kind != "decoder":
        ids.append(special.end)
    rows = [ids]
    if target is not None:
        rows.append([special.target, *tokenizer.encode(target, add_special_tokens=False).ids])
    for row in rows:
        if not 0 < len(row) <= model.config.longest:
            raise DataError(f"The text has {len(row)} tokens: the model reads 1 to {model.config.longest} of them.")
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), recorded_weights(model) as found:
        model(*(torch.tensor([row], device=device) for row in rows))
    source, written = _names(tokenizer, rows[0]), _names(tokenizer, rows[-1])
    keys = {kind: written if kind == "decoder" else source for kind in found}
    queries = {kind: source if kind in ("self", "encoder") else written for kind in found}
    return AttentionView({kind: [x[0].float().cpu() for x in layers] for kind, layers in found.items()}, keys, queries)


def plot_attention(model: Any, tokenizer: Tokenizer, text: str, path: str | Path, target: str | None = None) -> Path:
    """Draw the attention of a model on a text: a map for each layer and head, entropies, rollout.

    Args:
        model: as in ``attention_of``, as are the next two.
        tokenizer: see there.
        text: see there.
        path: of a PNG file, or of a page for a browser if it ends in ``.html``.
        target: as in ``attention_of``.

    Returns:
        ``path``.

    Raises:
        DataError: as there.
        InputError: as there.
    """
    view = attention_of(model, tokenizer, text, target)
    return view.write_html(path, text) if Path(path).suffix.lower() == ".html" else view.plot(path)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as they can be read: their text, or the tokenizer's own name of a piece of a character."""
    texts = (tokenizer.decode([token], skip_special_tokens=False) for token in ids)
    return [
        text if text.strip() and "\ufffd" not in text else str(tokenizer.id_to_token(token))
        for text, token in zip(texts, ids, strict=True)
    ]


def _packed(weights: Tensor) -> str:
    """Weights as 16-bit integers of 1/65535, in base64."""
    return base64.b64encode((weights.clamp(0, 1).numpy() * 65535).round().astype(np.dtype("<u2")).tobytes()).decode()
