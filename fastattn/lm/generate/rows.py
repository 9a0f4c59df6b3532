"""Whole continuations at once, by sampling or by beams: what ``model.generate`` returns."""

from __future__ import annotations

import torch

from fastattn.errors import input_error
from fastattn.lm.generate.beams import beam_search
from fastattn.lm.generate.decode import ENDED, StopTokens, generate
from fastattn.lm.generate.protocols import DecoderModel, Model
from fastattn.lm.generate.sampling import Sampling
from fastattn.lm.generate.sequences import Tokens


def new_tokens(
    model: Model,
    tokens: Tokens,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    source: Tokens | None = None,
    beams: int | None = None,
    length_penalty: float = 1.0,
    stop_token: StopTokens = None,
    use_cache: bool = True,
    page_size: int | None = None,
    assistant: DecoderModel | None = None,
    prompt_lookup: int | None = None,
) -> list[list[int]]:
    """The new tokens of each row; the arguments are those of ``model.generate``."""
    if beams is None:
        steps = generate(
            model, tokens, max_new_tokens, sampling, source=source, stop_token=stop_token, use_cache=use_cache,
            page_size=page_size, assistant=assistant, prompt_lookup=prompt_lookup,
        )  # fmt: skip
        rows = torch.stack(list(steps), dim=1).tolist()
        return [[token for token in row if token != ENDED] for row in rows]
    if assistant is not None or prompt_lookup is not None:
        todo = "Beams look at several texts at once already: leave one of the two out."
        raise input_error("beams", f"{beams} together with guesses", "one of them", todo)
    if sampling is not None and sampling.temperature != 0:
        todo = "Beams do not draw: of the sampling they take the repetition penalty."
        raise input_error("beams", f"{beams} together with sampling", "one of them, or temperature 0", todo)
    found = beam_search(
        model, tokens, max_new_tokens, beams=beams, length_penalty=length_penalty, source=source,
        stop_token=stop_token, use_cache=use_cache, page_size=page_size,
        repetition_penalty=1.0 if sampling is None else sampling.repetition_penalty,
    )  # fmt: skip
    return [best[0].tokens for best in found]
