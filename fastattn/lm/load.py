"""Models that generate text, from any checkpoint of fastattn or a folder in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from fastattn.errors import DataError, input_error
from fastattn.lm.data.images import ImageReader, check_image
from fastattn.lm.finetune.load import is_finetuned, load_finetuned, load_generative_model
from fastattn.lm.generate import ChatTemplate, Texts
from fastattn.lm.generate.protocols import is_decoder, is_encoder_decoder, is_image_text
from fastattn.lm.models import TransformerConfig, save_pretrained
from fastattn.lm.train.hf_folder import COMPARES, AnySource
from fastattn.lm.train.special_tokens import SpecialTokens


def load_model(checkpoint: AnySource, device: torch.device | str = "cpu", attention: str | None = None) -> Any:
    """The model of a checkpoint with its weights, in evaluation mode.

    Args:
        checkpoint: of pre-training, or of fine-tuning for a task whose answer is generated text; or a folder in Hugging
            Face's format (``fastattn.lm.train.find_model`` finds any of them).
        device: where to put it.
        attention: "fastattn" or "eager", instead of what the run used.

    Raises:
        DataError: the checkpoint is damaged, or its model has the head of a task: see ``load_finetuned``.
    """
    if is_finetuned(checkpoint):
        return load_generative_model(checkpoint, device, attention)
    return checkpoint.load_pretrained(device, attention)


def load_texts(
    checkpoint: AnySource,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    *,
    stop: Sequence[str] = (),
    chat_template: str | None = None,
) -> tuple[Texts, ChatTemplate | None]:
    """A model ready to generate text, and the template of its conversations if it has one.

    Args:
        checkpoint: as in ``load_model``, as are the next two.
        device: see there.
        attention: see there.
        stop: strings that end a text.
        chat_template: a Jinja template to use instead of the model's.

    Raises:
        DataError: as there, or the model is an encoder, which generates no text.
    """
    model, tokenizer = load_model(checkpoint, device, attention), checkpoint.tokenizer()
    if not is_decoder(model) and not is_encoder_decoder(model) and not is_image_text(model):
        kind = model.config.kind
        raise DataError(f"{checkpoint.folder} is an {kind}, which generates no text: see fastattn evaluate.")
    begin, end, target = checkpoint.special_tokens(tokenizer).names(tokenizer)
    source, template = chat_template or checkpoint.chat_template, None
    if source is not None and is_decoder(model):
        template = ChatTemplate(source, tokenizer, begin=begin, end=end)
    ends = [*checkpoint.ends(), *(template.stops if template else ())]
    return Texts(model, tokenizer, start=begin, end=end, target=target, stop=stop, ends=ends), template


def load_image(checkpoint: AnySource, path: str | Path, model: Any) -> Tensor:
    """An image as the model of a checkpoint reads it, ``(1, C, H, W)``.

    Args:
        checkpoint: that knows how its model reads pixels.
        path: of a file.
        model: of the checkpoint, from ``load_texts`` or ``load_model``.

    Raises:
        DataError: the file is missing, damaged, too large or no image.
        InputError: the model reads no images.
    """
    config: TransformerConfig = model.config
    if not config.has_images:
        raise input_error("image", path, f"None for a model of kind {config.kind!r}", "It reads text alone.")
    pixels = checkpoint.pixels
    check_image(str(path))
    images = ImageReader(config.image_size, config.channels, pixels.resample).read([str(path)])
    return pixels.normalised(images)


def export(checkpoint: AnySource, path: str | Path) -> str:
    """Write the model of a checkpoint as a folder in Hugging Face's format, with its tokenizer and chat template.

    A model of images comes with its ``preprocessor_config.json``, and one of images alone without the other two.

    Args:
        checkpoint: as in ``load_model``; a model with the head of a task keeps it.
        path: of the folder, which must not exist.

    Returns:
        the class of transformers that loads it.

    Raises:
        InputError: the model has no Hugging Face equivalent.
        DataError: the checkpoint is damaged, or the folder exists.
    """
    finetuned = load_finetuned(checkpoint) if is_finetuned(checkpoint) else None
    found: Any = checkpoint.load_pretrained() if finetuned is None else finetuned.model
    more = {COMPARES: True} if finetuned is not None and finetuned.task.compares else {}
    config: TransformerConfig = found.config
    pixels = checkpoint.pixels.to_hugging_face(config.image_size, config.channels) if config.has_images else None
    if config.kind == "vision":
        save_pretrained(found, path, image_processor=pixels)
        return _architecture(path)
    tokenizer = checkpoint.tokenizer()
    special = checkpoint.special_tokens(tokenizer)
    if tokenizer.post_processor is None:
        tokenizer.post_processor = _marks(found, special, tokenizer)
    ids = {"eos": special.end, "pad": special.end} | ({} if special.begin is None else {"bos": special.begin})
    if is_encoder_decoder(found):
        ids["decoder_start"] = special.target
    template = checkpoint.chat_template
    save_pretrained(
        found, path, tokenizer=tokenizer, special_tokens=ids, chat_template=template, image_processor=pixels, more=more
    )
    return _architecture(path)


def _architecture(path: str | Path) -> str:
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["architectures"][0]


def _marks(model: Any, special: SpecialTokens, tokenizer: Tokenizer) -> processors.PostProcessor:
    """The special tokens around a text, so that transformers' tokenizer adds those that the model was trained with."""
    begin, end, _ = special.names(tokenizer)
    after = "" if is_decoder(model) else f" {end}:0"
    single = f"{begin}:0 $A:0{after}" if begin is not None else f"$A:0{after}"
    marks = [(end, special.end)] if begin is None or begin == end else [(begin, special.begin), (end, special.end)]
    return processors.TemplateProcessing(single=single, special_tokens=marks)
