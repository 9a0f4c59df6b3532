"""The class for each kind of config."""

from __future__ import annotations

from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.decoder import Decoder
from fastattn.lm.models.encoder import Encoder, VisionEncoder
from fastattn.lm.models.encoder_decoder import EncoderDecoder
from fastattn.lm.models.image_text import ImageTextDecoder

AnyModel = Decoder | Encoder | EncoderDecoder | VisionEncoder | ImageTextDecoder
_CLASSES: dict[str, type[AnyModel]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder-decoder": EncoderDecoder,
    "vision": VisionEncoder,
    "image-text": ImageTextDecoder,
}


def make_model(config: TransformerConfig) -> AnyModel:
    """The model that ``config`` describes, with fresh weights.

    Args:
        config: its ``kind`` chooses the class.

    Example:
        >>> from fastattn.lm.models import make_model, preset
        >>> type(make_model(preset("bert-tiny", vocab_size=300))).__name__
        'Encoder'
    """
    return _CLASSES[config.kind](config)
