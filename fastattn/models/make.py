"""The one place that knows which class serves which kind of config."""

from __future__ import annotations

from fastattn.models.config import TransformerConfig
from fastattn.models.decoder import Decoder
from fastattn.models.encoder import Encoder, VisionEncoder
from fastattn.models.encoder_decoder import EncoderDecoder

AnyModel = Decoder | Encoder | EncoderDecoder | VisionEncoder
_CLASSES: dict[str, type[AnyModel]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder-decoder": EncoderDecoder,
    "vision": VisionEncoder,
}


def make_model(config: TransformerConfig) -> AnyModel:
    """The model that ``config`` describes, with fresh weights.

    Args:
        config: its ``kind`` chooses the class.

    Example:
        >>> from fastattn.models import make_model, preset
        >>> type(make_model(preset("bert-tiny", vocab_size=300))).__name__
        'Encoder'
    """
    return _CLASSES[config.kind](config)
