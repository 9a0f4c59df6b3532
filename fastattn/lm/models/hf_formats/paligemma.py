"""The format of PaliGemma with a ViT for images and Qwen3 for text: the image before the text, seen in both directions.

Their mask needs ``token_type_ids``: 0 for the tokens of the image, 1 for those of the text.
"""

from __future__ import annotations

import dataclasses

import torch

from fastattn.errors import DataError
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Tensors, is_tied, refuse
from fastattn.lm.models.hf_formats.llama import QWEN3
from fastattn.lm.models.hf_formats.vit import VIT

_TEXT, _IMAGES = "model.language_model.", "model.vision_tower."


def _read(fields: Json, tensors: Tensors) -> TransformerConfig:
    text, images = fields["text_config"], fields["vision_config"]
    refuse(text, {"model_type": QWEN3.model_type})
    refuse(images, {"model_type": VIT.model_type})
    vision = VIT.read(images, tensors)
    said = fields.get("tie_word_embeddings", True)
    config = dataclasses.replace(
        QWEN3.read(text, tensors),
        kind="image-text",
        vision_layers=vision.layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        channels=vision.channels,
        tie_embeddings=is_tied(tensors, "lm_head.weight", f"{_TEXT}embed_tokens.weight", said),
    )
    ours = dataclasses.replace(config.vision, mlp_width=config.vision.hidden)
    odd = [x.name for x in dataclasses.fields(ours) if getattr(ours, x.name) != getattr(vision, x.name)]
    if odd:
        raise DataError(f"The ViT of vision_config differs from that of fastattn in {', '.join(odd)}.")
    return config


def _write(config: TransformerConfig) -> Json:
    text = QWEN3.write(config) | {"model_type": QWEN3.model_type, "use_bidirectional_attention": True}
    return {
        "text_config": text,
        "vision_config": VIT.write(config.vision) | {"model_type": VIT.model_type},
        "image_token_index": config.vocab_size,  # stands for a token of an image; no text has it
        "projection_dim": config.width,
        "hidden_size": config.width,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _of_images(name: str) -> str:
    return name.replace(VIT.prefix, _IMAGES, 1)


def _of_text(name: str) -> str:
    return name.replace(QWEN3.prefix, _TEXT, 1)


PALIGEMMA = HFFormat(
    model_type="paligemma",
    kind="image-text",
    prefix="model.",
    architecture="PaliGemmaForConditionalGeneration",
    read=_read,
    write=_write,
    outside={ours: _of_text(theirs) for ours, theirs in QWEN3.outside.items()}
    | {f"vision.{ours}": _of_images(theirs) for ours, theirs in VIT.outside.items()}
    | {"projection": "model.multi_modal_projector.linear"},
    blocks={ours: (_of_text(theirs), table) for ours, (theirs, table) in QWEN3.blocks.items()}
    | {f"vision.{ours}": (_of_images(theirs), table) for ours, (theirs, table) in VIT.blocks.items()},
    shapes={_of_images(name): shape for name, shape in VIT.shapes.items()},
    # They make a pooler for the ViT that nothing reads.
    zeros={
        f"{_IMAGES}pooler.dense.weight": lambda config: torch.zeros(config.width, config.width),
        f"{_IMAGES}pooler.dense.bias": lambda config: torch.zeros(config.width),
    },
    unused=QWEN3.unused,
)
