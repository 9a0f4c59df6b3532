"""Generating text: decoding strategies on top of ``fastattn.models``."""

from fastattn.generate.decode import Sampling, decode_stream, generate, stream_text

__all__ = ["Sampling", "decode_stream", "generate", "stream_text"]
