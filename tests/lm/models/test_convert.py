"""Wrong folders and models without a Hugging Face equivalent are refused in a sentence; writing is all or nothing."""

import builtins
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from fastattn.errors import DataError, InputError
from fastattn.lm.models import (
    Decoder,
    Encoder,
    MaskedLM,
    SequenceClassifier,
    SpanExtractor,
    TokenClassifier,
    TransformerConfig,
    from_pretrained,
    make_model,
    preset,
    save_pretrained,
)

LLAMA = TransformerConfig(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, max_length=16)
GPT2 = dataclasses.replace(preset("gpt2-124m", 50), width=32, layers=2, heads=4, max_length=16)
BERT = dataclasses.replace(preset("bert-tiny", 50), width=32, layers=1, max_length=16)
T5 = dataclasses.replace(preset("t5-small", 50), width=32, layers=1, heads=2, logit_scale=32**-0.5)
SWIGLU = dataclasses.replace(preset("seq2seq-tiny", 50), activation="swiglu")
VIT = dataclasses.replace(preset("vit-tiny"), width=32, layers=1, heads=2, image_size=8, patch_size=4)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(Decoder(LLAMA), tmp_path / "llama")
    return tmp_path / "llama"


def change(folder, **fields):
    """Change settings of ``config.json``; None removes one."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def change_tensors(folder, **tensors):
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): x for name, x in tensors.items()}
    save_file({name: x for name, x in found.items() if x is not None}, path)


def test_a_model_comes_back_ready_to_train(folder):
    again = from_pretrained(folder, attention="eager")
    assert not again.training and again.config.attention == "eager"
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    "head",
    [
        lambda: MaskedLM(Encoder(BERT)),
        lambda: SequenceClassifier(Encoder(dataclasses.replace(BERT, pooler=True)), 3, labels=("a", "b", "c")),
        lambda: TokenClassifier(Encoder(BERT), 2, labels=("O", "NAME")),
        lambda: SpanExtractor(Encoder(BERT)),
        lambda: SequenceClassifier(make_model(VIT), 4, labels=("n", "e", "s", "w")),
    ],
)
def test_heads_come_back_with_their_labels(head, tmp_path):
    model = head()
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    assert getattr(again, "labels", None) == getattr(model, "labels", None)
    backbone = from_pretrained(tmp_path / "model", backbone_only=True)
    assert type(backbone) is type(model.backbone)


def test_a_tokenizer_and_special_tokens_go_along(tmp_path):
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"<pad>": 0, "word": 1}, unk_token="<pad>"))
    save_pretrained(make_model(T5), tmp_path / "t5", tokenizer=tokenizer, special_tokens={"pad": 0, "decoder_start": 0})
    settings = json.loads((tmp_path / "t5" / "config.json").read_text())
    assert (settings["pad_token_id"], settings["decoder_start_token_id"], settings["eos_token_id"]) == (0, 0, None)
    assert Tokenizer.from_file(str(tmp_path / "t5" / "tokenizer.json")).encode("word").ids == [1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: change(f, model_type="mamba"),
            "model of type 'mamba'; fastattn has gpt2, bert, llama, qwen2",
        ),
        (lambda f: change(f, hidden_size=None), "config.json lacks 'hidden_size'"),
        (lambda f: change(f, hidden_act="relu"), "hidden_act is 'relu' in config.json, and fastattn has only 'silu'"),
        (lambda f: change(f, rope_parameters={"rope_type": "yarn"}), "rotary scaling is 'yarn'"),
        (lambda f: change(f, num_attention_heads=5), "kv_heads: got 2; allowed: a divisor of heads 5"),
        (lambda f: change(f, vocab_size=51), "model.embed_tokens.weight has the shape (50, 32), and config.json asks"),
        (lambda f: change(f, tie_word_embeddings=False), "lacks the tensors lm_head.weight"),
        (lambda f: change_tensors(f, model__norm__weight=None), "lacks the tensors model.norm.weight"),
        (
            lambda f: change_tensors(f, score__weight=torch.ones(2, 32)),
            "beside those of the model, the tensors score.w",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "truncated or not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "does not hold the settings"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_bad_folders_are_refused(folder, spoil, words):
    spoil(folder)
    with pytest.raises(DataError) as error:
        from_pretrained(folder)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "part-1.safetensors"}}, "part-1.safetensors is missing"),
        ({"weight_map": {"a": "../other.safetensors"}}, "does not name the files"),
        ({}, "does not name the files"),
    ],
)
def test_bad_indices_are_refused(folder, index, words):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=words):
        from_pretrained(folder)


def test_missing_folders_and_hub_names(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        from_pretrained(tmp_path / "nowhere")
    real = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(DataError, match="give a folder, or install huggingface_hub"):
        from_pretrained("some-one/some-model")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match=r"no folder 'some-one/some-model', and the hub gives no .* \(no network\)"):
        from_pretrained("some-one/some-model")


def test_a_hub_that_can(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert from_pretrained("some-one/some-model").config.width == 32


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Decoder(dataclasses.replace(LLAMA, sinks=True)), "for llama, sinks is True and would be False"),
        (lambda: Decoder(dataclasses.replace(LLAMA, softcap=4.0)), "for llama, softcap is 4.0 and would be None"),
        (lambda: Decoder(dataclasses.replace(GPT2, norm="rms")), "for gpt2, norm is 'rms' and would be 'layer'"),
        (
            lambda: Encoder(dataclasses.replace(BERT, norm_place="before")),
            "norm_place is 'before' and would be 'after'",
        ),
        (lambda: SequenceClassifier(Decoder(LLAMA), 2), "there is no SequenceClassifier"),
        (lambda: SequenceClassifier(Encoder(BERT), 2), "pool would be 'first', with pooler=True"),
        (lambda: make_model(SWIGLU), "for t5gemma, activation is 'swiglu' and would be 'geglu'"),
    ],
)
def test_models_of_no_form_are_refused(model, words, tmp_path):
    with pytest.raises(InputError) as error:
        save_pretrained(model(), tmp_path / "model")
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_writing_is_all_or_nothing(folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="exists already"):
        save_pretrained(Decoder(LLAMA), folder)
    with pytest.raises(InputError, match="special_tokens: got \\['start'\\]"):
        save_pretrained(Decoder(LLAMA), tmp_path / "new", special_tokens={"start": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DataError, match="the disk is full"):
        save_pretrained(Decoder(LLAMA), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
