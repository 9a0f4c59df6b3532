"""A tiny random model of every family of the installed transformers, fastattn beside eager.

    python tests/integrations/families.py [family ...] [--jobs N] [--table FILE]

Sizes of a family's own default configuration are reduced by their names; families that cannot be built so are reported
with the error. The others are compared in every way that their inputs allow: outputs without padding and with padding
on either side, gradients, whether an earlier token depends on a later one, packed documents, greedy generation with a
dynamic and a static cache.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import multiprocessing
import re
import signal
import sys
import warnings
from pathlib import Path

import torch
import transformers as T

import fastattn
from fastattn.integrations import transformers as integration

TOLERANCE = 2e-4  # fp32, relative to the largest output
VOCABULARY, LENGTH = 99, 9
SIZES = [
    (r"vocab_size|n_vocab|text_vocab", VOCABULARY),
    (r"pad_token_id", 0), (r"bos_token_id|decoder_start_token_id|cls_token_id", 1), (r"eos_token_id|sep_token_id", 2),
    (r"kv_lora_rank|q_lora_rank|.*lora_rank|rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim", 8),
    (r"rotary_dim|head_dim|d_kv|.*_head_dim|attention_head_size|kv_channels", 8),
    (r".*num_key_value_heads|num_kv_heads|.*_kv_heads|n_head_kv|num_query_groups", 2),
    (r".*num_attention_heads|n_heads?|.*num_heads|.*_attention_heads", 4),
    (r".*hidden_layers|n_layers?|num_layers|num_.*_layers|encoder_layers|decoder_layers|depth|.*_num_layers", 2),
    (r"num_experts_per_tok|moe_topk|moe_top_k|top_k|topk|num_experts_per_token|experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r"n_routed_experts|num_.*experts|moe_num_experts|num_experts", 4),
    (r"sliding_window|sliding_window_size|local_attention|attention_window", 4),
    (r".*_ffn_dim|ffn_dim|d_ff|n_inner|.*intermediate_size|mlp_dim|ffn_hidden_size|feed_forward.*size", 48),
    (r"n_positions|n_ctx|max_seq_len|.*max_position_embeddings|max_target_positions|seq_length", 64),
    (r"d_model|n_embd|embedding_size|dim|width|.*hidden_size|.*embed_dim|.*_hidden_dim|d_embed", 32),
    (r"projection_dim|out_hidden_size|classifier_proj_size|projector_hidden.*|.*proj_dim|output_dim", 32),
    (r"image_size|input_size", 16), (r"patch_size", 4), (r"num_mel_bins|input_feat_per_channel|feature_size", 8),
    (r"num_labels", 3), (r"num_frames", 2),
]  # fmt: skip
LOSSY = ("dropout", "drop_prob", "drop_path", "layerdrop", "jitter", "pdrop", "drop")


def shrunk(name, value):
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and not re.fullmatch("|".join(
        pattern for pattern, _ in SIZES[1:3]), name):  # fmt: skip
        return 90 + sum(map(ord, name)) % 9
    if isinstance(value, float) and any(word in name for word in LOSSY):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    small = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return small if name.endswith("_token_id") else min(small, value)


def shrink(config):
    """The dictionary of a configuration with small sizes, its nested ones too."""
    layers = next(
        (config[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(config.get(n), int)), 0
    )
    small = {}
    for name, value in config.items():
        if name in ("transformers_version", "architectures", "dtype", "id2label", "label2id", "rope_parameters"):
            continue
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            small[name] = shrink(value)
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            small[name] = [value[0], next((x for x in value if x != value[0]), value[-1])]
        else:
            small[name] = shrunk(name, value)
    return small


def tiny_config(family):
    kind = T.CONFIG_MAPPING[family]
    return kind(**{k: v for k, v in shrink(kind().to_dict()).items() if k != "model_type"})


def model_class(config):
    for mapping in ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM"):
        found = getattr(T, f"MODEL_FOR_{mapping}_MAPPING", {})
        if type(config) in found:
            kind = found[type(config)]
            return kind[0] if isinstance(kind, tuple) else kind
    kind = T.MODEL_MAPPING[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def build(family):
    config = tiny_config(family)
    kind = model_class(config)
    torch.manual_seed(0)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    for name, parameter in eager.named_parameters():
        if parameter.dim() > 1 or "sink" in name:
            torch.nn.init.normal_(parameter, std=0.12)
    fast = kind._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    fast.load_state_dict(eager.state_dict())
    return eager.float(), fast.float()


def inputs_of(model):
    """What a model's forward takes, as small tensors."""
    takes, config = inspect.signature(model.forward).parameters, model.config
    draw = torch.Generator().manual_seed(0)
    given = {}
    if "input_ids" in takes:
        given["input_ids"] = torch.randint(3, 80, (2, LENGTH), generator=draw)
    elif "pixel_values" in takes:
        size = getattr(config, "image_size", 16)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        given["pixel_values"] = torch.randn(2, getattr(config, "num_channels", 3) or 3, height, width, generator=draw)
    elif "input_features" in takes:
        given["input_features"] = torch.randn(2, 8, 2 * getattr(config, "max_source_positions", 20), generator=draw)
    elif "input_values" in takes:
        given["input_values"] = torch.randn(2, 3000, generator=draw)
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = torch.randint(3, 80, (2, 6), generator=draw)
    return given


