"""The commands through main([...]): output, exit codes, and each error that a user can cause."""

import builtins
import io
import json
import re
import resource
import subprocess
import sys

import pytest

import fastattn
from fastattn.cli import main, train
from fastattn.lm.train import RunConfig, find_checkpoint

SMALL = ["--batch", "2", "--length", "16", "--vocab-size", "300", "--eval-rows", "2", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * (number + 2))
    return folder


@pytest.fixture(scope="module")
def out(texts, tmp_path_factory):
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "--data", str(texts), "--out", str(folder), "--steps", "6", "--save-every", "3", *SMALL]) == 0
    return folder


def fails(capsys, arguments, words):
    """The command ends with code 2 and one sentence on stderr."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    message = capsys.readouterr().err
    assert re.search(words, message), message
    assert message.startswith(f"fastattn {arguments[0]}: ") and message.count("\n") == 1


@pytest.mark.parametrize("command", [(), ("info",), ("verify",), ("train",), ("generate",), ("demo",)])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    assert "usage: fastattn" in capsys.readouterr().out


def test_help_of_the_script_does_not_wait_for_torch(tmp_path):
    script = tmp_path / "fastattn"
    script.write_text("import sys\nsys.modules['torch'] = None\nfrom fastattn.cli import main\nmain(sys.argv[1:])\n")
    ran = subprocess.run([sys.executable, script, "train", "--help"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage: fastattn train")


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"fastattn {fastattn.__version__}\n"


def test_the_help_tells_the_true_defaults():
    config = RunConfig()
    assert {flag.field: getattr(config, flag.field) for flag in train.FLAGS} == {
        flag.field: flag.default for flag in train.FLAGS
    }


@pytest.mark.parametrize("arguments", [[], ["sing"], ["train"], ["train", "--out", "x", "--steps", "many"],
                                       ["train", "--out", "x", "--attention", "flash"]])  # fmt: skip
def test_wrong_flags_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "triton", "python", "nvcc", "cpu", "eager", "portable", "CUDA kernels", "CPU kernels"):
        assert re.search(rf"^  {word} +\S", text, re.M), word


def test_train_says_how_it_went(out, texts, capsys):
    assert find_checkpoint(out).trainer_state()["step"] == 6
    assert main(["train", "--out", str(out), "--resume", "--steps", "8", "--quiet"]) == 0
    text = capsys.readouterr().out
    for figure in (
        "steps +8",
        r"held-out loss \(nats per token\) +\d",
        "unigram entropy .* +\\d",
        "bits per byte +\\d",
    ):
        assert re.search(figure, text), figure


def test_resuming_keeps_the_settings_and_refuses_others(out, capsys):
    state = find_checkpoint(out).trainer_state()["settings"]["run"]
    assert state["length"] == 16 and state["batch"] == 2
    resume = ["train", "--out", out, "--resume", "--quiet"]
    fails(
        capsys, [*resume, "--batch", "3"], r"--batch: got 3; allowed: 2, as before\. Leave the flag out when resuming"
    )
    fails(capsys, [*resume, "--vocab-size", "400"], "--vocab-size: got 400")
    assert main(list(map(str, [*resume, "--batch", "2", "--steps", "6"]))) == 0


def test_a_run_is_not_written_over(out, texts, capsys):
    fails(capsys, ["train", "--data", texts, "--out", out, *SMALL], "already holds a run: add --resume")


def test_resuming_on_other_text_is_refused(out, texts, capsys):
    path = texts / "3.py"
    before = path.read_text()
    path.write_text(before + "# edited\n")
    fails(capsys, ["train", "--out", out, "--resume", "--quiet"], "The text is not what the run was trained on")
    path.write_text(before)


def test_a_run_inside_its_data_does_not_read_itself(texts, tmp_path):
    for path in texts.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    command = ["train", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*command, "--data", str(tmp_path), "--steps", "2", *SMALL]) == 0
    assert main([*command, "--resume", "--steps", "3"]) == 0


def test_eager_and_fastattn_train_alike(texts, tmp_path):
    losses = []
    for kind in ("eager", "fastattn"):
        folder = tmp_path / kind
        flags = ["--attention", kind, "--steps", "20", "--log-every", "1", *SMALL]
        assert main(["train", "--data", str(texts), "--out", str(folder), *flags]) == 0
        lines = (folder / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_evaluate_counts_rows_as_they_are(out, texts, capsys):
    assert main(["evaluate", "--checkpoint", str(out), "--data", str(texts), "--limit", "2", "--device", "cpu"]) == 0
    assert re.search("evaluate: 100%.* 2/2 ", capsys.readouterr().err)


def test_generate_streams(out, capsys, monkeypatch):
    command = [
        "generate",
        "--checkpoint",
        str(out),
        "--prompt",
        "def f",
        "--tokens",
        "9",
        "--seed",
        "3",
        "--device",
        "cpu",
    ]
    pieces = []
    real = builtins.print
    monkeypatch.setattr(builtins, "print", lambda *a, **k: (pieces.append(a), real(*a, **k)))
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f") and len(pieces) > 3
    assert main([*command, "--no-cache"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--attention", "eager", "--temperature", "0"]) == 0


def test_generate_by_beams_and_with_every_rule(out, capsys, monkeypatch):
    command = ["generate", "--checkpoint", str(out), "--prompt", "def f", "--tokens", "9", "--device", "cpu"]
    assert main([*command, "--beams", "3", "--length-penalty", "0.5", "--page-size", "2"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f")
    assert main([*command, "--beams", "3", "--length-penalty", "0.5", "--no-cache"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--beams", "3", "--length-penalty", "0.5", "--stop", first[6]]) == 0
    assert first[6] not in capsys.readouterr().out[5:-1]
    assert main([*command, "--beams", "3", "--length-penalty", "0.5", "--repetition-penalty", "50"]) == 0
    assert capsys.readouterr().out != first
    monkeypatch.setattr("sys.stdin", io.StringIO("def f"))
    assert main([*command, "--prompt", "-", "--beams", "3", "--length-penalty", "0.5"]) == 0
    assert capsys.readouterr().out == first
    rules = ["--min-p", "0.01", "--repetition-penalty", "1.2", "--top-k", "50", "--seed", "1", "--page-size", "4"]
    assert main([*command, *rules]) == 0
    text = capsys.readouterr().out
    stop = text[len("def f") + 2 :][:1]
    assert main([*command, *rules, "--stop", stop]) == 0
    assert capsys.readouterr().out.rstrip("\n") == text[: text.index(stop, len("def f"))].rstrip("\n")


def test_generate_for_a_file_of_prompts_is_resumed(out, tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"def f{n}\n" for n in range(5)))
    command = ["generate", "--checkpoint", str(out), "--prompts", str(prompts), "--tokens", "6", "--seed", "3"]
    command += ["--device", "cpu", "--batch", "2", "--page-size", "4"]
    assert main(command) == 0
    assert "5 texts in" in capsys.readouterr().out
    path = tmp_path / "prompts.txt.out.jsonl"
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {row["id"]: row for row in whole[1:]}
    assert sorted(rows) == ["1", "2", "3", "4", "5"] and rows["2"]["prompt"] == "def f1"
    assert all(0 < row["tokens"] <= 6 for row in rows.values())
    path.write_text("".join(json.dumps(row) + "\n" for row in whole[:3]) + '{"id": "cut o')
    assert main(command) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["id"]: row for row in again[1:]} == rows  # the same draws as if nothing had happened
    assert main(command) == 0  # nothing left to do
    fails(capsys, [*command, "--temperature", "0.1"], r"made with other settings \(temperature\)")
    monkeypatch.setattr("sys.stdin", io.StringIO(prompts.read_text()))
    others = [*command, "--out", str(tmp_path / "stdin.jsonl")]
    others[others.index("--prompts") + 1] = "-"
    assert main(others) == 0
    again = [json.loads(line) for line in (tmp_path / "stdin.jsonl").read_text().splitlines()]
    assert {row["id"]: row for row in again[1:]} == rows
    prompts.write_text("x = 1 " * 60)
    fails(capsys, [*command, "--out", tmp_path / "o"], r"the prompt '1' has \d+ tokens, the model's max_length is 16")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "nowhere' does not exist"),
        (["--preset", "huge"], "preset: got 'huge'; allowed: tiny, small"),
        (["--steps", "0"], "steps: got 0"),
        (["--lr", "-1"], "lr: got -1.0"),
        (["--dropout", "1"], "dropout: got 1.0"),
        (["--vocab-size", "10"], "vocab_size: got 10; allowed: at least 258"),
        (["--length", "0"], " length: got 0; allowed: a positive int, or None"),
        (["--device", "warp"], "--device: got 'warp'; allowed: auto, cpu"),
        (["--resume"], "does not exist: give the --out folder"),
    ],
)
def test_bad_values(texts, tmp_path, capsys, flags, words):
    fails(capsys, ["train", "--data", texts, "--out", tmp_path / "run", *SMALL, *flags], words)


def test_an_empty_corpus(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    fails(capsys, ["train", "--data", tmp_path / "empty.txt", "--out", tmp_path / "run", *SMALL], "The corpus is empty")


def test_an_lr_that_blows_up(texts, tmp_path, capsys):
    flags = ["--lr", "1e30", "--clip", "1e30", "--steps", "30", "--log-every", "1", "--warmup", "0", *SMALL]
    fails(capsys, ["train", "--data", texts, "--out", tmp_path, *flags], "The loss is not finite at step .* Lower --lr")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature: got -1.0"),
        (["--top-p", "2"], "top_p: got 2.0"),
        (["--tokens", "0"], "--tokens: got 0; allowed: a positive int"),
        (["--min-p", "2"], "min_p: got 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty: got 0.0"),
        (["--beams", "0"], "--beams: got 0"),
        (["--batch", "0"], "--batch: got 0"),
        (["--stop", ""], "stop: got"),
        (["--page-size", "0"], "--page-size: got 0"),
        (["--out", "x.jsonl"], "--out, --pages: got a value; allowed: none without --prompts"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "-"], "--out: got nothing; allowed: a file for the answers"),
        (["--beams", "2", "--top-k", "3"], "--top-k: got 3; allowed: nothing with --beams"),
        (["--prompts", "nowhere.txt", "--beams", "3"], "--beams: got 3; allowed: nothing with --prompts"),
        (["--prompt", "x = 1\n" * 60], r"a prompt of \d+ tokens; allowed: at most max_length = 16"),
    ],
)
def test_bad_values_of_generate(out, capsys, flags, words):
    fails(capsys, ["generate", "--checkpoint", out, "--device", "cpu", *flags], words)


def test_a_foreign_and_a_truncated_checkpoint(out, tmp_path, capsys):
    fails(capsys, ["generate", "--checkpoint", tmp_path / "none"], "does not exist")
    fails(capsys, ["generate", "--checkpoint", tmp_path], "holds no checkpoint of fastattn")
    step = tmp_path / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    for path in find_checkpoint(out).folder.iterdir():
        (step / path.name).write_bytes(path.read_bytes()[: 200 if path.suffix == ".safetensors" else None])
    words = r"Every checkpoint in .* is damaged; the newest: model\.safetensors has changed since it was written"
    fails(capsys, ["generate", "--checkpoint", tmp_path, "--device", "cpu"], words)


def test_a_full_disk_ends_with_2_and_the_previous_checkpoint(texts, tmp_path, capsys):
    """The system itself refuses to write more than a limit to a file, as a full disk would."""
    command = ["train", "--data", str(texts), "--out", str(tmp_path), "--steps", "2", *SMALL]
    assert main(command) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        fails(
            capsys,
            ["train", "--out", tmp_path, "--resume", "--quiet", "--steps", "4"],
            "Could not write .*step-00000004",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_checkpoint(tmp_path).trainer_state()["step"] == 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert main(["train", "--out", str(tmp_path), "--resume", "--quiet", "--steps", "4"]) == 0
    assert find_checkpoint(tmp_path).trainer_state()["step"] == 4


def test_a_missing_package_names_the_extra(texts, tmp_path, capsys, monkeypatch):
    def run(args):
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(train, "run", run)
    fails(capsys, ["train", "--out", tmp_path], r"'tokenizers' is missing: pip install 'fastattn\[train\]'")


def test_a_module_of_ours_that_is_missing_is_a_bug_and_not_hidden(tmp_path, monkeypatch):
    def run(args):
        raise ModuleNotFoundError("No module named 'fastattn.gone'", name="fastattn.gone")

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "--out", str(tmp_path)])


def test_interrupted_outside_the_loop(tmp_path, capsys, monkeypatch):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", run)
    assert main(["train", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_while_training_exits_with_130(texts, tmp_path, monkeypatch, capsys):
    import signal

    from fastattn.lm.train import loop

    real = loop.Trainer._train_step

    def step(self, number, rate=None):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, number)

    monkeypatch.setattr(loop.Trainer, "_train_step", step)
    assert main(["train", "--data", str(texts), "--out", str(tmp_path), "--steps", "50", *SMALL]) == 130
    assert "--resume" in capsys.readouterr().err
    assert find_checkpoint(tmp_path).trainer_state()["step"] == 3


def test_verify_judges_and_writes_json(tmp_path, capsys, monkeypatch):
    from fastattn.testing import verify as module

    cases = tuple(case for case in module.grid() if case.group == module.grid()[0].group)[:2]
    monkeypatch.setattr(module, "cases", lambda **_: cases)
    path = tmp_path / "report.json"
    flags = ["--device", "cpu", "--backend", "eager", "--json", str(path), "--fuzz", "2"]
    assert main(["verify", *flags]) == 0
    text = capsys.readouterr().out
    assert "eager" in text and "2 random problems: all within" in text
    found = json.loads(path.read_text())
    assert found["ok"] and found["fuzz"] == {"problems": 2, "failure": None}


def test_verify_exits_with_1_on_a_breach(capsys, monkeypatch):
    from fastattn.testing import verify as module

    monkeypatch.setattr(module, "cases", lambda **_: ())
    assert main(["verify", "--device", "cpu", "--backend", "eager"]) == 1  # nothing ran, so nothing was shown


def test_refusals_of_verify(tmp_path, capsys, monkeypatch):
    from fastattn.testing import verify as module

    monkeypatch.setattr(module, "cases", lambda **_: ())
    fails(capsys, ["verify", "--backend", "warp", "--device", "cpu"], "backend: got 'warp'")
    fails(capsys, ["verify", "--fuzz", "-1"], "--fuzz: got -1")
    fails(capsys, ["verify", "--device", "cpu", "--backend", "eager", "--json", tmp_path], "Could not write")
