"""The models as a model type of EleutherAI's lm-evaluation-harness. Needs ``pip install 'fastattn[lm-eval]'``.

``python -m fastattn.lm.harness --model fastattn --model_args checkpoint=RUN --tasks hellaswag`` is the harness's own
command line with this model in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fastattn.errors import input_error
from fastattn.lm.generate import Sampling
from fastattn.lm.generate.protocols import is_decoder
from fastattn.lm.generate.sequences import padded
from fastattn.lm.load import load_texts
from fastattn.lm.train.hf_folder import find_model

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


@register_model("fastattn")
class FastattnLM(TemplateLM):
    """A decoder of fastattn, or of a folder in Hugging Face's format.

    Args:
        checkpoint: ``--out`` of a run, a checkpoint, or such a folder.
        device: where to compute.
        batch_size: rows at a time.
        max_gen_toks: most tokens of an answer for tasks that set no limit.
        attention: "fastattn" or "eager", instead of what the run used.

    Raises:
        DataError: there is no such model.
        InputError: it is not a decoder.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "cpu",
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        attention: str | None = None,
        max_batch_size: int | None = None,  # the harness gives it to every model
    ) -> None:
        super().__init__()
        self.texts, _ = load_texts(find_model(Path(checkpoint), best=True), device, attention)
        if not is_decoder(self.texts.model):
            kind = self.texts.model.config.kind
            raise input_error("checkpoint", f"a model of kind {kind}", "a decoder", "The harness scores continuations.")
        self.model, self.batch, self.max_gen_toks = self.texts.model, int(batch_size), max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.texts.last

    @property
    def prefix_token_id(self) -> int:
        return (self.texts.opening or [self.texts.last])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.texts.tokenizer.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether each of its tokens is the likeliest."""
        opening = self.texts.opening
        rows = []
        for _texts, context, continuation in requests:
            before = context if context[: len(opening)] == opening else [*opening, *context]
            rows.append((before, continuation))
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]) - len(rows[n][1]))
        found: dict[int, tuple[float, bool]] = {}
        for numbers in tqdm([order[n : n + self.batch] for n in range(0, len(order), self.batch)], disable=None):
            found.update(zip(numbers, self._scored([rows[n] for n in numbers]), strict=True))
        return [found[n] for n in range(len(rows))]

    @torch.no_grad()
    def _scored(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        longest = self.model.config.longest
        device = self.model.embedding.weight.device
        inputs = [[*context, *continuation][-longest - 1 : -1] for context, continuation in rows]
        tokens, _ = padded(inputs, device)
        log_p = self.model.logits(self.model.hidden(tokens)).float().log_softmax(-1)
        for row, text, (_context, continuation) in zip(log_p, inputs, rows, strict=True):
            wanted = torch.tensor(continuation[-len(text) :], device=device)
            of_continuation = row[len(text) - len(wanted) : len(text)]
            total = of_continuation.gather(-1, wanted[:, None]).sum().item()
            yield total, bool((of_continuation.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of what the model reads."""
        windows, ends = list[Request](), [0]
        for request in requests:
            of_text = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.model.config.longest, 1
            )
            windows += [(("", ""), *make_disjoint_window(window)) for window in of_text]
            ends.append(len(windows))
        totals = [total for total, _ in self._loglikelihood_tokens(windows)]
        return [sum(totals[begin:end]) for begin, end in pairwise(ends)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the stop strings of a task, greedy unless it asks for sampling."""
        return [self._answer(*request.args) for request in tqdm(requests, disable=disable_tqdm or None)]

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or ()
        texts = copy.copy(self.texts)
        texts.stop = (until,) if isinstance(until, str) else tuple(until)
        count = int(options.get("max_gen_toks", self.max_gen_toks))
        temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
        room = max(self.model.config.longest - count, 1)
        return "".join(texts.stream(texts.encode(context)[-room:], count, Sampling(temperature, seed=0)))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
