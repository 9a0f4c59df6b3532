"""Logits, losses and generated tokens agree with transformers, whose random weights are converted; folders survive."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn.lm.models import Encoder, SequenceClassifier, from_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32,
}  # fmt: skip
MODERNBERT = BERT | {
    "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
}  # fmt: skip

MODELS = {
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    ),
    "gpt2-untied": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=4, n_inner=40,
            activation_function="relu", tie_word_embeddings=False,
        )
    ),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    "llama-tied-scaled": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_parameters=SCALED)
    ),
    "llama-wide-heads-bias": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(**LLAMA, head_dim=16, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5)
    ),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**BERT)),
    "bert-backbone": lambda t: t.BertModel(t.BertConfig(**BERT)),
    "bert-classifier": lambda t: t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3)),
    "bert-tokens": lambda t: t.BertForTokenClassification(t.BertConfig(**BERT, num_labels=5)),
    "bert-spans": lambda t: t.BertForQuestionAnswering(t.BertConfig(**BERT, hidden_act="gelu_new")),
    "t5": lambda t: t.T5ForConditionalGeneration(t.T5Config(**T5)),
    "t5-1.1": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(**T5, num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA)),
    "qwen2-windows": lambda t: t.Qwen2ForCausalLM(
        t.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA, head_dim=12, tie_word_embeddings=True)),
    "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=5)),
    "mistral-without-window": lambda t: t.MistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=None)),
    "phi3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**LLAMA, pad_token_id=0)),
    "gemma2": lambda t: t.Gemma2ForCausalLM(
        t.Gemma2Config(**LLAMA, head_dim=12, sliding_window=5, query_pre_attn_scalar=20, attn_logit_softcapping=3.0)
    ),
    "gemma3": lambda t: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**LLAMA | {"num_hidden_layers": 7}, head_dim=8, sliding_window=5)
    ),
    "roberta": lambda t: t.RobertaForMaskedLM(t.RobertaConfig(**BERT, type_vocab_size=2)),
    "roberta-backbone": lambda t: t.RobertaModel(t.RobertaConfig(**BERT)),
    "roberta-classifier": lambda t: t.RobertaForSequenceClassification(t.RobertaConfig(**BERT, num_labels=3)),
    "distilbert": lambda t: t.DistilBertForMaskedLM(t.DistilBertConfig(**DISTILBERT)),
    "distilbert-classifier": lambda t: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(**DISTILBERT, num_labels=3)
    ),
    "distilbert-tokens": lambda t: t.DistilBertForTokenClassification(t.DistilBertConfig(**DISTILBERT, num_labels=5)),
    "modernbert": lambda t: t.ModernBertForMaskedLM(t.ModernBertConfig(**MODERNBERT)),
    "modernbert-backbone": lambda t: t.ModernBertModel(t.ModernBertConfig(**MODERNBERT)),
    "modernbert-classifier": lambda t: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**MODERNBERT, num_labels=3, classifier_pooling="mean")
    ),
    "marian": lambda t: t.MarianMTModel(
        t.MarianConfig(**BART, pad_token_id=0, decoder_start_token_id=0, activation_function="relu")
    ),
    "bart": lambda t: t.BartForConditionalGeneration(t.BartConfig(**BART, scale_embedding=True)),
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**VIT)),
    "vit-backbone": lambda t: t.ViTModel(t.ViTConfig(**VIT)),
}  # fmt: skip
CAUSAL = [name for name in MODELS if name.startswith(("gpt2", "llama", "qwen", "mistral", "phi", "gemma"))]
BERTS = [name for name in MODELS if "bert" in name]
SEQ2SEQ = [name for name in MODELS if name.startswith(("t5", "bart", "marian"))]


def assert_close(mine, other):
    """Within 1e-5 of the largest number."""
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


def randomise(model):
    """Weights large enough that every part of the model matters, norms and biases included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda x: x.requires_grad, model.parameters()):  # Marian's positions are fixed
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For each name the model of transformers, the same as ours, and the folder between them; each made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("theirs") / name
            theirs = randomise(MODELS[name](transformers))
            theirs.save_pretrained(folder)
            if name == "gemma2":
                theirs.set_attn_implementation("eager")  # the other leaves out its cap of the scores
            made[name] = theirs, from_pretrained(folder), folder
        return made[name]

    return make