def first_tensor(outputs):
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if isinstance(getattr(outputs, name, None), torch.Tensor):
            return getattr(outputs, name)
    return next(x for x in outputs.to_tuple() if isinstance(x, torch.Tensor))


def outputs(model, given):
    torch.manual_seed(1)  # some draw which patches they mask
    return first_tensor(model(**given))


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def compare(family):
    """``{check: error or message}`` of one family; a message is what stopped it."""
    eager, fast = build(family)
    given, results = inputs_of(eager), {}
    calls = count_calls()
    with torch.no_grad():
        expected = outputs(eager, given)
        results["outputs"] = error(outputs(fast, given), expected)
    results["calls"] = calls["n"]
    text = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    mask = "attention_mask" if "attention_mask" in inspect.signature(eager.forward).parameters else None
    checks = {"gradients": lambda: gradients(eager, fast, given)}
    if "input_ids" in given and mask:
        checks |= {
            f"padding {side}": (lambda side=side: padded(eager, fast, given, side)) for side in ("left", "right")
        }
    if text in given and expected.dim() == 3:
        checks["future"] = lambda: future(eager, fast, given, text)
    if eager.can_generate() and "input_ids" in given:
        checks |= {f"{c} cache": (lambda c=c: generation(eager, fast, given, c)) for c in ("dynamic", "static")}
    for name, check in checks.items():
        results[name] = outcome(check)
    return results


def outcome(check):
    try:
        return check()
    except NotPossible as reason:
        return f"eager: {reason}"
    except Exception as reason:
        return f"{type(reason).__name__}: {' '.join(str(reason).split())[:160]}"


class NotPossible(Exception):
    """Eager cannot do it either."""


@contextlib.contextmanager
def eager_may_fail():
    try:
        yield
    except Exception as reason:
        raise NotPossible(f"{type(reason).__name__}: {' '.join(str(reason).split())[:80]}") from None


def count_calls():
    calls = {"n": 0}

    def counted(*args, **options):
        calls["n"] += 1
        return integration.attention_forward(*args, **options)

    T.AttentionInterface.register("fastattn", counted)  # register() puts the function itself back
    return calls


def gradients(eager, fast, given):
    found = []
    for model in (eager, fast):
        model.zero_grad()
        with eager_may_fail() if model is eager else contextlib.nullcontext():
            outputs(model, given).pow(2).mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    largest = max(float(g.abs().max()) for g in found[0].values())
    assert found[0].keys() == found[1].keys(), "other parameters have gradients"
    return max(float((found[1][n] - g).abs().max()) for n, g in found[0].items()) / largest


