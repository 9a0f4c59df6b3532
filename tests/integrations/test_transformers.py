"""attn_implementation="fastattn" against "eager" on tiny randomly initialised models: logits, gradients, generation."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

import fastattn  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402

TOLERANCE = 1e-4  # fp32
VOCABULARY = 61
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0,
}  # fmt: skip
T = transformers
GPT2 = T.GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0,
    embd_pdrop=0.0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
BERT = T.BertConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
CAUSAL = {
    "gpt2": (T.GPT2LMHeadModel, GPT2),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**DECODER)),
    "mistral": (T.MistralForCausalLM, T.MistralConfig(**DECODER, sliding_window=4)),
    "gemma2": (
        T.Gemma2ForCausalLM,
        T.Gemma2Config(**DECODER, head_dim=8, sliding_window=4, attn_logit_softcapping=0.05, query_pre_attn_scalar=3),
    ),
    "gpt_oss": (
        T.GptOssForCausalLM,
        T.GptOssConfig(**DECODER, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1),
    ),
}
T5 = T.T5Config(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0, pad_token_id=0,
    eos_token_id=None,
)  # fmt: skip
ENCODER_DECODER = {
    "t5": (T.T5ForConditionalGeneration, T5),
    "bart": (T.BartForConditionalGeneration, T.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
}
VIT = T.ViTConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
)  # fmt: skip
WHISPER = T.WhisperConfig(
    **SEQ2SEQ, num_mel_bins=8, max_source_positions=12, max_target_positions=16, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def build(kind, config, seed=0):
    """The same model twice: (with eager attention, with fastattn). Weights large enough that attention is not even."""
    torch.manual_seed(seed)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager")
    for name, parameter in eager.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    fast = kind._from_config(copy.deepcopy(config), attn_implementation="fastattn")
    fast.load_state_dict(eager.state_dict())
    assert fast.config._attn_implementation == "fastattn"
    return eager.eval(), fast.eval()


def tokens(batch=2, length=9, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, batch=2, length=9, pads=3):
    mask = torch.ones(batch, length, dtype=torch.long)
    if side is not None:
        mask[1, :pads] = 0
        mask = mask.flip(1) if side == "right" else mask
    return mask


def logits_and_gradients(model, where=None, **inputs):
    """Logits at the real tokens, and the gradient of every parameter of a loss on them."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits = logits if where is None else logits[where.bool()]
    (logits - logits.mean(-1, keepdim=True)).pow(3).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(models, where=None, **inputs):
    eager, fast = (logits_and_gradients(model, where, **inputs) for model in models)
    torch.testing.assert_close(fast[0], eager[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert fast[1].keys() == eager[1].keys()
    for name, grad in eager[1].items():
        assert_close_gradients(fast[1][name], grad, name)


def assert_close_gradients(found, expected, name):
    """Relative to the largest element: the loss is a sum, so gradients are as large as it makes them."""
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= TOLERANCE * max(1.0, largest), f"{name}: off by {error:.2e}, the largest is {largest:.2e}"


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_decoders(name, side):
    mask = padding(side)
    assert_same(build(*CAUSAL[name]), where=mask, input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_bert(side):
    mask = padding(side)
    assert_same(build(T.BertForMaskedLM, BERT), where=mask, input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoders(name, side):
    decoder_mask = padding("right" if side else None, length=6, pads=2)
    assert_same(
        build(*ENCODER_DECODER[name]),
        where=decoder_mask,
        input_ids=tokens(),
        attention_mask=padding(side),
        decoder_input_ids=tokens(length=6, seed=1),
        decoder_attention_mask=decoder_mask,
    )


def test_vit_and_whisper():
    draw = torch.Generator().manual_seed(0)
    assert_same(build(T.ViTForImageClassification, VIT), pixel_values=torch.randn(2, 3, 16, 16, generator=draw))
    features = torch.randn(2, 8, 24, generator=draw)
    models = build(T.WhisperForConditionalGeneration, WHISPER)
    assert_same(models, input_features=features, decoder_input_ids=tokens(length=6))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_position_ids(name):
    models = build(*CAUSAL[name])
    lengths = (4, 7, 2)
    packed = tokens(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    assert_same(models, input_ids=packed, position_ids=position_ids, use_cache=False)
    # and that is each document alone, by varlen keywords too
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    varlen = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    fast = models[1]
    with torch.no_grad():
        together = fast(packed, position_ids=position_ids, use_cache=False).logits
        by_varlen = fast(packed, position_ids=position_ids, use_cache=False, **varlen).logits
        alone = torch.cat([fast(document).logits for document in packed.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(by_varlen, alone, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation(name, cache):
    models = build(*CAUSAL[name])
    mask = padding("left", length=6, pads=2)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    for attention_mask, prompt in ((mask, tokens(length=6)), (torch.ones(2, 3, dtype=torch.long), tokens(length=3))):
        results = [m.generate(prompt, attention_mask=attention_mask, pad_token_id=0, **options) for m in models]
        assert torch.equal(results[0].sequences, results[1].sequences)
        torch.testing.assert_close(results[1].logits, results[0].logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoder_generation(name):
    models = build(*ENCODER_DECODER[name])
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    results = [m.generate(tokens(), attention_mask=padding("right"), **options) for m in models]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name):
    models = build(*CAUSAL[name])
    models[1].gradient_checkpointing_enable()
    models[1].train(), models[0].train()
    mask = padding("right")
    assert_same(models, where=mask, input_ids=tokens(), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_compile_fullgraph(name):
    kind, config = CAUSAL[name]
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    models = build(kind, config)
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    for side in (None, "left"):
        mask = padding(side)
        inputs = {"input_ids": tokens(), "attention_mask": mask if side else None, "use_cache": False}
        expected, grads = logits_and_gradients(models[0], mask, **inputs)
        found, found_grads = logits_and_gradients(compiled, mask, **inputs)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert len(found_grads) == len(grads)
        for name, grad in grads.items():
            assert_close_gradients(models[1].get_parameter(name).grad, grad, name)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_output_attentions(kind):
    """The weights come back, exact, as they do from eager; no other fused implementation gives them."""
    mask = padding("right")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if kind == "t5":
        models = build(T.T5EncoderModel, T5)
    else:
        models = build(*(CAUSAL["llama"] if kind == "llama" else (T.BertModel, BERT)))
    with torch.no_grad():
        eager, fast = (model(**inputs, output_attentions=True).attentions for model in models)
    assert len(fast) == len(eager) == 2
    for mine, theirs in zip(fast, eager, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_dropout_is_applied_in_training_only():
    config = copy.deepcopy(GPT2)
    config.attn_pdrop = 0.5
    _, fast = build(T.GPT2LMHeadModel, config)
    inputs = tokens()
    assert torch.equal(fast(inputs).logits, fast(inputs).logits)
    fast.train()
    assert not torch.equal(fast(inputs).logits, fast(inputs).logits)


def test_switching_back_and_forth():
    eager, _ = build(*CAUSAL["llama"])
    mask = padding("left")
    expected = eager(tokens(), attention_mask=mask).logits[mask.bool()]
    for implementation in ("fastattn", "eager", "fastattn"):
        eager.set_attn_implementation(implementation)
        found = eager(tokens(), attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_unknown_keyword_is_refused():
    _, fast = build(*CAUSAL["llama"])
    assert fast(tokens(), tree_mask=None, use_cache=False).logits.shape[-1] == VOCABULARY
    with pytest.raises(fastattn.UnsupportedError, match="tree_mask"):
        fast(tokens(), tree_mask=torch.ones(1), use_cache=False)


def layer(is_causal=True):
    module = torch.nn.Module()
    module.is_causal = is_causal
    return module


def direct(mask, **options):
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    return integration.attention_forward(layer(), q, k, k, mask, **options)[0]


def test_masks_of_other_kinds_are_refused_and_float_masks_are_added():
    with pytest.raises(fastattn.InputError, match="attention_mask"):
        direct(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(fastattn.InputError, match="batch of one"):
        direct(None, cu_seq_lens_q=torch.tensor([0, 3]), cu_seq_lens_k=torch.tensor([0, 3]))
    keep = torch.ones(3, 3).tril().bool()[None, None]
    added = torch.zeros(3, 3).masked_fill(~keep[0, 0], float("-inf"))[None, None]
    torch.manual_seed(0)
    by_mask = direct(keep)
    torch.manual_seed(0)
    by_float = direct(added)
    torch.manual_seed(0)
    torch.testing.assert_close(by_mask, by_float)
    torch.testing.assert_close(by_mask, direct(None))
    with pytest.raises(fastattn.InputError, match="module: got Module, without is_causal or a mask"):
        integration.attention_forward(torch.nn.Module(), *torch.randn(3, 1, 2, 3, 8), None)


def test_layers_share_one_batch_of_queries():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 5, 8)
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q.expand(4, -1, -1, -1), k, k).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
