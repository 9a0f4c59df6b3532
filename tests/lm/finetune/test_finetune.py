"""Fine-tuning runs: what is trained, where they start, resuming bit for bit, and what a user can get wrong."""

import dataclasses
import json
import random
import signal

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fastattn.errors import DataError, InputError
from fastattn.lm.finetune import FinetuneConfig, finetune, load_finetuned
from fastattn.lm.finetune.adapters import Lora, add_adapters, choose_trained, merge_adapters
from fastattn.lm.finetune.config import resumed_config
from fastattn.lm.finetune.evaluate import evaluate
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.tasks import Task
from fastattn.lm.load import load_model
from fastattn.lm.models import (
    PRESETS,
    Decoder,
    Encoder,
    SequenceClassifier,
    from_pretrained,
    make_model,
    preset,
    save_pretrained,
)
from fastattn.lm.train import RunConfig, find_checkpoint, pretrain

SIZES = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 32}
HEAD = 32 * 32 + 32 + 3 * 32 + 3  # parameters of a classifier: the layer and norm of ModernBERT's heads, and the output
RECORDS = [{"text": f"{word} {n}", "label": word} for word in ("up", "down", "left") for n in range(8)]
WRITTEN = [{"prompt": f"say {word} ", "response": word * 2} for word in ("up", "down", "left", "right")]


@pytest.fixture(autouse=True, scope="module")
def small_presets():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tiny", "encoder-tiny", "seq2seq-tiny"):
            patch.setitem(PRESETS, name, PRESETS[name] | SIZES)
        yield


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "train.jsonl", RECORDS)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "prompts.jsonl", WRITTEN)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder for each objective with a run of a few steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    source = random.Random(0)
    lines = (" ".join(source.choices(["up", "down", "left", "right", "and", "the", "it"], k=9)) for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines))
    train = {"steps": 4, "batch": 2, "eval_rows": 2}
    for objective in ("causal", "masked", "span"):
        config = RunConfig(data=(str(folder / "text.txt"),), objective=objective, vocab_size=300, **train)
        pretrain(folder / objective, config, show_progress=False)
    return folder


def settings(data, **changes):
    train = {"steps": 10, "batch": 4, "eval_every": 5, "save_every": 5, "log_every": 1, "lr": 1e-2}
    starts = {} if "checkpoint" in changes else {"preset": "tiny"}
    return FinetuneConfig(**({"task": "classify", "data": data} | train | starts | changes))


def run(out, config, **options):
    return finetune(out, config, show_progress=False, **options)


def model_of(outcome):
    return load_finetuned(outcome.checkpoint).model


@pytest.mark.parametrize(
    ("objective", "task"),
    [("masked", "classify"), ("causal", "classify"), ("causal", "instruct"), ("span", "seq2seq")],
)
def test_it_starts_from_a_pre_trained_checkpoint(pretrained, tmp_path, objective, task):
    pairs = [{"source": word, "target": word[::-1]} for word in ("up", "down", "left", "right")]
    path = written(tmp_path / "a.jsonl", {"classify": RECORDS, "instruct": WRITTEN, "seq2seq": pairs}[task])
    start = find_checkpoint(pretrained / objective)
    frozen = {"batch": 2, "lr": 1e-12}  # so small that nothing changes
    config = settings(path, task=task, checkpoint=str(pretrained / objective), eval=path, steps=1, **frozen)
    found = model_of(run(tmp_path / "run", config))
    before = start.load_pretrained()
    before, after = (getattr(x, "backbone", x).state_dict() for x in (before, found))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)


