"""The tasks: what examples become, and that each learns a few of them by heart, with and without fastattn's kernels."""

import dataclasses
import json

import pytest
import torch

from fastattn.errors import DataError, InputError
from fastattn.lm.finetune.evaluate import evaluate
from fastattn.lm.finetune.examples import Example, checked
from fastattn.lm.finetune.run import FinetuneConfig, finetune
from fastattn.lm.finetune.tasks import TASKS
from fastattn.lm.models import PRESETS, make_model, preset
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import ExampleRows, padded
from fastattn.lm.train.tokens import train_tokenizer

COLOURS = {"sun": "yellow", "grass": "green", "sky": "blue", "coal": "black", "snow": "white", "blood": "red"}
RECORDS = {
    "classify": [{"text": f"the {thing} there", "label": colour} for thing, colour in COLOURS.items()],
    "regression": [{"text": f"the {thing} there", "label": 10.0 * n} for n, thing in enumerate(COLOURS)],
    "multilabel": [
        {"text": f"the {thing} there", "labels": [colour, "dark"] if colour in ("black", "blue") else [colour]}
        for thing, colour in COLOURS.items()
    ],
    "tag": [
        {"words": ["see", thing, "and", colour], "labels": ["o", "thing", "o", "colour"]}
        for thing, colour in COLOURS.items()
    ],
    "qa": [
        {"question": f"colour of {thing}?", "context": f"they say {thing} is {colour} here", "answer": colour}
        for thing, colour in COLOURS.items()
    ],
    "seq2seq": [{"source": f"a {thing}", "target": f"it is {colour}"} for thing, colour in COLOURS.items()],
    "instruct": [
        {"prompt": f"Colour of {thing}? ", "response": f"{colour}, I think"} for thing, colour in COLOURS.items()
    ],
    "chat": [
        {
            "messages": [
                {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "?"), ("user", thing))
            ],
            "response": colour,
        }
        for thing, colour in COLOURS.items()
    ],
}
SIZES = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 48}


@pytest.fixture(autouse=True, scope="module")
def small_presets():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tiny", "encoder-tiny", "seq2seq-tiny"):
            patch.setitem(PRESETS, name, PRESETS[name] | SIZES)
        patch.setitem(PRESETS, "bert-tiny", PRESETS["bert-tiny"] | SIZES)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    texts = [json.dumps(records) for records in RECORDS.values()]
    return train_tokenizer(texts, 320)


def examples_of(task):
    return [checked(Example(f"line {n}", record), task) for n, record in enumerate(RECORDS[task], 1)]


def make_task(name, tokenizer, preset_name=None, length=None):
    usual = {"seq2seq": "seq2seq-tiny", "instruct": "tiny", "chat": "tiny"}.get(name, "encoder-tiny")
    config = preset(preset_name or usual, 400)
    return TASKS[name](tokenizer, config, TASKS[name].label_names(examples_of(name)), length), config


def written(folder, task, records=None):
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records or RECORDS[task]))
    return path


def config_for(task, path, **changes):
    train = {"batch": 6, "eval_every": 60, "save_every": 1000, "log_every": 10, "lr": 1e-2}
    starts = {} if {"checkpoint", "preset"} & set(changes) else {"preset": "tiny"}
    options = {"vocab_size": 320, "eval": str(path), "steps": 60} | train
    return FinetuneConfig(task=task, data=str(path), **(options | starts | changes))


# DPO starts from a trained model; test_image_tasks.py has those with images.
OF_TEXT = sorted(name for name, task in TASKS.items() if name != "dpo" and not task.reads_images)


@pytest.mark.parametrize("name", OF_TEXT)
def test_each_task_learns_a_few_examples_by_heart(name, tmp_path):
    path = written(tmp_path, name)
    steps = {"seq2seq": 240, "instruct": 240, "chat": 240, "multilabel": 120}.get(name, 60)
    outcome = finetune(tmp_path / "run", config_for(name, path, steps=steps), show_progress=False)
    perfect = {"classify": "accuracy", "tag": "accuracy", "regression": "Pearson"}.get(name, "exact match")
    assert outcome.scores[perfect] == pytest.approx(1.0, abs=0.02 if name == "regression" else 0), outcome.scores
    assert outcome.scores["loss"] < 0.1
    speeds = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > line["tflops"] > 0 for line in speeds if "loss" in line)
    again = evaluate(outcome.checkpoint, [str(path)], show_progress=False)
    assert again.scores == outcome.scores == json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (again.baseline == outcome.baseline) and (outcome.baseline is not None) == (name == "seq2seq")
    if outcome.baseline is not None:
        assert outcome.baseline.scores["exact match"] < 1 and outcome.baseline.what in outcome.summary() + again.table()
    eager = evaluate(outcome.checkpoint, [str(path)], attention="eager", show_progress=False)
    assert eager.scores["loss"] == pytest.approx(again.scores["loss"], abs=1e-4)


