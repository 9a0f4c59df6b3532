"""Text: whole characters while streaming, stop strings wherever they are cut, files of prompts and results."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fastattn.errors import DataError, InputError
from fastattn.lm.generate import Sampling, Texts, decode_stream, generate, stream_text
from fastattn.lm.generate.prompts import Results, read_prompts
from fastattn.lm.generate.text import until
from fastattn.lm.models import Decoder, TransformerConfig


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🎉🧵 ok", "a\n\tb\u00a0c"])
def test_streaming_gives_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text).ids
    pieces = list(decode_stream(tokenizer, iter([0, *ids, 1]), special=(0, 1)))
    assert "".join(pieces) == text
    assert len(pieces) == len(text)  # one piece for each character, though bytes are tokens here
    assert "\ufffd" not in "".join(pieces)


TRAINED_ON = ["the cat sat on the mat, the cat's hat is on the mat. A naïve café: one, two"] * 4


def unigram():
    """As T5's and many multilingual ones."""
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(TRAINED_ON, trainer)
    return found


def with_byte_fallback():
    """As Llama 2's: no pre-tokenizer, spaces by a normalizer, unknown characters as bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    pieces = ["▁", *"thecasonmpirduv,.':T", "th", "▁th", "▁the", "at", "▁c", "▁cat", "on", "▁on"]
    vocabulary |= {piece: 259 + n for n, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("a", "t"), ("▁", "c"), ("▁c", "at"), ("o", "n"), ("▁", "on")]
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return found


def word_piece():
    """As BERT's."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    found.train_from_iterator(TRAINED_ON, trainers.WordPieceTrainer(vocab_size=80, special_tokens=marks))
    return found


FOREIGN = {"unigram": unigram, "byte fallback": with_byte_fallback, "word piece": word_piece}


@pytest.mark.parametrize("text", ["the cat sat on the mat", "the cat's hat, one.", "two  mats", "a naïve café 🎉 on"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_any_tokenizer_streams_what_it_decodes(kind, text):
    tokenizer = FOREIGN[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    pieces = list(decode_stream(tokenizer, iter(ids)))
    assert "".join(pieces) == whole and len(pieces) > 2
    if kind == "byte fallback":
        assert whole == text  # emoji and all, from bytes
    for cut in range(1, len(ids)):  # in the middle of words and of characters, too
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            assert before + "".join(decode_stream(tokenizer, ids[cut:], after=ids[:cut])) == whole


@pytest.mark.parametrize("kind", FOREIGN)
def test_special_tokens_are_no_text_and_take_no_space_away(kind):
    tokenizer = FOREIGN[kind]()
    the, cat = (tokenizer.encode(word, add_special_tokens=False).ids for word in ("the", "cat"))
    end = tokenizer.token_to_id("[SEP]" if kind == "word piece" else "</s>")
    assert "".join(decode_stream(tokenizer, [*the, end, *cat, end], special=(end,))) == "the cat"


def test_bytes_that_are_no_character_after_bytes_that_are_one():
    tokenizer = with_byte_fallback()
    f, first, second, the = 3 + 0x66, 3 + 0xC3, 3 + 0xA9, tokenizer.token_to_id("▁the")
    assert "".join(decode_stream(tokenizer, [f, first, second])) == "fé"
    assert "".join(decode_stream(tokenizer, [f, first, the])) == "f\ufffd the"
    assert "".join(decode_stream(tokenizer, [f, first])) == "f\ufffd"


def test_a_decoder_that_takes_text_back_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("xy", "z")])
    with pytest.raises(DataError, match="The tokenizer's decoder turned 'x' into 'z' as more tokens came"):
        list(decode_stream(tokenizer, [0, 1]))


def test_texts_of_a_model_with_another_tokenizer():
    tokenizer = unigram()
    torch.manual_seed(0)
    model = Decoder(
        TransformerConfig(vocab_size=tokenizer.get_vocab_size(), width=32, layers=1, heads=2, max_length=64)
    )
    texts = Texts(model, tokenizer, start=None, end="</s>")
    ids = tokenizer.encode("the cat", add_special_tokens=False).ids
    assert texts.encode("the cat") == ids and texts.encode("") == [1]
    chosen = [int(t) for t in generate(model, [ids], 12, Sampling(0), stop_token=1)]
    whole = tokenizer.decode([*ids, *chosen])
    assert "the cat" + "".join(texts.stream("the cat", 12, Sampling(0))) == whole
    assert [done.text for done in texts.complete(["the cat"], 12, Sampling(0))] == [whole.removeprefix("the cat")]
    assert "the cat" + texts.best("the cat", 12, beams=1) == whole


def test_bytes_that_are_no_text_do_not_stop_the_stream(tokenizer):
    emoji = tokenizer.encode("🎉").ids
    ids = [*emoji[:2], *tokenizer.encode("x").ids, *emoji[:3]]
    assert "".join(decode_stream(tokenizer, iter(ids))) == "\ufffdx\ufffd"


def test_every_byte_has_its_character(tokenizer):
    data = bytes(range(256)).decode("latin-1")
    assert "".join(decode_stream(tokenizer, iter(tokenizer.encode(data).ids))) == data


def test_stream_text_continues_a_prompt(model, tokenizer):
    pieces = list(stream_text(model, tokenizer, "ab", 12, Sampling(0)))
    ids = [0, *tokenizer.encode("ab").ids]
    chosen = [int(t) for t in generate(model, [ids], 12, Sampling(0), stop_token=1)]
    assert "".join(pieces) == tokenizer.decode([token for token in chosen if token > 1])
    assert list(stream_text(model, tokenizer, "", 3, Sampling(9.0, seed=4))) != []


@pytest.mark.parametrize("size", [1, 2, 3, 99])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aababaab", ["abaa"], "aab"),
        ("aaab", ["aab"], "a"),
        ("no end", ["ends"], "no end"),
        ("stop", ["stop"], ""),
        ("x\n\ny", ["\n\n"], "x"),
        ("free", [], "free"),
    ],
)
def test_stop_strings_however_the_text_is_cut(text, stop, expected, size):
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert "".join(until(iter(pieces), stop)) == expected