@torch.no_grad()
def padded(eager, fast, given, side):
    ids = given["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask = mask.flip(1) if side == "right" else mask
    given = given | {"attention_mask": mask}
    with eager_may_fail():
        expected = outputs(eager, given)
    found = outputs(fast, given)
    if expected.shape[:2] == mask.shape:
        expected, found = expected[mask.bool()], found[mask.bool()]
    return error(found, expected)


@torch.no_grad()
def future(eager, fast, given, text):
    """How much more the outputs of earlier tokens change with the last token than eager's do."""
    other = given | {text: given[text].clone()}
    other[text][:, -1] = 5
    changes = []
    for model in (eager, fast):
        a, b = outputs(model, given), outputs(model, other)
        if a.shape[1] != given[text].shape[1]:
            raise NotPossible("outputs are not one for each token")
        changes.append(float((a - b)[:, :-1].abs().max() / a.abs().max()))
    return max(0.0, changes[1] - changes[0])


@torch.no_grad()
def generation(eager, fast, given, cache):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 1}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    prompt = {"input_ids": given["input_ids"], "attention_mask": torch.ones_like(given["input_ids"])}
    prompt["attention_mask"][1, :2] = 0
    with eager_may_fail():
        expected = eager.generate(**prompt, **options)
    found = fast.generate(**prompt, **options)
    return error(torch.stack(found.logits), torch.stack(expected.logits))


def one(family):
    """``(family, results)``; never raises, and gives up after a while."""
    warnings.simplefilter("ignore")
    T.logging.set_verbosity(50)
    torch.set_num_threads(1)
    integration.register()

    def too_long(*_):
        raise TimeoutError("took too long")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(100)
    try:
        return family, compare(family)
    except fastattn.UnsupportedError as reason:
        return family, {"refused": str(reason)[:120]}
    except Exception as reason:
        return family, {"not built": f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"}
    finally:
        signal.alarm(0)


def verdict(results):
    """ "same", "refused", "not built", or the checks that differ."""
    for word in ("refused", "not built"):
        if word in results:
            return word
    values = {name: x for name, x in results.items() if name != "calls"}
    wrong = [n for n, x in values.items() if (isinstance(x, float) and not x <= TOLERANCE)]
    wrong += [n for n, x in values.items() if isinstance(x, str) and not x.startswith(("eager:", "UnsupportedError"))]
    return (
        f"differs: {', '.join(wrong)}" if wrong else ("same" if results["calls"] else "no attention of the interface")
    )


def page(verdicts):
    """The page of docs/ that says what the sweep found."""
    kinds = {}
    for family, kind in sorted(verdicts.items()):
        kinds.setdefault(kind.split(":")[0], []).append(f"`{family}`")
    titles = {
        "same": "computes as eager does",
        "differs": "differs from eager",
        "refused": "is refused: the family computes attention itself",
        "no attention of the interface": "does not call the attention interface",
        "not built": "could not be built small, so was not compared",
    }
    lines = [
        "# Families of transformers",
        "",
        f"Made by `make sweep` with transformers {T.__version__}: a tiny random model of each family, `fastattn`",
        "compared with `eager` in fp32: outputs without padding and with padding on either side, gradients, whether",
        "earlier tokens depend on later ones, and greedy generation with a dynamic and a static cache, each if the",
        f"family accepts the inputs. {len(verdicts)} model types.",
        "",
        '| with `attn_implementation="fastattn"` the family | how many |',
        "| --- | --- |",
        *(f"| {title} | {len(kinds.get(kind, []))} |" for kind, title in titles.items()),
    ]
    for kind, title in titles.items():
        if kinds.get(kind) and kind != "not built":
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", ", ".join(kinds[kind])]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="the page to write")
    arguments = parser.parse_args()
    families = arguments.family or sorted(T.CONFIG_MAPPING)
    found = {}
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=20) as pool:
        for family, results in pool.imap_unordered(one, families):
            found[family] = results
            print(f"{family:<28} {verdict(results):<24} {json.dumps(results)[:300]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(sorted(found.items())), indent=1))
    if arguments.table:
        verdicts = {family: verdict(results) for family, results in found.items()}
        arguments.table.write_text(page(verdicts), encoding="utf-8")
    counts = {}
    for results in found.values():
        kind = verdict(results).split(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
    print(counts)
    return 1 if counts.get("differs") else 0


if __name__ == "__main__":
    sys.exit(main())
