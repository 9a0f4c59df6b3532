"""finetune, evaluate, generate and example through main([...]): output, files and errors."""

import dataclasses
import io
import json
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer

from fastattn.cli import finetune, main
from fastattn.lm.examples import shipped
from fastattn.lm.examples.stdlib import Docstring, Sentence, Summary
from fastattn.lm.finetune.datasets import read_examples
from fastattn.lm.finetune.examples import FIELDS
from fastattn.lm.finetune.run import FinetuneConfig
from fastattn.lm.finetune.tasks import TASKS
from fastattn.lm.models import PRESETS, SequenceClassifier, make_model, preset, save_pretrained
from fastattn.lm.train import find_checkpoint
from fastattn.lm.train.tokens import train_tokenizer

QUICK = ["--batch", "4", "--vocab-size", "300", "--device", "cpu", "--quiet"]
PROMPTS = [{"prompt": f"say {word}: ", "response": word.upper()} for word in ("up", "down", "left", "right")]


@pytest.fixture(autouse=True, scope="module")
def smaller_presets(smaller_tiny):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encoder-tiny", "seq2seq-mini", "seq2seq-tiny"):
            patch.setitem(PRESETS, name, PRESETS[name] | {"width": 32, "layers": 1, "heads": 2})
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.tsv"
    rows = [f"{word} number {n}\t{word}" for word in ("up", "down", "left") for n in range(6)]
    path.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    command = ["finetune", "--task", "classify", "--data", data, "--preset", "tiny", "--out", folder, "--steps", "6"]
    assert main([*map(str, command), "--eval", str(data), "--save-every", "3", *QUICK]) == 0
    return folder