def test_what_cannot_become_a_stop_string_is_not_held_back():
    assert list(until(iter(["ab", "cd", "e\n", "f"]), ["\n\n"])) == ["ab", "cd", "e", "\nf"]


def test_stop_strings_end_generation(model, tokenizer):
    text = "".join(stream_text(model, tokenizer, "ab", 30, Sampling(1.0, seed=2)))
    stop = text[10:12]
    expected = text[: text.index(stop)]
    assert "".join(stream_text(model, tokenizer, "ab", 30, Sampling(1.0, seed=2), stop=[stop])) == expected
    texts = Texts(model, tokenizer, stop=[stop])
    done = next(texts.complete(["ab"], 30, Sampling(1.0, seed=2)))
    assert done.text == expected and done.reason == "stop" and done.tokens < 30


def test_all_ways_agree(model, tokenizer):
    texts, prompts = Texts(model, tokenizer), ["ab", "", "xyz"]
    streamed = ["".join(texts.stream(prompt, 8, Sampling(0))) for prompt in prompts]
    assert [done.text for done in sorted(texts.complete(prompts, 8, Sampling(0)), key=lambda d: d.index)] == streamed
    assert [texts.best(prompt, 8, beams=1) for prompt in prompts] == streamed


def test_an_encoder_decoder_answers(encoder_decoder, tokenizer):
    texts = Texts(encoder_decoder, tokenizer)
    answer = "".join(texts.stream("ab", 8, Sampling(0)))
    source = [[*texts.encode("ab"), 1]]  # whole, as in training
    chosen = generate(encoder_decoder, [[0]], 8, Sampling(0), source=source, stop_token=1)
    assert answer == texts.decode([int(token) for token in chosen])
    assert answer == texts.best("ab", 8, beams=1)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=5)], ids=["greedy", "drawn"])
def test_an_encoder_decoder_answers_many_as_each_alone(encoder_decoder, tokenizer, sampling):
    prompts, rows = ["sing", "a longer one", "x", "dance", "and"], [0, 1, 2, 5, 6]
    texts = Texts(encoder_decoder, tokenizer, stop=["\x00"])
    found = list(texts.complete(prompts, 9, sampling, rows=rows, batch=2))
    assert [done.index for done in found] == [0, 1, 2, 3, 4]
    for done, prompt, row in zip(found, prompts, rows, strict=True):
        seed = None if sampling.seed is None else sampling.seed + row
        assert done.text == "".join(texts.stream(prompt, 9, dataclasses.replace(sampling, seed=seed)))
        assert done.reason in ("stop", "length") and 0 < done.tokens <= 9
    assert {done.tokens for done in found if done.reason == "length"} <= {9}
    with pytest.raises(InputError, match="batch: got 0"):
        list(texts.complete(prompts, 9, batch=0))


def test_refusals(model, tokenizer):
    with pytest.raises(InputError, match="stop: got"):
        Texts(model, tokenizer, stop=["a", ""])
    with pytest.raises(InputError, match="start: got '<s>'"):
        Texts(model, tokenizer, start="<s>")


# --- files ----------------------------------------------------------------------------------------------------------


def test_prompts_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "a.txt")] == [("1", "one"), ("3", " two ")]
    (tmp_path / "b.jsonl").write_text('{"prompt": "x\\ny"}\n{"prompt": "z", "id": 7}\n')
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "b.jsonl")] == [("1", "x\ny"), ("7", "z")]
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "q.md").write_text("one\ntwo")
    (folder / ".hidden").write_text("no")
    assert [(p.id, p.text) for p in read_prompts(folder)] == [("deep/q.md", "one\ntwo")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\n \n", "no prompts"),
        ("a.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"pro', r"a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}', r'a.jsonl:1: no "prompt"'),
        ("a.jsonl", b'["x"]', r'a.jsonl:1: no "prompt"'),
        ("a.jsonl", b'{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}', "two prompts have the id '1'"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_results_are_resumed_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, {"seed": 1}).writing() as add:
        add({"id": "a", "text": "é\n"})
        add({"id": "b", "text": "x"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])  # killed while writing
    again = Results(path, {"seed": 1})
    assert again.done == {"a"}
    with again.writing() as add:
        add({"id": "b", "text": "x"})
    assert path.read_bytes() == whole
    assert [json.loads(line).get("id") for line in path.read_text().splitlines()] == [None, "a", "b"]


def test_results_of_other_settings_or_another_file_are_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    Results(path, {"seed": 1, "tokens": 5})
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        Results(path, {"seed": 2, "tokens": 5})
    path.write_text("my notes\n")
    with pytest.raises(DataError, match="no file of results"):
        Results(path, {"seed": 1})
    assert path.read_text() == "my notes\n"
