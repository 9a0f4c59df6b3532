"""The bundled transformers. They know attention only as ``fastattn.attention`` and the modules of ``fastattn.nn``."""

from fastattn.lm.models.config import HeadShape, TransformerConfig
from fastattn.lm.models.convert import from_pretrained, save_pretrained
from fastattn.lm.models.decoder import Decoder
from fastattn.lm.models.encoder import Encoder, VisionEncoder
from fastattn.lm.models.encoder_decoder import EncoderDecoder
from fastattn.lm.models.heads import MaskedLM, SequenceClassifier, SpanExtractor, TokenClassifier
from fastattn.lm.models.image_text import ImageTextDecoder
from fastattn.lm.models.make import make_model
from fastattn.lm.models.presets import PRESETS, preset
from fastattn.lm.models.recording import recorded_weights

__all__ = [
    "PRESETS",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "HeadShape",
    "ImageTextDecoder",
    "MaskedLM",
    "SequenceClassifier",
    "SpanExtractor",
    "TokenClassifier",
    "TransformerConfig",
    "VisionEncoder",
    "from_pretrained",
    "make_model",
    "preset",
    "recorded_weights",
    "save_pretrained",
]
