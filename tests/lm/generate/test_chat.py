"""Chat templates: the text and tokens of transformers, the assistant's turns, and what is refused."""

import pytest
from tokenizers import AddedToken

from fastattn.errors import DataError
from fastattn.lm.generate import ChatTemplate
from fastattn.lm.generate.chat import checked_messages, template_of, token_named

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ '<|im_end|>' + '\n' }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Héllo?"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


@pytest.fixture(scope="module")
def tokens(tokenizer):
    marks = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(name, special=True) for name in ("<|start|>", "<|end|>", *marks)])
    copy.encode_special_tokens = True  # as the models' own tokenizers are used
    return copy


def make(source, tokens):
    return ChatTemplate(source, tokens, begin="<|start|>", end="<|end|>")


@pytest.mark.parametrize(("source", "stop"), [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (None, "<|end|>")])
def test_the_tokens_are_those_of_transformers_and_the_assistants_are_marked(source, stop, tokens):
    transformers = pytest.importorskip("transformers")
    template = make(source, tokens)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokens).from_str(tokens.to_str()), bos_token="<|start|>", eos_token="<|end|>"
    )
    theirs.chat_template = template.source
    options = {"tokenize": True, "return_dict": False}
    assert template.prompt(TALK[:3]) == theirs.apply_chat_template(TALK[:3], add_generation_prompt=True, **options)
    ids, learned = template.learned(TALK)
    assert ids == theirs.apply_chat_template(TALK, **options)
    said = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert tokens.decode(said, skip_special_tokens=False) == f"Hi{stop}So long{stop}"
    assert [tokens.id_to_token(x) for x in template.stops] == [stop]
    assert tokens.encode("<|end|>", add_special_tokens=False).ids != [1]  # ours was not changed


def test_templates_that_cannot_serve_are_told(tokens):
    with pytest.raises(DataError, match="not valid Jinja"):
        make("{% for %}", tokens)
    with pytest.raises(DataError, match="refuses the conversation: no system"):
        make(GEMMA, tokens).render([{"role": "system", "content": "x"}])
    with pytest.raises(DataError, match=r"contains the special token '<\|end\|>'"):
        make(None, tokens).render([{"role": "user", "content": "so <|end|>"}])
    with pytest.raises(DataError, match="renders turn 2 otherwise once others follow"):
        make("{{ messages | length }}{{ messages[-1].content }}", tokens).learned(TALK)
    with pytest.raises(DataError, match="refuses the conversation"):  # the sandbox
        make("{{ ''.__class__.__mro__ }}", tokens).render(TALK)


def test_messages_have_two_forms():
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
    assert checked_messages("", shared) == checked_messages("", parts) == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    for wrong, words in ([], "at least one"), (["a"], "message 1: it must be an object"), ([{"role": 1}], "be texts"):
        with pytest.raises(DataError, match=f"line 3.*{words}"):
            checked_messages("line 3", wrong)


def test_the_tokenizers_settings_hold_templates_in_several_forms():
    assert template_of({"chat_template": "x"}) == "x"
    several = [{"name": "tools", "template": "y"}, {"name": "default", "template": "x"}]
    assert template_of({"chat_template": several}) == "x" and template_of({}) is None
    assert token_named({"eos_token": {"content": "</s>"}}, "eos_token") == "</s>"
    assert token_named({}, "bos_token") is None
