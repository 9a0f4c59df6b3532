"""Families of transformers: which layers state is_causal, the masks they get, families that are refused; documents."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

sys.path.insert(0, str(Path(__file__).parent))
import families  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaModel  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations.transformers_families import may_leave_masks_out  # noqa: E402

T = transformers
TOLERANCE = 1e-4  # fp32
# One family for each way that masks take: left out, causality by layers that never say, encoders that never say,
# additive masks alone, masks with parts put to them, images and text together, sinks and caps, sound, cross-attention.
SAMPLE = (
    "llama", "bart", "bert", "vit", "nllb-moe", "bigbird_pegasus", "splinter", "deepseek_v4", "paligemma", "gpt_oss",
    "gemma2", "whisper", "t5", "llava", "modernbert", "pegasus_x",
)  # fmt: skip
REFUSED = ("bloom", "mpt", "codegen", "xglm", "longformer")


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()
    yield
    integration.register()  # without the counter of the sweep


@pytest.mark.parametrize("family", SAMPLE)
def test_a_tiny_model_of_the_family_computes_as_eager_does(family):
    _, results = families.one(family)
    assert families.verdict(results) == "same", results


@torch.no_grad()
def test_layers_that_add_the_mask_themselves_get_one_to_add():
    """GIT's text layers never ask for an implementation; only its images do."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = T.GitForCausalLM(T.GitConfig(vocab_size=60, **text, vision_config=vision)).eval()
    inputs = {"input_ids": torch.arange(3, 11)[None], "pixel_values": torch.randn(1, 3, 16, 16)}
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits
    model.set_attn_implementation("fastattn")
    close(model(**inputs).logits, expected)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_compute_attention_themselves_are_refused_by_name(family):
    _, results = families.one(family)
    assert family in results.get("refused", ""), results


@pytest.mark.parametrize(("family", "todo"), [("gpt_neo", "'flash_attention_2'."), ("git", "for its other layers.")])
def test_models_that_look_their_layers_up_by_name_are_refused_by_name(family, todo):
    config = families.tiny_config(family)
    with pytest.raises(fastattn.UnsupportedError, match=f"{family!r}.*Use .*'eager'.*{todo}"):
        families.model_class(config)._from_config(config, attn_implementation="fastattn")
    families.model_class(config)._from_config(config, attn_implementation="eager")


def test_the_sweep_notices_what_is_wrong(monkeypatch):
    monkeypatch.setattr(integration, "attention_forward", wrong(integration.attention_forward))
    assert families.verdict(families.one("llama")[1]).startswith("differs")


def wrong(attention):
    def forward(module, query, *args, **options):
        return attention(module, query * 1.1, *args, **options)

    return forward


@pytest.mark.parametrize(
    ("config", "may"),
    [
        (T.LlamaConfig(), True),
        (T.LlamaConfig(is_causal=False), False),
        (T.BertConfig(), True),
        (T.SplinterConfig(), False),
        (T.NllbMoeConfig(), False),
        (T.GemmaConfig(use_bidirectional_attention=True), False),
        (T.LlavaConfig(), True),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, bool) else None,
)
def test_masks_are_left_out_where_layers_can_be_relied_on(config, may):
    assert families.model_class(config) and T.CLIPVisionModel  # the modules of a model are loaded with it
    assert may_leave_masks_out(config) is may


# --- documents in one row ---------------------------------------------------------------------------------------

