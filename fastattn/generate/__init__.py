"""Generating text: decoding strategies on top of ``fastattn.models``."""

from fastattn.generate.batching import Completion, complete
from fastattn.generate.beams import Beam, beam_search
from fastattn.generate.decode import generate
from fastattn.generate.sampling import Sampling
from fastattn.generate.text import TextCompletion, Texts, decode_stream, stream_text

__all__ = [
    "Beam",
    "Completion",
    "Sampling",
    "TextCompletion",
    "Texts",
    "beam_search",
    "complete",
    "decode_stream",
    "generate",
    "stream_text",
]