def test_chat_learns_the_assistants_turns_alone(tokenizer):
    task, _ = make_task("chat", tokenizer, length=None)
    example = examples_of("chat")[0]
    (feature,) = task.features(example)
    learned = [label for label in feature["labels"] if label != IGNORED]
    end = task.special.end
    assert learned == [*task.ids("?"), end, *task.ids("yellow"), end]
    assert feature["tokens"][: len(task.prompt(example))] == task.prompt(example)
    assert task.learned_text(example) == "?yellow"
    with pytest.raises(DataError, match=r"line 1, field 'messages': A message contains the special token '<\|end\|>'"):
        task.features(Example("line 1", {"messages": [{"role": "user", "content": "<|end|>"}], "response": "x"}))


def test_classify_features(tokenizer):
    task, _ = make_task("classify", tokenizer, "bert-tiny")
    fields = {"text": "the sun", "text_pair": "the sky", "label": "blue"}
    (feature,) = task.features(Example("line 1", fields))
    begin, end = task.special.begin, task.special.end
    first, second = task.ids("the sun"), task.ids("the sky")
    assert feature["tokens"] == [begin, *first, end, *second, end]
    assert feature["token_types"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert feature["labels"] == [task.labels.index("blue")] == [1]
    (cut,) = task.features(Example("line 2", fields | {"text": "the sun " * 40}))
    assert len(cut["tokens"]) == len(cut["token_types"]) == 48 and cut["tokens"][-len(second) - 2] == end


def test_tag_features_label_the_first_token_of_each_word(tokenizer):
    task, _ = make_task("tag", tokenizer)
    example = Example("line 1", {"words": ["see", "xylophone"], "labels": ["o", "thing"]})
    (feature,) = task.features(example)
    see, rest = task.ids(" see"), task.ids(" xylophone")
    assert feature["tokens"] == [task.special.begin, *see, *rest, task.special.end] and len(rest) > 2
    known = [label for label in feature["labels"] if label != IGNORED]
    assert known == [task.labels.index("o"), task.labels.index("thing")]
    assert feature["labels"].index(known[1]) == 1 + len(see) and len(feature["labels"]) == len(feature["tokens"])


def test_words_that_do_not_fit_count_as_wrong(tokenizer):
    task, config = make_task("tag", tokenizer, length=8)
    model = task.add_head(make_model(config)).eval()
    example = Example("line 1", {"words": ["see"] * 20, "labels": ["o"] * 20})
    (prediction,) = task.predict(model, [example])
    answer = prediction["labels"]
    assert len(answer) == 20 and answer[-1] is None and answer[0] is not None
    perfect = ["o" if name else None for name in answer]
    scores = task.scores([{"labels": perfect}], [example])
    assert scores["accuracy"] == pytest.approx(sum(name is not None for name in answer) / 20)


def test_entities_are_scored_where_the_labels_mark_them(tokenizer):
    fields = {"words": ["Ada", "Lovelace", "saw", "Paris"], "labels": ["B-per", "I-per", "O", "B-loc"]}
    example = Example("line 1", fields)
    config = preset("encoder-tiny", 400)
    task = TASKS["tag"](tokenizer, config, TASKS["tag"].label_names([example]))
    scores = task.scores([{"labels": ["B-per", "I-per", "O", None]}], [example])  # the last word did not fit
    assert scores["entity precision"] == 1.0 and scores["entity recall"] == 0.5
    assert scores["entity F1"] == pytest.approx(2 / 3) and scores["accuracy"] == pytest.approx(3 / 4)
    plain, _ = make_task("tag", tokenizer)
    example = Example("line 1", RECORDS["tag"][0])
    assert "entity F1" not in plain.scores([{"labels": example.fields["labels"]}], [example])


def test_long_contexts_are_read_in_windows_that_hold_every_answer(tokenizer):
    task, _ = make_task("qa", tokenizer)
    words = [f"word{number}" for number in range(60)]
    context = " ".join(words)
    for answer in (words[0], words[31], words[59]):
        example = Example("line 1", {"question": "which?", "context": context, "answer": answer})
        example.fields["answer_start"] = context.index(answer)
        windows, features = task._windows(example), task.features(example)
        assert len(windows) > 3 and all(len(feature["tokens"]) <= 48 for feature, _ in windows)
        labels = [feature["labels"] for feature in features]
        found = [(x, places) for x, (_, places) in zip(labels, windows, strict=True) if x != [0, 0]]
        assert found
        for (first, last), places in found:
            assert context[places[first][0] : places[last][1]].strip() == answer
    covered = {place for _, places in task._windows(example) for place in places if place}
    assert max(last for _, last in covered) == len(context)


def test_instruct_learns_from_the_response_alone(tokenizer):
    task, _ = make_task("instruct", tokenizer)
    (feature,) = task.features(examples_of("instruct")[0])
    prompt, response = task.prompt(examples_of("instruct")[0]), task.ids("yellow, I think")
    assert feature["tokens"] == prompt + response
    assert feature["labels"] == [IGNORED] * (len(prompt) - 1) + [*response, task.special.end]
    (long,) = task.features(Example("line 1", {"prompt": "word " * 90, "response": "yes"}))
    assert len(long["tokens"]) == 48 and long["labels"][-1] == task.special.end


def test_seq2seq_features(tokenizer):
    task, _ = make_task("seq2seq", tokenizer)
    (feature,) = task.features(examples_of("seq2seq")[0])
    target = task.ids("it is yellow")
    assert feature["source"] == [task.special.begin, *task.ids("a sun"), task.special.end]
    assert feature["target"] == [task.special.target, *target] and feature["labels"] == [
        *target,
        task.special.end,
    ]


@pytest.mark.parametrize("name", OF_TEXT)
def test_padding_does_not_change_the_loss(name, tokenizer):
    task, config = make_task(name, tokenizer)
    model = task.add_head(make_model(config)).eval()
    features = [feature for example in examples_of(name) for feature in task.features(example)]
    with torch.no_grad():
        together = float(task.loss(model, padded(features)))
        apart = sum(float(task.loss(model, padded([feature]))) for feature in features)
    assert together == pytest.approx(apart, rel=1e-4)


def test_tokens_are_counted_without_padding():
    batch = padded([{"tokens": [5, 6, 7], "labels": [1]}, {"tokens": [5], "labels": [0]}])
    assert (batch.num_tokens(), batch.num_labels()) == (4, 2)
    assert padded([{"tokens": [5, 6], "labels": [1]}]).num_tokens() == 2


def test_rows_are_a_function_of_seed_and_step(tokenizer):
    features = [{"tokens": [n + 2] * (n % 7 + 1), "labels": [n]} for n in range(50)]
    one, two, other = ExampleRows(features, 8, 0), ExampleRows(features, 8, 0), ExampleRows(features, 8, 1)
    later = one.batch(9, 8)["labels"].tolist()
    assert two.batch(9, 8)["labels"].tolist() == later != other.batch(9, 8)["labels"].tolist()
    epoch = sorted(label for step in range(6) for (label,) in one.batch(step, 8)["labels"].tolist())
    assert len(set(epoch)) == 48  # 50 without the rest of 2
    halves = [one.batch(2 * 3 + rank, 4)["labels"] for rank in range(2)]
    assert torch.cat(halves).tolist() == one.batch(3, 8)["labels"].tolist()
    lengths = [len(set((one.batch(step, 8)["tokens"] > 0).sum(dim=1).tolist())) for step in range(6)]
    assert max(lengths) <= 3  # of 7


def test_a_model_of_the_wrong_kind(tokenizer):
    with pytest.raises(InputError, match=r"model: got one of kind decoder; allowed: encoder-decoder"):
        make_task("seq2seq", tokenizer, "tiny")
    with pytest.raises(InputError, match=r"length: got 49; allowed: 8 ... 48"):
        make_task("classify", tokenizer, length=49)


def test_an_unknown_label_is_named(tmp_path):
    path = written(tmp_path, "classify")
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x", "label": "pink"}\n')
    config = dataclasses.replace(config_for("classify", path), eval=str(other))
    with pytest.raises(
        DataError, match=r"other.jsonl, line 1, field 'label': the model knows no label 'pink', but blac"
    ):
        finetune(tmp_path / "run", config, show_progress=False)