LENGTHS = (4, 7, 2)
CU = torch.tensor([0, 4, 11, 13], dtype=torch.int32)
VARLEN = {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "max_length_q": 7, "max_length_k": 7}
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def packed(family):
    eager, fast = families.build(family)
    tokens = torch.randint(3, 80, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([eager(x, use_cache=False).logits for x in tokens.split(LENGTHS, 1)], 1)
    return fast, tokens, alone


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("mask", [None, torch.ones(1, sum(LENGTHS), dtype=torch.long)], ids=["no mask", "all ones"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_positions_that_restart_tell_documents_apart(family, mask, use_cache):
    fast, tokens, alone = packed(family)
    close(fast(tokens, position_ids=POSITIONS, attention_mask=mask, use_cache=use_cache).logits, alone)


@torch.no_grad()
def test_positions_changed_in_place_are_read_again_and_padding_is_no_document():
    fast, tokens, alone = packed("llama")
    positions = torch.arange(sum(LENGTHS))[None]
    one = fast(tokens, position_ids=positions).logits
    positions.copy_(POSITIONS)
    close(fast(tokens, position_ids=positions).logits, alone)
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    padded = torch.tensor([[1, 1, *range(sum(LENGTHS) - 2)]])
    expected = fast(tokens[:, 2:]).logits
    close(fast(tokens, position_ids=padded, attention_mask=mask).logits[:, 2:], expected)
    assert not torch.allclose(one, alone)
    gap = torch.tensor([[0, 1, 2, 40, 41, 42]])  # one document with a hole, as PoSE trains with
    families.count_calls()
    assert fast(tokens[:, :6], position_ids=gap).logits.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=["", "weights"])
@torch.no_grad()
def test_boundaries_with_and_without_a_mask_beside_them(options):
    fast, tokens, alone = packed("llama")
    close(fast(tokens, position_ids=POSITIONS, use_cache=False, **VARLEN, **options).logits, alone)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    keep = (documents[:, None] == documents[None]) & torch.ones(13, 13).tril().bool()
    keep[5:, 4] = False  # more than the boundaries say
    added = torch.zeros(13, 13).masked_fill(~keep, torch.finfo(torch.float32).min)[None, None]
    for mask in (keep[None, None], added):
        found = fast(tokens, position_ids=POSITIONS, use_cache=False, attention_mask=mask, **VARLEN, **options)
        expected = fast(tokens, position_ids=POSITIONS, use_cache=False, attention_mask=mask, **options)
        close(found.logits, expected.logits)
        if options:
            close(torch.stack(found.attentions), torch.stack(expected.attentions))


def test_weights_of_packed_documents_are_those_of_eager():
    fast, tokens, _ = packed("llama")
    found = fast(tokens, position_ids=POSITIONS, use_cache=False, **VARLEN, output_attentions=True).attentions
    fast.set_attn_implementation("eager")
    expected = fast(tokens, position_ids=POSITIONS, use_cache=False, output_attentions=True).attentions
    close(torch.stack(found), torch.stack(expected))


# --- keywords ---------------------------------------------------------------------------------------------------


def call(**options):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module = LlamaModel  # any layer: causality is by the keyword
    return (q, k, v), integration.attention_forward(module, q, k, v, None, is_causal=True, **options)


def formula(q, k, v, sinks=None, keep=None):
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    kept = torch.ones(5, 5).tril().bool() if keep is None else torch.ones(5, 5).tril().bool() & keep
    scores = scores.masked_fill(~kept, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(2, 4, 5, 1)], -1)
    weights = scores.softmax(-1)[..., :5]
    return (weights @ v.repeat_interleave(2, 1)).transpose(1, 2), weights


def test_sinks_by_either_keyword_of_heads_or_of_rows():
    of_heads, of_rows = torch.randn(4), torch.randn(2, 4, 5, 1)
    column = of_heads[:, None, None]
    for options, sinks in (({"s_aux": of_heads}, column), ({"sinks": of_heads}, column), ({"sinks": of_rows}, of_rows)):
        qkv, found = call(**options, output_attentions=True)
        expected = formula(*qkv, sinks)
        close(found[0], expected[0])
        close(found[1] + 0, expected[1])


def test_indices_are_the_only_keys_seen():
    indices = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 1], [4, 0]]).expand(2, 5, 2)
    qkv, found = call(indices=indices)
    keep = torch.zeros(2, 5, 5, dtype=torch.bool).scatter(-1, indices, True)[:, None]
    close(found[0], formula(*qkv, keep=keep)[0])
