"""Every preset, made small, is a model of transformers with the same outputs, and comes back bit for bit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn.errors import DataError
from fastattn.lm.models import (
    PRESETS,
    MaskedLM,
    SequenceClassifier,
    SpanExtractor,
    TokenClassifier,
    from_pretrained,
    make_model,
    preset,
    save_pretrained,
)

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
CLASSES = {
    "encoder": "ModernBertModel", "bert": "BertModel", "seq2seq": "T5GemmaForConditionalGeneration",
    "transformer": "MarianMTModel", "t5": "T5ForConditionalGeneration", "vit": "ViTModel",
    "image-text": "PaliGemmaForConditionalGeneration", "gpt2": "GPT2LMHeadModel",
}  # fmt: skip
HEADS = {
    "ModernBertForMaskedLM": MaskedLM,
    "ModernBertForSequenceClassification": lambda encoder: SequenceClassifier(encoder, 3, pool="mean"),
    "ModernBertForTokenClassification": lambda encoder: TokenClassifier(encoder, 3),
    "ModernBertForQuestionAnswering": SpanExtractor,
}


def small(name):
    """The preset in sizes of its own that differ from each other."""
    config = preset(name, 0 if name.startswith("vit") else VOCABULARY)
    assert config.embedding_scale in (1, config.width**0.5) and config.logit_scale in (1, config.width**-0.5)
    sizes = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 48, "max_length": 32}
    sizes |= {"kv_heads": 1} if config.kv_heads else {}
    sizes |= {"vision_layers": 1} if config.kind == "image-text" else {}
    sizes |= {"decoder_layers": 3} if config.kind == "encoder-decoder" else {}
    sizes |= {"image_size": 8, "patch_size": 4} if config.has_images else {}
    sizes |= {"embedding_scale": 32**0.5} if config.embedding_scale != 1 else {}
    sizes |= {"logit_scale": 32**-0.5} if config.logit_scale != 1 else {}
    return dataclasses.replace(config, **sizes)


@torch.no_grad()
def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.3)
    return model.eval()


def there_and_back(model, folder):
    """The model of transformers; ours that was read again has the same tensors."""
    save_pretrained(model, folder)
    again = from_pretrained(folder).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"] and {name.split(".")[0] for name in report["missing_keys"]} <= {"pooler"}
    return theirs.eval()


def outputs(ours, theirs, config):
    """Of both, on the same random input."""
    tokens = torch.randint(2, VOCABULARY, (2, 12))
    images = torch.randn(2, config.channels, config.image_size, config.image_size) if config.has_images else None
    if config.kind == "decoder":
        return ours(tokens), theirs(tokens).logits
    if config.kind == "encoder":
        return ours(tokens), theirs(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    if config.kind == "encoder-decoder":
        target = tokens[:, :7]
        return ours(tokens, target), theirs(input_ids=tokens, decoder_input_ids=target).logits
    if config.kind == "vision":
        return ours(images), theirs(images).last_hidden_state
    marks = torch.full((2, config.image_tokens), theirs.config.image_token_id)
    rows = torch.cat([marks, tokens], dim=1)
    is_text = (torch.arange(rows.shape[1]) >= config.image_tokens).long().expand(2, -1)
    found = theirs(rows, pixel_values=images, token_type_ids=is_text, attention_mask=torch.ones_like(rows)).logits
    return ours(tokens, images=images), found[:, config.image_tokens :]


def assert_close(mine, other):
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert other.std() > 0.05  # not a comparison of zeros


@pytest.mark.parametrize("name", {small(name): name for name in PRESETS}.values())  # one of those equal but for sizes
@torch.no_grad()
def test_a_preset_is_a_model_of_transformers(name, tmp_path):
    config = small(name)
    ours = randomised(make_model(config))
    theirs = there_and_back(ours, tmp_path / "model")
    family = name.rpartition("-")[0]
    assert type(theirs).__name__ == CLASSES.get(family, "Qwen3ForCausalLM")
    assert_close(*outputs(ours, theirs, config))


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_heads_of_the_encoders(name, tmp_path):
    ours = randomised(HEADS[name](make_model(small("encoder-tiny"))))
    theirs = there_and_back(ours, tmp_path / "model")
    assert type(theirs).__name__ == name
    tokens, mask = torch.randint(2, VOCABULARY, (2, 12)), torch.arange(12) < torch.tensor([[12], [7]])
    found, out = theirs(tokens, attention_mask=mask.long()), ours(tokens, mask=mask)
    if isinstance(ours, SpanExtractor):
        out, found = torch.stack(out, dim=-1), torch.stack((found.start_logits, found.end_logits), dim=-1)
    else:
        found = found.logits
    assert_close(out[mask] if out.dim() == 3 else out, found[mask] if found.dim() == 3 else found)


def change_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, part, **fields):
    settings = json.loads((folder / "config.json").read_text())
    settings[part] |= fields
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        (
            "seq2seq-tiny",
            lambda folder: change_tensor(folder, "model.encoder.embed_tokens.weight", lambda x: x + 1),
            "embed_tokens.weight differs from model.decoder.embed_tokens.weight, and fastattn has one tensor for both",
        ),
        (
            "seq2seq-tiny",
            lambda folder: change_config(folder, "encoder", intermediate_size=64),
            "The encoder and the decoder of config.json differ",
        ),
        (
            "seq2seq-tiny",
            lambda folder: [
                change_config(folder, side, attn_logit_softcapping=50.0) for side in ("encoder", "decoder")
            ],
            "a cap of the scores or a window, which fastattn lacks",
        ),
        (
            "image-text-tiny",
            lambda folder: change_config(folder, "vision_config", hidden_act="relu", num_attention_heads=4),
            "The ViT of vision_config differs from that of fastattn in heads, activation.",
        ),
        (
            "image-text-tiny",
            lambda folder: change_config(folder, "text_config", model_type="gemma"),
            "model_type is 'gemma' in config.json, and fastattn has only 'qwen3' there.",
        ),
    ],
)
def test_relatives_that_fastattn_lacks_are_refused(name, spoil, words, tmp_path):
    save_pretrained(make_model(small(name)), tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(DataError) as error:
        from_pretrained(tmp_path / "model")
    assert words in str(error.value)
