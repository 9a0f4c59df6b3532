"""Tiktoken files: the ids of the vocabulary they were written from; what is refused."""

import base64

import pytest

from fastattn.errors import DataError
from fastattn.lm.train import tiktoken
from fastattn.lm.train.prepare import PrepareConfig
from fastattn.lm.train.special_tokens import SpecialTokens
from fastattn.lm.train.tokens import START, train_tokenizer

TEXT = "the naïve theory of the other weather, therefore 日本語 don't \n\n  123456 HTTPServer "


@pytest.fixture
def learned():
    return train_tokenizer([TEXT * 3, "then there, the other " * 9], 330)


@pytest.fixture
def path(learned, tmp_path):
    """The vocabulary without its two special tokens, as a tiktoken file."""
    byte_of = {character: byte for byte, character in enumerate(tiktoken._spelling())}
    vocab = {token: rank - 2 for token, rank in learned.get_vocab().items() if rank >= 2}
    rows = [(bytes(byte_of[x] for x in token), rank) for token, rank in sorted(vocab.items(), key=lambda item: item[1])]
    path = tmp_path / "our.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in rows))
    return path


def test_it_encodes_as_the_vocabulary_it_was_written_from(learned, path, monkeypatch):
    count = learned.get_vocab_size() - 2
    monkeypatch.setitem(tiktoken._PATTERNS, count, tiktoken._GPT2)  # which is that of our own
    tokenizer = PrepareConfig(tokenizer=path).load_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert ids == [token - 2 for token in learned.encode(TEXT).ids] and len(ids) < 0.7 * len(TEXT.encode())
    assert SpecialTokens.of(tokenizer).end == count


@pytest.mark.parametrize("pattern", [tiktoken._GPT2, tiktoken._CL100K, tiktoken._QWEN, tiktoken._O200K])
def test_every_text_decodes_to_itself(path, pattern, monkeypatch):
    monkeypatch.setitem(tiktoken._PATTERNS, len(path.read_text().splitlines()), pattern)
    tokenizer = tiktoken.load_tiktoken(path)
    assert tokenizer.decode(tokenizer.encode(TEXT + START).ids) == TEXT + START


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello\n", "not tiktoken's 'token in base64, space, rank'"),
        ("YQ== 0\n?? 1\n", "line 2: not tiktoken's"),
        ("YQ== 0\nYg== 2\n", r"should have the ranks 0 \.\.\. 1"),
        ("YQ== 0\n", "no token for the byte 0"),
    ],
)
def test_refusals(tmp_path, content, words):
    path = tmp_path / "tokenizer.model"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        PrepareConfig(tokenizer=path).load_tokenizer()
