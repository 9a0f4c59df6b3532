"""The adapter of lm-evaluation-harness: a local task, the likelihoods of a whole text, and answers up to a stop."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance

from fastattn.errors import InputError
from fastattn.lm.harness import FastattnLM
from fastattn.lm.models import make_model, preset, save_pretrained
from fastattn.lm.train.tokens import train_tokenizer


def saved(name, folder):
    torch.manual_seed(0)
    model = make_model(preset(name, 290)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tokenizer = train_tokenizer(["the sky is blue, the grass is green"] * 3, 290)
    save_pretrained(model, folder, tokenizer=tokenizer, special_tokens={"bos": 0, "eos": 1, "decoder_start": 0})
    return model, tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = saved("tiny", folder)
    return FastattnLM(str(folder), batch_size=2), model, tokenizer


@torch.no_grad()
def log_p(model, tokenizer, context, text):
    before, after = tokenizer.encode(context).ids, tokenizer.encode(text).ids
    found = model(torch.tensor([[0, *before, *after]])).log_softmax(-1)[0, len(before) : -1]
    return float(found.gather(-1, torch.tensor(after)[:, None]).sum())


def test_a_local_task(loaded, tmp_path, monkeypatch):
    adapter, model, tokenizer = loaded
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    choices = [" blue", " green", " a very long answer"]
    rows = [{"question": q, "choices": choices, "gold": n} for n, q in enumerate(("the sky is", "the grass is"))]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = simple_evaluate(adapter, tasks=[task], log_samples=True, bootstrap_iters=0)
    for row, sample in zip(rows, found["samples"]["colours"], strict=True):
        scores = [response[0][0] for response in sample["resps"]]
        assert scores == pytest.approx([log_p(model, tokenizer, row["question"], x) for x in choices], abs=1e-4)
    expected = [max(range(3), key=lambda n: log_p(model, tokenizer, row["question"], choices[n])) for row in rows]
    assert (
        found["results"]["colours"]["acc,none"]
        == sum(n == row["gold"] for n, row in zip(expected, rows, strict=True)) / 2
    )


def test_whole_texts_and_answers(loaded):
    adapter, model, tokenizer = loaded
    text = "the sky is blue"
    (total,) = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert total == pytest.approx(log_p(model, tokenizer, "", text), abs=1e-4)
    long = text * 40  # more than the model reads, in windows
    assert len(tokenizer.encode(long).ids) > 256
    (total,) = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)])
    assert -2000 * 6 < total < log_p(model, tokenizer, "", text)
    whole = adapter._answer("the", {"max_gen_toks": 8})
    (answer,) = adapter.generate_until(
        [Instance("generate_until", {}, ("the", {"until": whole[2], "max_gen_toks": 8}), 0)]
    )
    assert answer == whole[: whole.index(whole[2])] and whole


def test_other_models_are_refused(tmp_path):
    saved("t5-small", tmp_path / "t5")
    with pytest.raises(InputError, match="checkpoint: got a model of kind encoder-decoder; allowed: a decoder"):
        FastattnLM(str(tmp_path / "t5"))