def rows(batch=3, length=14, lengths=(14, 9, 4), side="right"):
    torch.manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (batch, length))  # RoBERTa takes token 1 for padding without asking the mask
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return tokens, mask if side == "right" else mask.flip(1)


def positions_of(mask):
    return (mask.long().cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_decoders(pairs, name, side):
    theirs, ours, _ = pairs(name)
    tokens, mask = rows(side=side)
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions_of(mask)).logits
    assert_close(ours(tokens, mask=mask)[mask], expected[mask])
    assert expected[mask].std() > 0.1  # not a comparison of zeros


@pytest.mark.parametrize("name", BERTS)
@torch.no_grad()
def test_berts(pairs, name):
    theirs, ours, _ = pairs(name)
    tokens, mask = rows()
    tokens[~mask] = 1
    types = torch.arange(14).expand(3, -1) // 5 % 2
    has_types = getattr(theirs.config, "type_vocab_size", 1) > 1
    found = theirs(tokens, attention_mask=mask.long(), **{"token_type_ids": types} if has_types else {})
    out = ours(tokens, mask=mask, token_types=types if has_types else None)
    if name == "bert-spans":
        for mine, other in zip(out, (found.start_logits, found.end_logits), strict=True):
            assert_close(mine[mask], other[mask])
            assert (mine[~mask] == -torch.inf).all()
        return
    expected = found.last_hidden_state if "backbone" in name else found.logits
    of_tokens = out.dim() == 3
    assert_close(out[mask] if of_tokens else out, expected[mask] if of_tokens else expected)
    if name == "bert-backbone":
        pooled = SequenceClassifier(ours, 2)
        pooled.output = torch.nn.Identity()
        assert_close(pooled.eval()(tokens, mask=mask, token_types=types), found.pooler_output)


@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_encoder_decoders(pairs, name):
    theirs, ours, _ = pairs(name)
    source, source_mask = rows()
    target, target_mask = rows(length=11, lengths=(11, 7, 11))
    expected = theirs(
        input_ids=source, attention_mask=source_mask.long(), decoder_input_ids=target,
        decoder_attention_mask=target_mask.long(),
    ).logits  # fmt: skip
    out = ours(source, target, source_mask=source_mask, target_mask=target_mask)
    assert_close(out[target_mask], expected[target_mask])
    if name in ("bart", "marian"):
        return
    long = torch.randint(VOCABULARY, (1, 200))  # into the buckets of far distances
    assert_close(ours(long, target[:1]), theirs(input_ids=long, decoder_input_ids=target[:1]).logits)


