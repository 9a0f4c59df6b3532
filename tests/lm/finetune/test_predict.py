"""Predictions without labels: their form for every task, entities, and answers with their places."""

import json

import pytest
import torch

from fastattn.errors import DataError, InputError
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.load import Finetuned
from fastattn.lm.finetune.tasks import TASKS
from fastattn.lm.models import make_model, preset
from fastattn.lm.train.tokens import train_tokenizer

LABELS = {
    "classify": ("no", "yes"),
    "multilabel": ("a", "b"),
    "regression": ("10.0", "2.0"),
    "tag": ("B-x", "I-x", "O"),
}
INPUTS = {
    "tag": {"words": ["a", "b", "c"]}, "qa": {"question": "who?", "context": "it was Ada"},
    "seq2seq": {"source": "a"}, "instruct": {"prompt": "a"},
    "chat": {"messages": "a"}, "dpo": {"prompt": "a"},
}  # fmt: skip
KEYS = {
    "classify": ["label", "probabilities", "probability"], "regression": ["value"],
    "multilabel": ["labels", "probabilities"], "tag": ["labels", "probabilities", "spans"],
    "qa": ["answer", "end", "score", "start"], "seq2seq": ["target"], "instruct": ["response"],
    "chat": ["response"], "dpo": ["response"],
}  # fmt: skip


def untrained(name, labels=None):
    tokenizer = train_tokenizer(["a b c it was Ada who?"], 270)
    sizes = {"seq2seq": "seq2seq-tiny", "instruct": "tiny", "chat": "tiny", "dpo": "tiny"}.get(name, "encoder-tiny")
    torch.manual_seed(0)
    config = preset(sizes, 270).to_dict() | {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 32}
    config = type(preset(sizes, 270)).from_dict(config)
    task = TASKS[name](tokenizer, config, LABELS.get(name, ()) if labels is None else labels)
    return Finetuned(task.add_head(make_model(config)).eval(), task)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.reads_images])
def test_a_prediction_has_the_form_of_its_task_and_is_json(name):
    found = untrained(name).predict([INPUTS.get(name, "a b")] * 2, batch=1)
    assert sorted(found[0]) == sorted(found[1]) == KEYS[name]
    assert json.loads(json.dumps(found)) == found


def with_outputs(model, *outputs):
    """The model, with what its head gives."""
    values = tuple(torch.tensor(x) for x in outputs)
    model.model.forward = lambda *_, **__: values if len(values) > 1 else values[0]
    return model


def test_values_are_in_the_units_of_the_labels():
    assert with_outputs(untrained("regression"), [[1.5]]).predict(["a"]) == [{"value": 13.0}]


def test_labels_above_one_half_are_given():
    assert with_outputs(untrained("multilabel"), [[1.0, -1.0]]).predict(["a"])[0]["labels"] == ["a"]


def test_entities_are_told_with_their_words():
    tagger = untrained("tag")
    starts = tagger.task._tokens(Example("", {"words": ["a", "b", "c"]}))[1]
    logits = torch.zeros(1, 24, 3)
    for start, number in zip(starts, (0, 1, 2), strict=True):
        logits[0, start, number] = 9.0
    (found,) = with_outputs(tagger, logits.tolist()).predict([{"words": "a b c"}])
    assert found["labels"] == ["B-x", "I-x", "O"]
    assert found["spans"] == [{"label": "x", "text": "a b", "start": 0, "end": 2}]


@pytest.mark.parametrize(("labels", "answer"), [((), "Ada"), (("no answer",), "")])
def test_an_answer_has_its_place_and_a_model_that_learned_none_may_give_none(labels, answer):
    reader, context = untrained("qa", labels), "it was Ada"
    ((feature, offsets),) = reader.task._windows(Example("", {"question": "who?", "context": context}))
    inside = [n for n, place in enumerate(offsets) if place and place[1] > 7]
    logits = [[0.0] * len(feature["tokens"])] * 2
    start, end = torch.tensor(logits).unbind()
    start[inside[0]] = end[inside[-1]] = 5.0
    start[0] = end[0] = 6.0
    (found,) = with_outputs(reader, [start.tolist()], [end.tolist()]).predict([INPUTS["qa"] | {"context": context}])
    assert found["answer"] == answer and 0 < found["score"] <= 1
    assert (found["start"], found["end"]) == ((7, 10) if answer else (None, None))
    assert reader.task.label_names([Example("", {"answer": ""})]) == ("no answer",)


def test_wrong_inputs_are_named():
    with pytest.raises(DataError, match="input 2, field 'text': it is missing"):
        untrained("classify").predict(["a", {"words": "b"}])
    with pytest.raises(InputError, match="batch: got 0"):
        untrained("classify").predict(["a"], batch=0)
