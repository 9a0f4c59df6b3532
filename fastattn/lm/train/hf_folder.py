"""Folders in Hugging Face's format used as checkpoints: their tokenizer, special tokens, chat template and task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from fastattn.errors import DataError
from fastattn.files import read_limited
from fastattn.lm.data.images import Pixels
from fastattn.lm.generate.chat import template_of, token_named
from fastattn.lm.models import from_pretrained
from fastattn.lm.models.config import AttentionKind
from fastattn.lm.models.convert import head_class
from fastattn.lm.models.hf_formats import HF_FORMATS
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.lm.train.special_tokens import SpecialTokens
from fastattn.lm.train.tokens import START, load_tokenizer

# The key in config.json of classifiers whose every example had two texts; transformers keeps it.
COMPARES = "fastattn_compares_two_texts"
_TASKS = {"SequenceClassifier": "classify", "TokenClassifier": "tag", "SpanExtractor": "qa"}
_KINDS = {"regression": "regression", "multi_label_classification": "multilabel"}  # of "problem_type"


@dataclass(frozen=True)
class HFFolder:
    """A folder in Hugging Face's format. The files are read when asked for."""

    folder: Path

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer.json")

    def load_pretrained(self, device: torch.device | str = "cpu", attention: str | None = None) -> Any:
        """The model with its head, in evaluation mode; raises DataError where ``from_pretrained`` does."""
        return from_pretrained(self.folder, attention=cast(AttentionKind, attention or "fastattn")).to(device)

    @property
    def task(self) -> str | None:
        """The task of fine-tuning that the model's head is for; None for a language model."""
        fields = self._read("config.json")
        hf_format = HF_FORMATS.get(str(fields.get("model_type")))
        if hf_format is None:
            return None
        if hf_format.kind == "encoder-decoder":
            return "seq2seq"
        if hf_format.kind == "vision":
            return "image" if head_class(hf_format, fields) else None
        task = _TASKS.get(head_class(hf_format, fields) or "")
        return _KINDS.get(fields.get("problem_type") or "", task) if task == "classify" else task

    @property
    def compares(self) -> bool:
        """Whether an input must have two texts. Only folders that fastattn exported say so."""
        return self._read("config.json").get(COMPARES) is True

    @property
    def chat_template(self) -> str | None:
        """The template in ``chat_template.jinja`` or ``tokenizer_config.json``."""
        path = self.folder / "chat_template.jinja"
        return read_limited(path) if path.is_file() else template_of(self._read("tokenizer_config.json"))

    @property
    def pixels(self) -> Pixels:
        """The way from an image to what the model reads, by ``preprocessor_config.json``."""
        return Pixels.of_hugging_face(self._read("preprocessor_config.json"))

    def special_tokens(self, tokenizer: Tokenizer) -> SpecialTokens:
        """The marks that the folder's settings name, and for those that they do not, the usual ones."""
        usual, settings = SpecialTokens.of(tokenizer), self._read("tokenizer_config.json")
        named = {
            name: tokenizer.token_to_id(token)
            for name in ("bos_token", "eos_token")
            if (token := token_named(settings, name)) is not None
        }
        before = tokenizer.encode("").ids  # the tokenizer's own way to begin a text, which GPT-2's and Qwen's lack
        is_ours = usual.begin is not None and tokenizer.id_to_token(usual.begin) == START
        begin = usual.begin if is_ours or usual.begin in before else named.get("bos_token") if before else None
        target = self._read("config.json").get("decoder_start_token_id")
        ends = named.get("eos_token")
        return SpecialTokens(
            begin, usual.end if ends is None else ends, usual.target if target is None else target, usual.separators
        )

    def ends(self) -> tuple[int, ...]:
        """The tokens that end generation by the folder's settings."""
        for name in ("generation_config.json", "config.json"):
            found = self._read(name).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        return ()

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(read_limited(path))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is not readable as JSON ({error}).") from error
        return content if isinstance(content, dict) else {}


AnySource = Checkpoint | HFFolder


def find_model(path: Path, *, best: bool = False) -> AnySource:
    """A model by its path: a folder in Hugging Face's format, or what ``find_checkpoint`` finds.

    Raises:
        DataError: there is neither.
    """
    if (path / "config.json").is_file() and not (path / "trainer.json").is_file():
        return HFFolder(path)
    return find_checkpoint(path, best=best)