def fails(capsys, arguments, words):
    """The command ends with code 2 and one sentence on stderr."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    message = capsys.readouterr().err
    assert re.search(words, message), message
    assert message.startswith(f"fastattn {arguments[0]}: ") and message.count("\n") == 1


@pytest.mark.parametrize("command", ["finetune", "evaluate", "example"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "usage: fastattn" in text
    if command == "finetune":
        for task, fields in FIELDS.items():
            assert re.search(rf"^  {task} +{', '.join(fields.required)}", text, re.M), task


def test_the_help_tells_the_true_defaults():
    config = FinetuneConfig(task="classify", data="x", checkpoint="y")
    for flag in finetune.FLAGS:
        assert getattr(config, flag.field) == flag.default, flag.name
    assert set(TASKS) == set(FIELDS)


def test_finetune_says_how_it_went_and_resumes(out, capsys):
    assert find_checkpoint(out).trainer_state()["step"] == 6
    assert main(["finetune", "--out", str(out), "--resume", "--steps", "8", "--quiet"]) == 0
    text = capsys.readouterr().out
    for figure in ("steps +8", r"held-out accuracy +[01]\.", r"held-out F1 \(macro\)", "examples +18", "parameters +"):
        assert re.search(figure, text), figure
    fails(capsys, ["finetune", "--out", out, "--resume", "--task", "tag"], "--task: got tag; allowed: classify")


def test_evaluate_writes_a_table_and_json(out, data, tmp_path, capsys):
    path = tmp_path / "scores.json"
    assert main(["evaluate", "--checkpoint", str(out), "--data", str(data), "--json", str(path), "--quiet"]) == 0
    text, found = capsys.readouterr().out, json.loads(path.read_text())
    assert found["task"] == "classify" and found["sizes"] == {"examples": 18}
    for name, value in found["scores"].items():
        assert re.search(rf"^{re.escape(name)} +{value:.4f}$", text, re.M), name
    assert {"loss", "accuracy", "precision (macro)", "recall (macro)", "F1 (macro)", "Matthews"} <= set(found["scores"])
    limited = ["evaluate", "--checkpoint", str(out), "--data", str(data), "--limit", "5", "--quiet"]
    assert main(limited) == 0 and re.search("examples +5", capsys.readouterr().out)


def test_a_config_file_gives_the_settings(data, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(f'[finetune]\ntask = "classify"\ndata = "{data}"\npreset = "tiny"\nsteps = 2\nmethod = "lora"\n')
    assert main(["finetune", "--config", str(file), "--out", str(tmp_path / "run"), *QUICK]) == 0
    state = find_checkpoint(tmp_path / "run").trainer_state()["settings"]["finetune"]
    assert state["method"] == "lora" and state["data"] == str(data)


def test_pre_train_fine_tune_generate(data, tmp_path, capsys):
    """The whole way of a language model that follows instructions."""
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(f"say up: UP and say down: DOWN, number {number}\n" * 5)
    run, tuned = str(tmp_path / "run"), str(tmp_path / "tuned")
    command = ["train", "--data", str(corpus), "--out", run, "--steps", "2", "--length", "32", "--eval-rows", "2"]
    assert main([*command, *QUICK]) == 0
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    command = ["finetune", "--task", "instruct", "--data", str(path), "--checkpoint", run, "--out", tuned]
    assert main([*command, "--method", "lora", "--steps", "2", "--eval", str(path), *QUICK]) == 0
    assert re.search(r"held-out chrF +\d", capsys.readouterr().out)
    assert main(["generate", "--checkpoint", tuned, "--prompt", "say up: ", "--tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("say up: ")


def test_a_pretrained_gpt2_learns_to_follow_instructions_and_generates(tmp_path, capsys):
    tokenizer = train_tokenizer([record["prompt"] + record["response"] for record in PROMPTS], 300)
    text = tokenizer.to_str().replace("<|start|>", "<|endoftext|>").replace("<|end|>", "<|unused|>")
    model = make_model(dataclasses.replace(preset("gpt2-124m", 300), width=32, layers=1, heads=2, max_length=48))
    save_pretrained(model, tmp_path / "gpt2", tokenizer=Tokenizer.from_str(text))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    command = ["finetune", "--task", "instruct", "--data", path, "--pretrained", tmp_path / "gpt2", "--eval", path]
    tuned = str(tmp_path / "tuned")
    flags = ["--steps", "120", "--lr", "1e-2", "--batch", "4", "--device", "cpu", "--quiet", "--save-every", "1000"]
    assert main([*map(str, command), "--out", tuned, *flags]) == 0
    assert re.search(r"held-out exact match +1\.0", capsys.readouterr().out)
    command = ["generate", "--checkpoint", tuned, "--prompt", "say left: ", "--temperature", "0", "--device", "cpu"]
    assert main(command) == 0
    assert capsys.readouterr().out == "say left: LEFT\n"


def test_objectives_of_train(tmp_path, capsys):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"one and two and three, number {number}\n" * 5)
    for objective, kind in (("masked", "encoder"), ("span", "encoder-decoder")):
        run = tmp_path / "runs" / objective
        command = ["train", "--data", tmp_path / "*.txt", "--out", run, "--objective", objective, "--steps", "2"]
        assert main([*map(str, command), "--length", "32", "--eval-rows", "2", *QUICK]) == 0
        assert re.search(f"objective +{objective}", capsys.readouterr().out)
        assert find_checkpoint(run).config().kind == kind
        assert main(["evaluate", "--checkpoint", str(run), "--data", str(tmp_path / "1.txt"), "--quiet"]) == 0
    fails(capsys, ["generate", "--checkpoint", tmp_path / "runs" / "masked"], "is an encoder, which generates no text")
    command = ["generate", "--checkpoint", str(tmp_path / "runs" / "span"), "--prompt", "the source", "--tokens", "4"]
    for how in (["--temperature", "0"], ["--beams", "2"]):
        assert main([*command, *how]) == 0
        assert not capsys.readouterr().out.startswith("the source")  # an answer, not a continuation
    command = ["train", "--data", tmp_path, "--out", tmp_path / "x", "--objective", "span", "--quiet"]
    fails(
        capsys, [*command, "--preset", "bert-tiny"],
        "preset: got 'bert-tiny'; allowed: seq2seq-mini, .* A model of kind encoder-decoder is needed",
    )  # fmt: skip


def test_evaluate_shows_how_far_it_is(out, data, capsys):
    assert main(["evaluate", "--checkpoint", str(out), "--data", str(data)]) == 0
    bars = capsys.readouterr().err
    assert re.search(r"loss: 100%.* 18/18 ", bars) and re.search(r"predict: 100%.* 18/18 ", bars)


@pytest.mark.parametrize("package", ["sacrebleu", "torchmetrics"])
def test_what_scores_need_is_missed_before_the_training(package, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    command = ["finetune", "--task", "classify", "--data", data, "--preset", "tiny", "--out", tmp_path / "new", *QUICK]
    fails(capsys, command, rf"the package '{package}' is missing: pip install 'fastattn\[eval\]'")
    assert not (tmp_path / "new").exists()


def test_errors(out, data, tmp_path, capsys):
    new = ["finetune", "--out", tmp_path / "new", "--quiet"]
    whole = [*new, "--task", "classify", "--data", data]
    fails(capsys, [*new, "--data", data], "--task: got nothing; allowed: a value. A new run needs it")
    fails(capsys, [*new, "--task", "tag"], "--data: got nothing")
    fails(capsys, whole, "the start: got none; allowed: one of --checkpoint, --pretrained and --preset")
    fails(capsys, [*whole, "--preset", "huge"], "preset: got 'huge'; allowed: .*encoder-tiny")
    fails(capsys, [*whole, "--checkpoint", tmp_path / "no"], "does not exist")
    todo = "There is no folder 'google/t5'.* fetch a model with: hf download google/t5 --local-dir t5"
    fails(capsys, [*whole, "--pretrained", "google/t5"], todo)
    (tmp_path / "empty").mkdir()
    fails(
        capsys, [*whole, "--pretrained", tmp_path / "empty"], r"holds no tokenizer.json: AutoTokenizer.*save_pretrained"
    )
    fails(capsys, [*new, "--task", "tag", "--data", data, "--preset", "tiny"], "line 2, field 'words': it is missing")
    fails(capsys, [*new, "--task", "seq2seq", "--data", tmp_path / "no.jsonl", "--preset", "tiny"], "cannot be read")
    fails(capsys, ["evaluate", "--checkpoint", out, "--data", data, "--limit", "0"], "--limit: got 0")
    fails(capsys, ["evaluate", "--checkpoint", tmp_path / "no", "--data", data], "does not exist")
    fails(
        capsys, ["generate", "--checkpoint", out, "--prompt", "x"], "is a model for classify, which generates no text"
    )
    fails(capsys, ["example", "code", "--out", out], "holds something already: choose another --out")
    fails(capsys, ["example", "code", "--out", tmp_path / "e", "--steps", "0"], "--steps: got 0")


def small_library(monkeypatch, tmp_path):
    """A few invented items instead of the standard library's, which takes long to read."""
    packages = ("net", "data", "text")
    items = [
        (f"{package}/m{module}.py", package, f"{package} {verb} of thing {n} in module {module}, told at some length")
        for package in packages for module in range(6) for n, verb in enumerate(("read", "write", "open", "close") * 3)
    ]  # fmt: skip
    found = [Docstring(*item) for item in items]
    functions = [Summary(m, p, "Owner", f"def f_{n}(self):\n    return {n}", t) for n, (m, p, t) in enumerate(items)]
    files = []
    for number in range(30):
        path = tmp_path / "library" / f"m{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"def function_{number}(x):\n    return x + {number}\n" * 9)
        files.append(path)
    monkeypatch.setattr(shipped, "docstrings", lambda: found)
    monkeypatch.setattr(shipped, "summaries", lambda: functions)
    prose = [Sentence(m, p, f"About {t}.") for m, p, t in items]
    monkeypatch.setattr(shipped, "sentences", lambda: prose)
    monkeypatch.setattr(shipped, "find_files", lambda: files)
    monkeypatch.setattr(
        "fastattn.lm.examples.stdlib.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "library")}
    )


