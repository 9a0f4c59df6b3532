"""``fastattn chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastattn.cli import device
from fastattn.cli.flags import add_model
from fastattn.cli.sampling import add_sampling, check_positive, sampling_of
from fastattn.errors import DataError

TEXT = """\
Talk to a model that was fine-tuned for chat, or to a Hugging Face model with a chat template. The answer is printed as
it is generated, and the model reads the whole conversation each time. /new forgets it, /exit or Ctrl-D ends.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("chat", help="talk to a model in the terminal", description=TEXT)
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template, instead of the model's own"
    )
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="most tokens of an answer (default 512)")
    add_sampling(parser)
    parser.add_argument("--attention", choices=("fastattn", "eager"), help="instead of what the run used")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.files import read_limited
    from fastattn.lm.load import load_texts
    from fastattn.lm.train import find_model

    check_positive(args, "tokens")
    sampling = sampling_of(args)
    source = find_model(args.checkpoint, best=True)
    given = None if args.chat_template is None else read_limited(args.chat_template)
    texts, template = load_texts(
        source, device.choose(args.device), args.attention, stop=args.stop, chat_template=given
    )
    if template is None:
        todo = "fine-tune it with fastattn finetune --task chat, or give --chat-template FILE"
        raise DataError(f"{source.folder} has no chat template: {todo}.")
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    history = list(start)
    for line in _lines():
        if line == "/new":
            history = list(start)
            continue
        history.append({"role": "user", "content": line})
        try:
            history.append({"role": "assistant", "content": _answer(texts, template, history, args.tokens, sampling)})
        except DataError as error:  # the message is refused, the conversation continues without it
            history.pop()
            print(f"fastattn chat: {error}", file=sys.stderr)
    return 0


def _lines() -> Iterator[str]:
    """The user's messages: lines that are not empty, up to /exit. A terminal shows a prompt and can edit them."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history and the arrow keys
    while True:
        try:
            line = (input("> ") if sys.stdin.isatty() else _next_line()).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _answer(texts: Any, template: Any, history: list[dict[str, str]], tokens: int, sampling: Any) -> str:
    """Print the assistant's next turn as it is generated, and return it."""
    prompt = _fitting_prompt(template, history, texts.model.config.longest)
    pieces = []
    for piece in texts.stream(prompt, tokens, sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    return "".join(pieces)


def _fitting_prompt(template: Any, history: list[dict[str, str]], longest: int) -> list[int]:
    """The prompt of the conversation, without its oldest turns if it exceeds the model's length.

    A quarter of that length is reserved for the answer.
    """
    first = next(number for number, message in enumerate(history) if message["role"] == "user")
    forgotten = 0
    while len(prompt := template.prompt(history)) > longest * 3 // 4 and len(history) > first + 2:
        del history[first : first + 2]  # a question and its answer
        forgotten += 1
    if forgotten:
        print(f"({forgotten} of the oldest turns are forgotten: the model reads {longest} tokens)", file=sys.stderr)
    if len(prompt) >= longest:
        raise DataError(f"The message has {len(prompt)} tokens, and the model reads {longest}: shorten it.")
    return prompt
