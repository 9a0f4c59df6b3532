"""Generating text: decoding strategies on top of ``fastattn.lm.models``."""

from fastattn.lm.generate.batching import Completion, complete
from fastattn.lm.generate.beams import Beam, beam_search
from fastattn.lm.generate.chat import ChatTemplate
from fastattn.lm.generate.decode import generate
from fastattn.lm.generate.sampling import Sampling
from fastattn.lm.generate.speculate import Acceptance
from fastattn.lm.generate.text import TextCompletion, Texts, decode_stream, stream_text

__all__ = [
    "Acceptance",
    "Beam",
    "ChatTemplate",
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