def bert(folder, **changes):
    """A small BERT as a folder in Hugging Face's format."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "up", "down", "left", *map(str, range(8))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(3)
    model = Encoder(dataclasses.replace(preset("bert-tiny", len(words)), width=32, layers=1, **changes))
    save_pretrained(model, folder, tokenizer=tokenizer)
    return model


def test_it_starts_from_a_folder_in_the_format_of_hugging_face(data, tmp_path):
    model = bert(tmp_path / "bert", pooler=True)
    config = settings(data, preset=None, pretrained=str(tmp_path / "bert"), method="frozen")
    outcome = run(tmp_path / "run", config)
    after = model_of(outcome).backbone.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in model.state_dict().items()), "its pooler, too"
    tokens = load_finetuned(outcome.checkpoint).task.features(Example("", {"text": "up 3", "label": "up"}))[0]["tokens"]
    assert tokens == [2, 5, 11, 3]


@pytest.mark.parametrize("method", ["full", "frozen"])
def test_a_classifier_gets_the_pooler_that_hugging_face_has(method, data, tmp_path):
    bert(tmp_path / "bert")
    config = settings(data, preset=None, pretrained=str(tmp_path / "bert"), method=method)
    model = model_of(run(tmp_path / "run", config))
    assert model.config.pooler and model.backbone.pooler.bias.any()  # which was zero before it was trained
    save_pretrained(model, tmp_path / "out")
    again, tokens = from_pretrained(tmp_path / "out"), torch.randint(5, 16, (2, 5))
    assert type(again) is SequenceClassifier and torch.equal(again(tokens), model(tokens))


def test_a_fine_tuned_model_can_be_fine_tuned_for_another_task(data, prompts, pretrained, tmp_path):
    first = run(tmp_path / "a", settings(prompts, task="instruct", checkpoint=str(pretrained / "causal"), eval=prompts))
    second = run(tmp_path / "b", settings(data, checkpoint=str(tmp_path / "a"), method="frozen"))
    before, after = model_of(first).state_dict(), model_of(second).backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_trains_the_head_alone(data, pretrained, tmp_path):
    outcome = run(tmp_path / "run", settings(data, checkpoint=str(pretrained / "masked"), method="frozen"))
    before = find_checkpoint(pretrained / "masked").load_pretrained().backbone.state_dict()
    model = model_of(outcome)
    assert all(torch.equal(before[name], weight) for name, weight in model.backbone.state_dict().items())
    assert outcome.parameters["trained"] == HEAD


def test_lora_trains_adapters_and_the_head_and_is_merged_when_loaded(data, pretrained, tmp_path):
    outcome = run(tmp_path / "run", settings(data, checkpoint=str(pretrained / "masked"), method="lora", lora_rank=2))
    before = find_checkpoint(pretrained / "masked").load_pretrained().backbone.state_dict()
    after = model_of(outcome).backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("blocks.") and before[name].dim() == 2}
    difference = (after["blocks.0.mlp.up.weight"] - before["blocks.0.mlp.up.weight"]).double()
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 2
    block = sum(2 * sum(before[name].shape) for name in changed)
    assert outcome.parameters["trained"] == block + HEAD


def test_a_merged_model_computes_the_same():
    torch.manual_seed(0)
    model = Decoder(preset("tiny", 50)).eval()
    tokens = torch.randint(50, (2, 9))
    plain, names = model(tokens), set(model.state_dict())
    add_adapters(model, Lora(rank=3, alpha=7.0))
    assert torch.equal(model(tokens), plain), "adapters begin as nothing"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted = model(tokens)
    merge_adapters(model)
    assert not torch.allclose(adapted, plain, atol=1e-2) and set(model.state_dict()) == names
    torch.testing.assert_close(model(tokens), adapted, atol=1e-4, rtol=1e-4)


def test_frozen_needs_a_head():
    with pytest.raises(InputError, match="method: got 'frozen'; allowed: full or lora"):
        choose_trained(make_model(preset("tiny", 50)), "frozen", Lora(), has_head=False)
    model = SequenceClassifier(Encoder(preset("encoder-tiny", 50)), 2)
    with pytest.raises(InputError, match="method: got 'half'"):
        choose_trained(model, "half", Lora(), has_head=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resuming_is_bit_for_bit(data, tmp_path, monkeypatch, method):
    config = settings(data, method=method, dropout=0.1)
    straight = run(tmp_path / "straight", config)
    stop_after(monkeypatch, 7)
    stopped = run(tmp_path / "parts", config)
    assert stopped.progress.signal == signal.SIGINT and stopped.progress.step == 7 and stopped.scores == {}
    monkeypatch.undo()
    checkpoint = find_checkpoint(tmp_path / "parts")
    resumed = run(tmp_path / "parts", resumed_config(checkpoint, {}), resume=checkpoint)
    assert resumed.progress.step == 10
    ours, theirs = model_of(straight).state_dict(), model_of(resumed).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert straight.scores == resumed.scores
    losses = [logged(tmp_path / name) for name in ("straight", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def stop_after(monkeypatch, steps):
    """Send the process a SIGINT while it is in step number ``steps``."""
    from fastattn.lm.finetune.tasks import Classify

    real, calls = Classify.loss, []

    def loss(self: Task, model, batch):
        if model.training:
            calls.append(1)
            if len(calls) == steps:
                signal.raise_signal(signal.SIGINT)
        return real(self, model, batch)

    monkeypatch.setattr(Classify, "loss", loss)


def logged(folder):
    return [r["loss"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]


@pytest.mark.parametrize("objective", ["masked", "span"])
def test_objectives_train_alike_with_eager_attention(pretrained, tmp_path, objective):
    losses = []
    for attention in ("fastattn", "eager"):
        train = {"steps": 12, "batch": 4, "eval_rows": 2, "log_every": 1}
        config = RunConfig(
            data=(str(pretrained / "text.txt"),), objective=objective, vocab_size=300, attention=attention, **train
        )
        pretrain(tmp_path / attention, config, show_progress=False)
        losses.append(logged(tmp_path / attention))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and losses[0][-1] < losses[0][0] - 0.2


@pytest.mark.parametrize("task", ["classify", "instruct"])
def test_tasks_train_alike_with_eager_attention(data, prompts, tmp_path, task):
    path = data if task == "classify" else prompts
    for attention in ("fastattn", "eager"):
        run(tmp_path / attention, settings(path, task=task, eval=path, attention=attention))
    losses = [logged(tmp_path / attention) for attention in ("fastattn", "eager")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and losses[0] != losses[0][:1] * 10


def test_a_label_may_be_so_rare_that_all_of_it_is_held_out(tmp_path):
    path = written(tmp_path / "two.jsonl", [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}])
    outcome = run(tmp_path / "run", settings(path, steps=1))
    assert list(load_finetuned(outcome.checkpoint).task.labels) == ["a", "b"]


def test_the_held_out_part_depends_on_the_examples_alone(data, tmp_path):
    config = settings(data, held_out=0.3, steps=1)
    outcome = run(tmp_path / "a", config)
    assert outcome.examples["train"] + outcome.examples["held out"] == 24 and 1 < outcome.examples["held out"] < 14
    turned = written(tmp_path / "turned.jsonl", RECORDS[::-1])
    assert run(tmp_path / "b", dataclasses.replace(config, data=turned)).examples == outcome.examples


def test_it_says_how_many_examples_were_cut_and_resumes_with_other_attention(tmp_path):
    records = [{"text": "up " * (40 if n < 3 else 1) + str(n), "label": "ab"[n % 2]} for n in range(9)]
    path = written(tmp_path / "a.jsonl", records)
    outcome = run(tmp_path / "run", settings(path, eval=path, length=16, steps=1))
    assert outcome.examples["longest"] == 3 and outcome.facts()["rows cut to the longest length"] == 3
    checkpoint = find_checkpoint(tmp_path / "run")
    config = resumed_config(checkpoint, {"steps": 2, "attention": "eager"})
    assert run(tmp_path / "run", config, resume=checkpoint).checkpoint.config().attention == "eager"


def test_epochs_give_steps(data):
    config = settings(data, steps=None, epochs=2.5)
    assert config.training(24).steps == 15 and settings(data, steps=7).training(24).steps == 7


def test_the_best_checkpoint_is_kept_and_scored(data, tmp_path):
    kept = {"metric": "accuracy", "greater_is_better": True, "keep_best": True, "keep": 1}
    outcome = run(tmp_path / "run", settings(data, steps=30, **kept))
    assert outcome.progress.best == max(
        record["accuracy"]
        for record in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
        if "accuracy" in record
    )
    assert outcome.checkpoint.trainer_state()["step"] == outcome.progress.best_step
    assert outcome.scores["accuracy"] == outcome.progress.best


def test_a_model_that_writes_can_be_loaded_as_one_and_others_say_so(data, prompts, tmp_path):
    run(tmp_path / "writes", settings(prompts, task="instruct", eval=prompts, method="lora"))
    assert isinstance(load_model(find_checkpoint(tmp_path / "writes")), Decoder)
    run(tmp_path / "labels", settings(data, steps=1))
    with pytest.raises(DataError, match="is a model for classify, which generates no text: see fastattn evaluate"):
        load_model(find_checkpoint(tmp_path / "labels"))


def test_evaluating_a_pre_trained_model(pretrained):
    text = str(pretrained / "text.txt")
    for objective in ("causal", "masked", "span"):
        found = evaluate(find_checkpoint(pretrained / objective), [text], show_progress=False)
        assert found.task == objective and 3 < found.scores["loss"] < 7
        assert ("bits per byte" in found.scores) == (objective == "causal")
        again = evaluate(find_checkpoint(pretrained / objective), [text], attention="eager", show_progress=False)
        assert again.scores["loss"] == pytest.approx(found.scores["loss"], abs=1e-4)
        assert (
            evaluate(find_checkpoint(pretrained / objective), [text], limit=1, show_progress=False).sizes["tokens"] < 40
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "sing"}, "task: got 'sing'"),
        ({"preset": None}, "the start: got none; allowed: one of --checkpoint, --pretrained and --preset"),
        ({"checkpoint": "x", "preset": "tiny"}, "the start: got --checkpoint and --preset"),
        ({"epochs": 0.0}, "epochs: got 0.0"),
        ({"steps": 0}, "steps: got 0"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"lora_rank": 0}, "lora_rank: got 0"),
        ({"lora_alpha": 0.0}, "lora_alpha: got 0.0"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
    ],
)
def test_refused_settings(data, changes, words):
    with pytest.raises(InputError, match=words):
        settings(data, **changes)


def test_too_few_examples_and_used_folders(data, tmp_path):
    with pytest.raises(DataError, match="holds too few different examples to hold some out"):
        run(tmp_path / "a", settings(written(tmp_path / "one.jsonl", RECORDS[:1] * 3)))
    run(tmp_path / "b", settings(data, steps=1))
    with pytest.raises(DataError, match="already holds a run: add --resume"):
        run(tmp_path / "b", settings(data))


def test_resuming_on_other_examples_is_refused(data, tmp_path):
    path = written(tmp_path / "train.jsonl", RECORDS)
    run(tmp_path / "run", settings(path, steps=1))
    written(tmp_path / "train.jsonl", RECORDS[1:])
    checkpoint = find_checkpoint(tmp_path / "run")
    with pytest.raises(DataError, match="The examples are not what the run was trained on"):
        run(tmp_path / "run", resumed_config(checkpoint, {"steps": 2}), resume=checkpoint)
    with pytest.raises(InputError, match="--task: got tag; allowed: classify, as before"):
        resumed_config(checkpoint, {"task": "tag"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "huge"}, "preset: got 'huge'"),
        ({"vocab_size": 9}, "vocab_size: got 9"),
        ({"method": "half"}, "method: got 'half'"),
        ({"task": "seq2seq", "method": "frozen"}, "method: got 'frozen'"),
        ({"attention": "quick"}, "attention: got 'quick'"),
        ({"dropout": -1.0}, "dropout: got -1.0"),
    ],
)
def test_settings_are_checked_when_they_are_made(fields, words):
    with pytest.raises(InputError, match=words):
        FinetuneConfig(**({"task": "classify", "data": "x", "preset": "tiny"} | fields))


def test_the_start_is_looked_for_before_the_examples_are_read(tmp_path):
    config = FinetuneConfig(task="classify", data=str(tmp_path / "no.jsonl"), checkpoint=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"Checkpoint .*gone' does not exist"):
        finetune(tmp_path / "run", config)