@pytest.mark.parametrize("name", ["vit", "vit-backbone"])
@torch.no_grad()
def test_images(pairs, name):
    theirs, ours, _ = pairs(name)
    images = torch.randn(2, 3, 12, 12)
    found = theirs(images)
    expected = found.logits if name == "vit" else found.last_hidden_state
    assert_close(ours(images), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_gradients(pairs, name):
    theirs, ours, _ = pairs(name)
    tokens, _ = rows()
    labels = tokens.roll(-1, 1)
    if name == "t5":
        loss = torch.nn.functional.cross_entropy(ours(tokens, tokens).flatten(0, 1), labels.flatten())
        expected = theirs(input_ids=tokens, decoder_input_ids=tokens, labels=labels).loss
    else:
        loss = torch.nn.functional.cross_entropy(ours(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        expected = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    embedding = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "t5": "shared"}[name]
    assert_close(ours.embedding.weight.grad, theirs.get_submodule(embedding).weight.grad)
    if name == "t5":
        bias = theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
        assert_close(ours.decoder.relative.embedding.weight.grad, bias.weight.grad)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_folder_comes_back_as_it_was(pairs, name, tmp_path):
    theirs, ours, folder = pairs(name)
    save_pretrained(ours, tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    settings = [json.loads((x / "config.json").read_text()) for x in (folder, tmp_path / "back")]
    assert settings[0]["architectures"] == settings[1]["architectures"]
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    # and transformers takes it for the same model
    attention = theirs.config._attn_implementation
    back, report = type(theirs).from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation=attention
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = torch.randn(1, 3, 12, 12) if name.startswith("vit") else rows()[0]
    more = {"decoder_input_ids": inputs} if name in SEQ2SEQ else {}
    for mine, other in zip(back.eval()(inputs, **more).to_tuple(), theirs(inputs, **more).to_tuple(), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, other)


def test_bfloat16_stays_bfloat16(tmp_path):
    theirs = MODELS["llama"](transformers).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    save_pretrained(ours, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_read_and_written(pairs, tmp_path):
    theirs, ours, _ = pairs("llama")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    again = from_pretrained(tmp_path / "parts")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    save_pretrained(again, tmp_path / "back", max_shard_bytes=10_000)
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 1 and all(path.stat().st_size < 13_000 for path in files)
    back = type(theirs).from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(x, back[name]) for name, x in theirs.state_dict().items())


@torch.no_grad()
def test_t5_1_1_as_it_was_published(pairs, tmp_path):
    """With an output layer of its own and no scale before it, which its config says in the word for tied embeddings."""
    _, _, folder = pairs("t5-1.1")
    published = tmp_path / "published"
    published.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": torch.randn(VOCABULARY, 32)}, published / "model.safetensors", {"format": "pt"}
    )
    fields = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    fields.pop("scale_decoder_outputs")
    (published / "config.json").write_text(json.dumps(fields))
    ours = from_pretrained(published)
    assert not ours.config.tie_embeddings and ours.config.logit_scale == 1.0
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(published).eval()
    tokens, _ = rows()
    assert_close(ours(tokens, tokens), theirs(input_ids=tokens, decoder_input_ids=tokens).logits)
    save_pretrained(ours, tmp_path / "back")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(
        back(input_ids=tokens, decoder_input_ids=tokens).logits,
        theirs(input_ids=tokens, decoder_input_ids=tokens).logits,
    )


def rewritten(folder, to, rename, more=None, fields=None):
    """A copy of a folder with other names of tensors, more tensors, and changed settings."""
    to.mkdir()
    tensors = {rename(name): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors | (more or {}), to / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | (fields or {})
    (to / "config.json").write_text(json.dumps(settings))
    return to


def test_old_files_are_read(pairs, tmp_path):
    """As the first published ones are: without prefix, with masks, old names of norms, copies of tied weights."""
    _, gpt2, folder = pairs("gpt2")
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(2)}
    old = rewritten(folder, tmp_path / "gpt2", lambda name: name.removeprefix("transformer."), mask)
    assert all(torch.equal(x, from_pretrained(old).state_dict()[name]) for name, x in gpt2.state_dict().items())

    _, bert, folder = pairs("bert")
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name):
        for new, before in norms.items():
            name = name.replace(new, before)
        return name

    pooler = {"bert.pooler.dense.weight": torch.randn(32, 32), "bert.pooler.dense.bias": torch.randn(32)}
    next_sentence = {"cls.seq_relationship.weight": torch.randn(2, 32), "cls.seq_relationship.bias": torch.randn(2)}
    fields = {"architectures": ["BertForPreTraining"]}
    old = rewritten(folder, tmp_path / "bert", rename, pooler | next_sentence, fields)
    found = from_pretrained(old)
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in bert.state_dict().items())
    assert torch.equal(found.backbone.pooler.weight, pooler["bert.pooler.dense.weight"])
    assert not found.backbone.pooler.weight.requires_grad  # it takes no part in this head
    backbone = from_pretrained(old, backbone_only=True)
    assert type(backbone) is Encoder and backbone.pooler.weight.requires_grad

    _, llama, folder = pairs("llama")
    fields = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
    old = rewritten(folder, tmp_path / "llama", lambda name: name, fields=fields)
    assert from_pretrained(old).config == llama.config

    _, tied, folder = pairs("llama-tied-scaled")
    copy = {"lm_head.weight": tied.embedding.weight.detach().clone()}
    rope = {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": SCALED}
    old = rewritten(folder, tmp_path / "tied", lambda name: name, copy, rope)
    assert from_pretrained(old).config == tied.config
