"""Preference tuning: the loss by its formula, what is read, full weights and adapters by command, resumed exactly."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastattn.cli import main
from fastattn.errors import DataError, InputError
from fastattn.lm.finetune import FinetuneConfig, load_finetuned
from fastattn.lm.finetune.datasets import read_dataset
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.tasks.prefer import Prefer
from fastattn.lm.models import make_model, preset, save_pretrained
from fastattn.lm.train import find_checkpoint
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import padded
from fastattn.lm.train.tokens import train_tokenizer

PAIR = {"prompt": "Is the sky blue?", "chosen": " Yes, it is blue.", "rejected": " No."}
TURN = [{"role": "user", "content": "Is the sky blue?"}]


def read(tmp_path, record):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return read_dataset(path, "dpo").examples[0].fields


def test_the_usual_forms_are_read(tmp_path):
    assert read(tmp_path, PAIR | {"score": 1}) == PAIR
    answers = [{"role": "assistant", "content": text} for text in ("Yes.", "No.")]
    talk = {"prompt": "Is the sky blue?", "chosen": [*TURN, answers[0]], "rejected": [*TURN, answers[1]]}
    expected = {"prompt": TURN, "chosen": "Yes.", "rejected": "No."}
    assert read(tmp_path, talk) == expected
    assert read(tmp_path, {name: talk[name] for name in ("chosen", "rejected")}) == expected
    begin = "\n\nHuman: Blue?\n\nAssistant: What?\n\nHuman: The sky.\n\nAssistant:"
    found = read(tmp_path, {"chosen": begin + " Yes.", "rejected": begin + " Yeast."})
    assert found == {"prompt": begin, "chosen": " Yes.", "rejected": " Yeast."}
    with pytest.raises(DataError, match="must differ in their last message alone"):
        read(tmp_path, talk | {"rejected": [{"role": "user", "content": "Other"}, answers[1]]})
    with pytest.raises(DataError, match="field 'rejected': it is missing; an example for dpo has prompt, chosen"):
        read(tmp_path, {"prompt": "a", "chosen": "b"})


@pytest.fixture
def task():
    tokenizer = train_tokenizer([PAIR["prompt"] + PAIR["chosen"] + PAIR["rejected"]] * 9, 290)
    return Prefer(tokenizer, preset("tiny", 290), length=64)


def made(seed):
    torch.manual_seed(seed)
    return make_model(preset("tiny", 290)).eval()


@torch.no_grad()
def test_the_loss_is_that_of_the_paper(task):
    examples = [Example("1", PAIR), Example("2", {"prompt": "Sky?", "chosen": "Blue", "rejected": "It is not blue."})]
    model, before = made(1), made(0)
    features = task.with_reference(before, [x for e in examples for x in task.features(e)], show_progress=False)
    expected = []
    for example in examples:
        prompt, margin = task.prompt(example), 0.0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            answer = [*task.ids(example.fields[side]), task.special.end]
            for network, factor in ((model, 1), (before, -1)):
                log_p = network(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0, len(prompt) - 1 : -1]
                margin += sign * factor * float(log_p[range(len(answer)), answer].sum())
        expected.append(0.1 * margin)
    margins = task.margins(model, padded(features))
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    loss = -F.logsigmoid(torch.tensor(expected)).sum()
    torch.testing.assert_close(task.loss(model, padded(features)), loss, rtol=1e-4, atol=1e-4)
    assert padded(features).num_labels() == 2
    alone = task.loss(model, padded(features[:1])) + task.loss(model, padded(features[1:]))
    torch.testing.assert_close(alone, loss, rtol=1e-4, atol=1e-4)  # padding changes nothing


def test_conversations_go_through_the_template(task):
    chat = Prefer(task.tokenizer, preset("tiny", 290), chat_template="{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}")  # noqa: E501  # fmt: skip
    talk = [*TURN, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Why"}]
    (feature,) = chat.features(Example("1", {"prompt": talk, "chosen": "Because", "rejected": "So"}))
    learned = [x for x in feature["chosen_labels"] if x != IGNORED]
    assert chat.tokenizer.decode(learned).startswith("Because") and "Yes" not in chat.tokenizer.decode(learned)
    with pytest.raises(DataError, match="no chat template for messages"):
        task.features(Example("1", {"prompt": talk, "chosen": "Because", "rejected": "So"}))


@pytest.fixture
def pairs(tmp_path):
    lines = []
    for n in range(8):
        prompt = f"Count from {n}: "
        lines.append({"prompt": prompt, "chosen": f"{n}, {n + 1}", "rejected": "zzz"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


QUICK = ["--device", "cpu", "--quiet", "--batch", "4", "--length", "32", "--eval-rows", "4", "--save-every", "9"]


def test_commands_with_all_weights_and_with_adapters(pairs, task, tmp_path, capsys):
    special = {"bos": 0, "eos": 1}
    save_pretrained(made(0), tmp_path / "start", tokenizer=task.tokenizer, special_tokens=special)
    prefer = ["finetune", "--task", "dpo", "--data", pairs, "--eval", pairs, "--pretrained", str(tmp_path / "start")]
    prefer += [*QUICK, "--lr", "3e-3", "--warmup", "0", "--final-lr", "1"]
    for method, out in (("full", tmp_path / "full"), ("lora", tmp_path / "lora")):
        assert main([*prefer, "--method", method, "--steps", "8", "--out", str(out)]) == 0
        scores = json.loads((out / "scores.json").read_text())
        assert scores["preference accuracy"] > 0.9 and scores["margin"] > 0.1 and scores["loss"] < 0.69
    parts = ["--out", str(tmp_path / "parts")]
    assert main([*prefer, "--method", "lora", "--steps", "4", *parts]) == 0
    assert main(["finetune", "--resume", "--steps", "8", "--device", "cpu", "--quiet", *parts]) == 0
    weights = [load_finetuned(find_checkpoint(tmp_path / name)).model.state_dict() for name in ("lora", "parts")]
    assert all(torch.equal(weights[1][name], x) for name, x in weights[0].items())
    capsys.readouterr()
    full = ["--checkpoint", str(tmp_path / "full"), "--device", "cpu"]
    assert main(["evaluate", *full, "--data", pairs, "--limit", "4", "--quiet"]) == 0
    assert "preference accuracy" in capsys.readouterr().out
    assert main(["generate", *full, "--prompt", "Count", "--tokens", "3"]) == 0


def test_refusals():
    with pytest.raises(InputError, match="preset: got 'tiny'; allowed: --checkpoint or --pretrained for dpo"):
        FinetuneConfig("dpo", "x", preset="tiny")
    with pytest.raises(InputError, match="dpo_beta: got 0"):
        FinetuneConfig("dpo", "x", checkpoint="y", dpo_beta=0)
