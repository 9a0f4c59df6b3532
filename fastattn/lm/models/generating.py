"""``model.generate``: the strategies of ``fastattn.lm.generate`` as a method of the models that they serve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.lm.generate.protocols import DecoderModel
from fastattn.lm.generate.rows import new_tokens
from fastattn.lm.generate.sampling import Sampling


class Generates:
    """The method ``generate`` of ``Decoder``, ``EncoderDecoder`` and ``ImageTextDecoder``."""

    def generate(
        self,
        tokens: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        source: Tensor | Sequence[Sequence[int]] | None = None,
        beams: int | None = None,
        length_penalty: float = 1.0,
        stop_token: int | Sequence[int] | None = None,
        use_cache: bool = True,
        page_size: int | None = None,
        assistant: DecoderModel | None = None,
        prompt_lookup: int | None = None,
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
            tokens: prompts, ``(B, S)`` or rows of different lengths; of an encoder-decoder, beginnings of the targets.
            max_new_tokens: most tokens for each.
            sampling: how tokens are chosen; None is ``fastattn.lm.generate.Sampling()``.
            source: what an encoder-decoder reads, a row for each prompt; or images ``(B, C, H, W)``.
            beams: search for the likeliest text with so many beams instead of sampling; None samples. Of ``sampling``
                they take the repetition penalty.
            length_penalty: of beams; above 1 favours long texts.
            stop_token: one or several that end a text.
            use_cache: keep keys and values instead of computing them again: the same tokens, faster.
            page_size: keep them in pages of so many tokens; None keeps each row in one piece.
            assistant: a smaller decoder with the same tokens, whose guesses a decoder checks several at a time: the
                same tokens, in fewer calls.
            prompt_lookup: guess up to so many tokens from what followed the last tokens earlier in the text.

        Returns:
            the new tokens of each row, a stop token included. ``fastattn.lm.generate`` has more: streaming, all beams,
            many prompts by continuous batching, text.

        Raises:
            InputError: an argument is wrong, or ``beams`` go with a ``sampling`` that draws.

        Example:
            >>> from fastattn.lm.generate import Sampling
            >>> from fastattn.lm.models import Decoder, preset
            >>> model = Decoder(preset("tiny", vocab_size=300))
            >>> [len(row) for row in model.generate([[1, 2, 3], [4]], 5, Sampling(temperature=0))]
            [5, 5]
        """
        return new_tokens(
            self,  # type: ignore[arg-type]
            tokens,
            max_new_tokens,
            sampling,
            source=source,
            beams=beams,
            length_penalty=length_penalty,
            stop_token=stop_token,
            use_cache=use_cache,
            page_size=page_size,
            assistant=assistant,
            prompt_lookup=prompt_lookup,
        )
