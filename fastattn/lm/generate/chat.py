"""Conversations as tokens: Jinja templates in the form in which Hugging Face stores them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from fastattn.errors import DataError

Message = Mapping[str, Any]

# ChatML with the tokenizer's own marks of a text's beginning and end, so that a model needs no further tokens.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\\n' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)


class _Generation(Extension):
    """``{% generation %}`` around the assistant's text, which some templates have and which prints nothing itself."""

    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template and the tokenizer that reads what it renders, the special tokens in it included.

    Args:
        source: the template; it may use ``messages``, ``add_generation_prompt``, ``bos_token`` and ``eos_token``. It is
            rendered in Jinja's sandbox, as it may come from anyone.
        tokenizer: of the model.
        begin: the token that begins a text; None if nothing does.
        end: the token that ends a text.

    Raises:
        DataError: the template is not valid Jinja.

    Example:
        >>> from fastattn.lm.generate import ChatTemplate
        >>> from fastattn.lm.train.tokens import train_tokenizer
        >>> template = ChatTemplate(None, train_tokenizer(["hello"], 270), begin="<|start|>", end="<|end|>")
        >>> template.render([{"role": "user", "content": "hello"}], is_prompt=True)
        '<|start|>user\\nhello<|end|><|start|>assistant\\n'
    """

    def __init__(self, source: str | None, tokenizer: Tokenizer, *, begin: str | None, end: str) -> None:
        self.source = source or DEFAULT_TEMPLATE
        # a copy, as the models' own tokenizers read special tokens in a text as ordinary characters
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = False
        self._special = {
            number: token.content
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._names = {"bos_token": begin or "", "eos_token": end}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        try:
            self._template = environment.from_string(self.source)
        except TemplateError as error:
            raise DataError(f"The chat template is not valid Jinja: {error}.") from error
        self.stops = self._find_stops()

    def render(self, messages: Sequence[Message], *, is_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: dicts with "role" ("system", "user", "assistant") and "content".
            is_prompt: end with what precedes the assistant's next turn.

        Raises:
            DataError: the template refuses the messages, or one contains a special token, which would end its turn.
        """
        for message in messages:
            content = message.get("content")
            found = [x for x in self._special.values() if isinstance(content, str) and x in content]
            if found:
                todo = "Remove it: the model would read it as the end of a turn."
                raise DataError(f"A message contains the special token {found[0]!r}. {todo}")
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=is_prompt, **self._names)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(f"The chat template refuses the conversation: {error}.") from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that the assistant's next turn follows."""
        return self._tokenizer.encode(self.render(messages, is_prompt=True), add_special_tokens=False).ids

    def learned(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which of them the assistant wrote, the end of its turns included.

        Raises:
            DataError: the template changes earlier turns when later ones follow, so that they cannot be told apart.
        """
        text = self.render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = self.render(messages[:number], is_prompt=True)
                whole = self.render(messages[: number + 1]).rstrip()
                if not text.startswith(whole) or not whole.startswith(begin.rstrip()):
                    todo = "Split the conversation, or give another template with --chat-template."
                    raise DataError(f"The chat template renders turn {number + 1} otherwise once others follow. {todo}")
                spans.append((min(len(begin), len(whole)), len(whole)))
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [any(a <= first < b for a, b in spans) for first, _ in encoding.offsets]

    def _find_stops(self) -> tuple[int, ...]:
        """The special tokens that end the assistant's turn, found by rendering one."""
        probe = "answer"
        try:
            text = self.render([{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}])
        except DataError:
            return ()
        ids = self._tokenizer.encode(text.rpartition(probe)[2].strip(), add_special_tokens=False).ids
        return tuple(ids[:1]) if ids and ids[0] in self._special else ()


def checked_messages(place: str, value: Any) -> list[dict[str, str]]:
    """The messages of a conversation as "role" and "content", from their usual forms.

    Args:
        place: for the error.
        value: dicts with "role" and "content" (a text, or parts with "text"), or ShareGPT's "from" and "value".

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: a conversation is a list of messages, at least one.")
    return [_checked(f"{place}, message {number}", message) for number, message in enumerate(value, 1)]


_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's


def _checked(place: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f'{place}: it must be an object like {{"role": "user", "content": "Hello"}}.')
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f'{place}: "role" and "content" must be texts, not {role!r} and {content!r}.')
    return {"role": _ROLES.get(role, role), "content": content}


def template_of(fields: Mapping[str, Any]) -> str | None:
    """The template in the content of ``tokenizer_config.json``: a text, or the default of several."""
    found = fields.get("chat_template")
    if isinstance(found, list):
        found = next((x.get("template") for x in found if isinstance(x, Mapping) and x.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def token_named(fields: Mapping[str, Any], name: str) -> str | None:
    """A special token in ``tokenizer_config.json``, which is a text or an object with one as "content"."""
    found = fields.get(name)
    found = found.get("content") if isinstance(found, Mapping) else found
    return found if isinstance(found, str) and re.search(r"\S", found) else None


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)