@pytest.mark.parametrize("name", sorted(shipped.EXAMPLES))
def test_examples(name, tmp_path, monkeypatch, capsys):
    small_library(monkeypatch, tmp_path)
    figures = tmp_path / "figures.json"
    shown_metrics = {"summarise": ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"], "classify": ["accuracy"], "code": ["loss"]}
    command = ["example", name, "--out", str(tmp_path / "out"), "--steps", "2", "--device", "cpu", "--quiet"]
    assert main([*command, "--json", str(figures)]) == 0
    text, found = capsys.readouterr().out, json.loads(figures.read_text())
    assert found == json.loads((tmp_path / "out" / "result.json").read_text())
    assert all(count > 0 for count in found["examples"].values())
    assert found["command"] == f"fastattn example {name} --steps 2" and str(tmp_path) not in figures.read_text()
    assert (tmp_path / "out" / found["checkpoint"]).is_dir()
    verdict = "better" if found["beats baseline"] else "NOT better"
    assert f"\n{verdict} than {'every' if name == 'summarise' else 'the'} baseline: {found['metrics'][0]} " in text
    assert found["metrics"] == shown_metrics[name]
    for metric in found["metrics"]:
        row = [*(baseline["scores"][metric] for baseline in found["baselines"]), found["model"][metric]]
        cells = " +".join(f"{x:.4f}" for x in row)
        assert re.search(rf"^{re.escape(metric)} +{cells}  <- counts$", text, re.M)
    assert all(baseline["what"] in text for baseline in found["baselines"])
    if name != "code":
        field = "text" if name == "classify" else "target"
        train, held_out = (
            {example.fields[field] for example in read_examples(tmp_path / "out" / "data" / f"{part}.jsonl", task)}
            for part in ("train", "held_out")
            for task in ["classify" if name == "classify" else "seq2seq"]
        )
        assert train and held_out and not train & held_out


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_predict_reads_files_and_stdin_and_writes_json_lines(out, data, tmp_path, capsys, monkeypatch):
    command = ["predict", "--checkpoint", str(out), "--device", "cpu", "--quiet"]
    assert main([*command, "--data", str(data), "--limit", "3"]) == 0
    printed = capsys.readouterr().out
    for line in lines_of(printed):
        prediction = line["prediction"]
        assert prediction["label"] in prediction["probabilities"] and "label" not in line["input"]
        assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    texts = [line["input"]["text"] for line in lines_of(printed)]
    monkeypatch.setattr(
        "sys.stdin", [texts[0] + "\n", "\n", json.dumps({"sentence": texts[1]}), json.dumps({"text": texts[2]})]
    )
    assert main([*command, "--out", str(tmp_path / "found.jsonl"), "--batch", "2"]) == 0
    for ours, theirs in zip(lines_of((tmp_path / "found.jsonl").read_text()), lines_of(printed), strict=True):
        assert ours["input"] == theirs["input"] and ours["prediction"]["label"] == theirs["prediction"]["label"]
        assert ours["prediction"]["probabilities"] == pytest.approx(theirs["prediction"]["probabilities"], abs=1e-5)


def test_predict_refuses_what_it_cannot_read(out, data, tmp_path, capsys, monkeypatch):
    command = ["predict", "--checkpoint", out, "--device", "cpu", "--quiet"]
    fails(capsys, [*command, "--batch", "0"], "--batch: got 0")
    fails(capsys, [*command, "--data", "-", data], "--data: got .*; allowed: - alone, or files")
    fails(capsys, [*command, "--field", "text"], "--field: got 'text'; allowed: FIELD=COLUMN")
    monkeypatch.setattr("sys.stdin", ['{"label": "x"}\n'])
    fails(capsys, command, "stdin, line 1, field 'text': it is missing")
    monkeypatch.setattr("sys.stdin", ["{x\n"])
    fails(capsys, [*command, "--out", tmp_path / "none"], "stdin, line 1: not JSON")
    assert not (tmp_path / "none").exists()


def test_evaluate_keeps_its_predictions(out, data, tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    assert main(["evaluate", "--checkpoint", str(out), "--data", str(data), "--quiet", "--predictions", str(path)]) == 0
    lines, scores = lines_of(path.read_text()), capsys.readouterr().out
    right = sum(line["example"]["label"] == line["prediction"]["label"] for line in lines) / len(lines)
    assert len(lines) == 18 and f"{right:.4f}" in re.search(r"^accuracy.*", scores, re.M)[0]


def test_several_files_are_scored_each_by_itself_and_the_columns_are_told(tmp_path, capsys, monkeypatch):
    for name in ("train", "dev_matched", "dev_mismatched"):
        rows = "".join(f"{word} {n}\tthen\t{word}\n" for word in ("up", "down") for n in range(4))
        (tmp_path / f"{name}.tsv").write_text("sentence1\tsentence2\tgold_label\n" + rows)
    command = ["finetune", "--task", "classify", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*command, "--preset", "tiny", "--steps", "1", "--batch", "4", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "train.tsv: 8 examples; text = sentence1, text_pair = sentence2, label = gold_label" in text
    assert "always 'up' has an accuracy of 0.5000" in text
    for name in ("matched", "mismatched"):
        assert re.search(rf"held-out accuracy \(dev_{name}\) +[01]\.", text)
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0
    lines = ['{"text": "up", "text_pair": "then"}\n', '{"text": "up", "sentence2": "x"}\n']
    for folder in ("run", "exported"):
        monkeypatch.setattr("sys.stdin", lines)
        fails(capsys, ["predict", "--checkpoint", tmp_path / folder], "input 2 has no 'text_pair', .* two texts")


def test_numbers_with_fractions_are_no_classes(tmp_path, capsys):
    path = tmp_path / "sts.tsv"
    path.write_text("sentence1\tsentence2\tscore\na\tb\t3.8\nb\tc\t1.0\nc\td\t2.2\n")
    command = ["finetune", "--data", path, "--preset", "tiny", "--out", tmp_path / "run", *QUICK]
    words = "3 numbers with fractions, such as 2.2, which are no classes: predict numbers with --task regression"
    fails(capsys, [*command, "--task", "classify", "--field", "label=score"], words)


def typed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_conversation_is_learned_and_held(tmp_path, capsys, monkeypatch):
    """finetune --task chat, chat, and predict, from conversations in the form that everyone has them."""
    path, run = tmp_path / "chats.jsonl", str(tmp_path / "run")
    talks = [
        [("user", "say up"), ("assistant", "UP"), ("user", "again"), ("assistant", "UP UP"), ("user", "thanks")],
        [("user", "say down"), ("assistant", "DOWN"), ("user", "again"), ("assistant", "DOWN DOWN")],
    ]
    lines = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["finetune", "--task", "chat", "--data", str(path), "--eval", str(path), "--preset", "tiny", "--out", run]
    flags = ["--steps", "150", "--lr", "1e-2", "--save-every", "1000", "--eval-every", "1000"]
    assert main([*command, *flags, *QUICK]) == 0
    assert re.search(r"held-out exact match +1\.0", capsys.readouterr().out)
    command = ["chat", "--checkpoint", run, "--temperature", "0", "--tokens", "20", "--device", "cpu"]
    typed(monkeypatch, "say down\nagain\n<|end|>\n/new\n\nsay up\n/exit\nsay down\n")
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == "DOWN\nDOWN DOWN\nUP\n"
    assert re.fullmatch(r"fastattn chat: A message contains the special token '<\|end\|>'\. Remove it: .*\n", said.err)
    typed(monkeypatch, json.dumps(lines[0]) + "\nsay down\n")
    assert main(["predict", "--checkpoint", run, "--quiet", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1]["prediction"] == {"response": "DOWN"} and len(rows[0]["input"]["messages"]) == 5
    typed(monkeypatch, "say up\n" * 90)
    assert main([*command, "--system", "be brief"]) == 0  # the oldest turns are forgotten
    assert "oldest turns are forgotten: the model reads 256 tokens" in capsys.readouterr().err
    fails(capsys, [*command, "--tokens", "0"], "--tokens: got 0")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    fails(capsys, [*command, "--chat-template", tmp_path / "bad.jinja"], "The chat template is not valid Jinja")
    step = find_checkpoint(tmp_path / "run").folder
    state = json.loads((step / "trainer.json").read_text())
    state["settings"].pop("chat_template")
    (step / "trainer.json").write_text(json.dumps(state))
    (step / "checksums.json").unlink()
    fails(capsys, command, "has no chat template: fine-tune it with fastattn finetune --task chat")


def test_folders_of_hugging_face_are_used_as_they_are(out, data, tmp_path, capsys, monkeypatch):
    """export a run; chat, generate, evaluate and predict take the folder as they took the run, and so do others."""
    tokenizer = train_tokenizer(["up and down, left and right"], 280)
    model = make_model(dataclasses.replace(preset("tiny", 280), width=32, layers=1, heads=2, kv_heads=1))
    folder = tmp_path / "qwen3"
    save_pretrained(model, folder, tokenizer=tokenizer, special_tokens={"bos": 0, "eos": 1})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    command = ["generate", "--checkpoint", str(folder), "--prompt", "up", "--tokens", "4", "--device", "cpu"]
    assert main(command) == 0 and capsys.readouterr().out.startswith("up")
    fails(capsys, ["chat", "--checkpoint", folder], "has no chat template")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    typed(monkeypatch, "up\n")
    assert main(["chat", "--checkpoint", str(folder), "--tokens", "3", "--device", "cpu"]) == 0
    assert main(["evaluate", "--checkpoint", str(folder), "--data", str(data), "--device", "cpu", "--quiet"]) == 0
    assert re.search("bits per byte", capsys.readouterr().out)
    fails(capsys, ["predict", "--checkpoint", folder, "--data", data], "it has the head of no task")
    # a classifier
    bert = dataclasses.replace(preset("bert-tiny", 280), width=32, layers=1, heads=2, max_length=64, pooler=True)
    torch.manual_seed(0)
    model = SequenceClassifier(make_model(bert), 3, labels=("up", "down", "left"))
    save_pretrained(model, tmp_path / "bert", tokenizer=tokenizer)
    typed(monkeypatch, "up number 3\n")
    assert main(["predict", "--checkpoint", str(tmp_path / "bert"), "--quiet", "--device", "cpu"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert set(prediction["probabilities"]) == {"up", "down", "left"}
    scores = ["evaluate", "--checkpoint", str(tmp_path / "bert"), "--data", str(data), "--device", "cpu", "--quiet"]
    assert main(scores) == 0 and "F1 (macro)" in capsys.readouterr().out


def test_export(tmp_path, capsys):
    """What was trained here computes the same in transformers."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"one and two and three, number {number}\n" * 5)
    run, folder = str(tmp_path / "run"), str(tmp_path / "folder")
    command = ["train", "--data", str(tmp_path / "text"), "--out", run, "--steps", "2", "--length", "32"]
    assert main([*command, "--eval-rows", "2", *QUICK]) == 0
    assert main(["export", "--checkpoint", run, "--out", folder]) == 0
    assert capsys.readouterr().out.endswith("Qwen3ForCausalLM\n")
    fails(capsys, ["export", "--checkpoint", run, "--out", folder], "exists already")
    ours, theirs = find_checkpoint(tmp_path / "run").load_pretrained(), transformers.AutoModelForCausalLM
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("one and two", return_tensors="pt").input_ids
    assert tokens[0, 0] == 0  # <|start|>, with which it was trained
    with torch.no_grad():
        expected = theirs.from_pretrained(folder)(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=0)
