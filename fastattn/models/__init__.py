"""The bundled transformers. They know attention only as ``fastattn.attention`` and the modules of ``fastattn.nn``."""

from fastattn.models.config import HeadShape, TransformerConfig
from fastattn.models.convert import from_pretrained, save_pretrained
from fastattn.models.decoder import Decoder
from fastattn.models.encoder import Encoder, VisionEncoder
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.heads import MaskedLM, SequenceClassifier, SpanExtractor, TokenClassifier
from fastattn.models.make import make_model
from fastattn.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "HeadShape",
    "MaskedLM",
    "SequenceClassifier",
    "SpanExtractor",
    "TokenClassifier",
    "TransformerConfig",
    "VisionEncoder",
    "from_pretrained",
    "make_model",
    "preset",
    "save_pretrained",
]
