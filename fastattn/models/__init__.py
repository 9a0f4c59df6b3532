"""The bundled transformers. They know attention only as ``fastattn.attention`` and the modules of ``fastattn.nn``."""

from fastattn.models.config import PRESETS, HeadShape, TransformerConfig, preset
from fastattn.models.decoder import Decoder

__all__ = ["PRESETS", "Decoder", "HeadShape", "TransformerConfig", "preset"]
