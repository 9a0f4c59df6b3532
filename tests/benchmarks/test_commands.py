"""Each command in its quick form on a CPU, and its errors for wrong arguments."""

import dataclasses
import importlib.util
import itertools
import json
import re

import pytest
import torch

import fastattn
from benchmarks import ops, peers, suites
from benchmarks.__main__ import main
from benchmarks.gpu_plan import KERNELS, Plan, timetable, undone
from benchmarks.record import read
from fastattn.backends.cuda import nvrtc
from fastattn.measure import speed
from fastattn.measure.speed import SpeedReport
from fastattn.measure.workload import Workload
from fastattn.testing import simulated

QUICK = ["--device", "cpu", "--threads", "1", "--quick", "--quiet"]


def test_ops_measures_records_and_prints(tmp_path, capsys):
    path = tmp_path / "ops.json"
    command = [
        "ops",
        *QUICK,
        "--suite",
        "cpu",
        "--case",
        "h2 d64",
        "--peers",
        "fastattn",
        "eager",
        "sdpa",
        "sdpa-cudnn",
    ]
    assert main([*command, "--no-memory", "--out", str(path)]) == 0
    data = read(path)
    ids = [result["id"] for result in data["results"]]
    assert "fp32 b1 s256 h2 d64 causal window 64" in ids and "bf16 b1 s256 h2 d64 causal 8 documents" in ids
    for result in data["results"]:
        for name in ("fastattn", "eager", "sdpa"):
            peer = result["peers"][name]
            if name != "fastattn" and peer.get("why"):  # it lacks what the case asks for
                continue
            for pass_name in ("forward", "both"):
                found = peer["passes"][pass_name]
                assert found["median_s"] > 0 and found["tflops"] > 0 and found["gate"].startswith("green")
        assert result["peers"]["sdpa-cudnn"] == {"why": "no cpu kernel", "passes": {}}
    assert data["ceilings"]["matmul_bf16_tflops"] > 0 and data["ceilings"]["copy_gbps"] > 0
    printed = capsys.readouterr().out
    assert printed.count("| forward ") == len(ids) and "sdpa-cudnn: no cpu kernel" in printed


def test_memory_on_a_cpu_is_part_of_the_table(tmp_path, capsys):
    path = tmp_path / "ops.json"
    assert main(["ops", *QUICK, "--suite", "cpu", "--case", "s1024", "--out", str(path)]) == 0
    passes = read(path)["results"][0]["peers"]["fastattn"]["passes"]
    assert passes["both"]["peak_bytes"] > 0 and passes["both"]["gate"].startswith("green")
    assert "MB" in capsys.readouterr().out


def test_an_instruction_set_is_a_limit_for_all_peers(monkeypatch):
    begun = []
    monkeypatch.setattr("os.execve", lambda *given: begun.append(given))
    monkeypatch.setattr(ops.command_line, "device", lambda args: 1 / 0)  # the process that begins again stops here
    with pytest.raises(ZeroDivisionError):
        main(["ops", *QUICK, "--isa", "avx2"])
    (_, command, environment), *_ = begun
    assert command[1:3] == ["-m", "benchmarks"] and command[-2:] == ["--isa", "avx2"]
    assert {environment[name] for name in ("FASTATTN_CPU_ISA", "ATEN_CPU_CAPABILITY")} == {"avx2"}


def test_a_spent_budget_is_said(tmp_path):
    path = tmp_path / "ops.json"
    assert main(["ops", *QUICK, "--suite", "small", "--budget", "0", "--out", str(path)]) == 0
    assert all(result["why"] == "the budget of 0 s was spent" for result in read(path)["results"])


def test_model(tmp_path, capsys):
    path = tmp_path / "model.json"
    assert main(["model", *QUICK, "--out", str(path)]) == 0
    results = read(path)["results"]
    rows = {(row["variant"], row["what"].split()[0]): row for row in results if row["dtype"] == "fp32"}
    kinds, whats = ("eager", "sdpa", "fastattn"), ("training", "generation,")
    assert set(rows) == set(itertools.product(kinds, whats)) and len(results) == 2 * len(rows)  # in bf16, too
    assert all(row["vs sdpa"].endswith("×") for row in results)
    apart = re.search(r"at most (\S+) from eager in (\d+) steps", rows["fastattn", "training"]["agreement"])
    assert float(apart[1]) < 1e-4 and int(apart[2]) >= 4
    assert rows["fastattn", "generation,"]["agreement"].startswith("100%")
    assert "tokens/s" in capsys.readouterr().out


def test_decode(tmp_path, capsys):
    path = tmp_path / "decode.json"
    assert main(["decode", *QUICK, "--out", str(path)]) == 0
    rows = read(path)["results"]
    assert {(row["cache"], row["dtype"]) for row in rows} >= {("contiguous", "fp32"), ("pages of 16", "bf16")}
    assert any("ragged" in row["what"] for row in rows)
    assert all(row["read"].endswith("GB/s") and row["vs gather + sdpa"].endswith("×") for row in rows[:-1])
    assert rows[-1]["what"].startswith("generation, 16 new tokens") and "100% the same tokens" in rows[-1]["error"]
    assert "sdpa, gathered before" in capsys.readouterr().out


def test_train(tmp_path):
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs it")
    path = tmp_path / "train.json"
    assert main(["train", *QUICK, "--out", str(path)]) == 0
    rows = {(row["trainer"].split(",")[0], row["precision"]): row for row in read(path)["results"]}
    assert len(rows) == 5 * 2
    for precision in ("fp32", "bf16"):
        losses = [rows[name, precision]["loss"].split(" to ") for name in ("fastattn", "nanoGPT's recipe")]
        assert all(abs(float(a) - float(b)) < 0.02 for a, b in zip(*losses, strict=True)), losses


def test_finetune(tmp_path):
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs it")
    path = tmp_path / "finetune.json"
    assert main(["finetune", *QUICK, "--epochs", "1", "--out", str(path)]) == 0
    baseline, *rows = read(path)["results"]
    assert "the largest class" in baseline["trainer"] and len(rows) == 2
    assert all(0 <= float(row["accuracy"]) <= 1 and row["training"].split()[1] for row in rows)


def test_speculative(tmp_path):
    path = tmp_path / "speculative.json"
    assert main(["speculative", *QUICK, "--out", str(path)]) == 0
    rows = read(path)["results"]
    trees, invariant, texts = (
        [row for row in rows if kind in row["what"]] for kind in ("tree of 15", "batch-invariant", "text that repeats")
    )
    assert {row["dtype"] for row in trees} == {"fp32", "bf16"} and len(invariant) == 4 and len(texts) == 3
    for row in trees:
        assert float(row["beside"].split("× ")[-2].split()[-1]) > 0 and row["beside"].endswith(
            "a call for each of 8 paths"
        )
    assert all("4 of 4 sequences" in row["agreement"] for row in invariant)
    for row in texts:
        said = re.fullmatch(r"100% the same tokens, (\d+) calls", row["agreement"])
        assert said and int(said[1]) < 24 / 2, "guesses are right"


def test_layers(tmp_path):
    path = tmp_path / "layers.json"
    assert main(["layers", *QUICK, "--out", str(path)]) == 0
    *rows, token = read(path)["results"]
    assert len(rows) == 2 * 2 * 4 and "absorbed" in token["what"]
    assert all(row["vs eager"].endswith("×") and row["vs sdpa"].endswith("×") for row in (*rows, token))


def test_derivatives(tmp_path):
    path = tmp_path / "derivatives.json"
    assert main(["derivatives", *QUICK, "--no-flex", "--out", str(path)]) == 0
    found = {result["what"]: result for result in read(path)["results"]}
    assert "× ours" in found["fp32 128 tokens: double backward"]["torch math"]
    assert found["bf16 128 tokens, window of 256: jvp"]["beside"].endswith("× forward")
    assert found["fp32 16 samples of 16 tokens: vmap(grad)"]["target"] == "1.5×"
    if importlib.util.find_spec("opacus") is None:
        assert found["fp32 16 samples of 16 tokens, a layer: Opacus' hooks"]["fastattn"] == "opacus is not installed"
    blocks = found["bf16 1024 tokens, a quarter of all blocks of 64*: backward"]
    assert blocks["target"] == "80%" and blocks["beside"].endswith("of all pairs' speed, 25.0% kept")


def test_overhead(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    assert main(["overhead", *QUICK, "--out", str(path)]) == 0
    rows = [row["what"] for row in read(path)["results"]]
    assert {
        "one call, forward, fastattn",
        "one call, both, sdpa",
        "import, above torch's own",
        "size of the package",
    } <= set(rows)


@pytest.mark.slow
def test_swap(tmp_path, capsys):
    path = tmp_path / "swap.json"
    for more in ([], ["--compiled", "--append"]):
        assert main(["swap", *QUICK, "--only", "scaled_dot_product_attention", *more, "--out", str(path)]) == 0
    results = read(path)["results"]
    compiled = [row for row in results if row["what"].endswith(", compiled")]
    assert len(compiled) == 2 * 2 and len(results) - len(compiled) == 3 * 2 * 2 + 2, "passes, dtypes and two means"
    assert all(float(row["times faster"].split("×")[0]) > 0 for row in results)
    assert "geometric mean of all compiled lines" in capsys.readouterr().out


def test_report_of_a_record(tmp_path, capsys):
    path = tmp_path / "ops.json"
    main(["ops", *QUICK, "--suite", "small", "--no-memory", "--peers", "fastattn", "sdpa", "--out", str(path)])
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    assert "vs best peer" in capsys.readouterr().out
    assert main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.md").exists()


needs_simulation = pytest.mark.skipif(
    simulated.unavailable_reason() is not None, reason=simulated.unavailable_reason() or ""
)


@pytest.mark.slow
@needs_simulation
def test_gpu_rehearsed(tmp_path, capsys, monkeypatch):
    """The plan of a GPU on the simulated one: every kind of step once, a short table, what would be undone."""
    phases = Plan.phases

    def each_kind(plan, unsafe=()):
        left_out = ("ops, cells", "ops, llm", "ops, features", "ops, small, flex")  # as the first numbers
        return (phase for phase in phases(plan, unsafe) if not any(step.name in left_out for step in phase))

    monkeypatch.setattr(Plan, "phases", each_kind)
    out = tmp_path / "out"
    assert main(["gpu", "--rehearse", "--quiet", "--out", str(out)]) == 0
    rows = {row["step"]: row for row in read(out / "gpu.json")["results"]}
    for step in ("first numbers, triton", "compile", "tests, triton"):
        assert rows[step]["result"] == "ok", rows[step]
    assert "green" in rows["first numbers, triton"]["note"] and "1 passed" in rows["tests, triton"]["note"]
    assert rows["tune D 128"]["result"] == "not rehearsed"
    assert {"gpu.json", "first-numbers-triton.json", "report.md"} <= {path.name for path in out.iterdir()}
    said = capsys.readouterr().out
    assert "fastattn-triton" in said and "| minute 1 |" in said and len(said.splitlines()) < 100


@needs_simulation
def test_gpu_out_of_time_is_rows_too(tmp_path, capsys):
    assert main(["gpu", "--rehearse", "--limit", "0", "--quiet", "--out", str(tmp_path)]) == 0
    assert {row["result"] for row in read(tmp_path / "gpu.json")["results"]} <= {
        "not begun",
        "missing",
        "not rehearsed",
    }
    assert "out of time" in capsys.readouterr().out


def test_the_plan_of_a_gpu_tells_the_most_first(tmp_path):
    """Nothing is timed beside something else, no step comes twice, and the first minute has the first numbers."""
    plan = Plan(tmp_path, KERNELS)
    steps = [step for phase in plan.phases() for step in phase]
    assert len({step.name for step in steps}) == len(steps)
    for phase in plan.phases():
        assert len(phase) <= 1 or all(step.name.startswith("tests") for step in phase)
    done_in_a_minute = {step.name for step in steps} - set(undone(plan, 540, 1))
    assert done_in_a_minute == {steps[0].name, "first numbers, cuda", "first numbers, triton"}
    assert steps[0].env == {nvrtc.WATCHDOG: "1"}, "the first call of all would say where it hangs"
    assert timetable(plan, 540)[-1][1] <= 540
    without = [step.name for phase in plan.phases({"cuda"}) for step in phase if "fastattn-cuda" in step.command]
    assert all("cuda" not in name or name.startswith(("first", "tests")) for name in without)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--suite", "nonsense"], "--suite: got 'nonsense'; allowed: paper, llm"),
        (["ops", "--peers", "fastatn"], "--peers: got fastatn; allowed: all, fastattn"),
        (["ops", "--suite", "cpu", "--case", "s99"], "no case of cpu contains 's99'"),
        (["ops", "--device", "tpu"], "--device: got 'tpu'; allowed: cpu, cuda"),
        (["ops", "--threads", "0", "--device", "cpu"], "--threads: got 0; allowed: at least 1"),
        (["model", "--preset", "vit-tiny", "--device", "cpu"], "--preset: got 'vit-tiny'; allowed: tiny, small"),
        (["model", "--length", "1", "--device", "cpu"], "--length: got 1; allowed: at least 2"),
        (["gpu", "--device", "cpu"], "allowed: cuda, or --rehearse"),
        (["report"], "no record given"),
        (["report", "nowhere.json"], "nowhere.json: No such file"),
        (["report", "--pages", "nowhere.md"], "nowhere.md: No such file"),
    ],
)
def test_wrong_arguments_end_with_a_sentence_and_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and "Traceback" not in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there(capsys):
    assert main(["ops", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_interpreter_is_not_measured(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["ops", "--device", "cpu"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["nonsense"])
    assert stopped.value.code == 2


# The data


def test_suites_are_sound():
    for suite in suites.SUITES.values():
        for cases in (suite.cases, suite.quick().cases):
            ids = [case.id for case in cases]
            assert len(set(ids)) == len(ids), suite.name
            for case in cases:
                assert Workload.from_dict(json.loads(json.dumps(case.to_dict()))) == case
                assert sum(case.lengths) == case.s_q and case.heads_q % case.heads_kv == 0


def test_the_cpu_suite_holds_what_the_targets_ask_for():
    cases = suites.SUITES["cpu"].cases
    plain = [c for c in cases if c.passes and c == dataclasses.replace(c, window=None, documents=1, bias=False)]
    found = {(c.dtype, c.d_qk, c.s_q, c.causal) for c in plain}
    long = {(d, s) for d in (64, 128) for s in (512, 1024, 2048, 4096)}
    for dtype in ("fp32", "bf16"):
        assert {(dtype, d, s, causal) for d, s in (*long, (64, 128)) for causal in (False, True)} <= found
    assert any((c.batch, c.heads_q, c.s_q) == (1, 1, 1024) for c in cases)  # fewer units than threads
    assert any(c.bias for c in cases) and any(c.softcap for c in cases) and any(c.dropout_p for c in cases)
    assert any(c.window == (255, 0) and c.s_q == 4096 for c in cases)
    assert any(c.documents == 8 and c.s_q == 8 * 512 for c in cases)
    assert any(c.documents == 64 and {*c.lengths} == {*range(5, 20)} for c in cases)
    assert {c.scattered for c in cases if c.mask} == {False, True}
    assert any(c.memory and (c.s_q, c.heads_q, c.d_qk, c.dtype) == (16384, 8, 64, "fp32") for c in cases)


def test_flops_count_kept_pairs_only():
    def flops(**changes):
        fields = {"s_q": 64, "s_kv": 64, "heads_q": 2, "heads_kv": 1, "d_qk": 16, "d_v": 16, "batch": 3} | changes
        return Workload(**fields).flops()

    assert flops()["forward"] == 3 * 2 * 64 * 64 * 2 * (16 + 16)
    assert flops()["backward"] == 2.5 * flops()["forward"] and flops()["both"] == 3.5 * flops()["forward"]
    assert flops(causal=True)["forward"] == flops()["forward"] * 65 // 128
    assert flops(documents=4, causal=True) == flops(s_q=16, s_kv=16, batch=12, causal=True)
    assert flops(documents=4, packed=True, batch=1) == flops(s_q=16, s_kv=16, batch=4)


def test_every_backend_and_every_known_library_is_a_peer():
    assert {f"fastattn-{name}" for name in fastattn.backends()} <= set(peers.PEERS)
    wanted = {"eager", "eager-compiled", "sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "flex"}
    assert wanted | {"torch-varlen", "flash-attn", "flash-attn-3", "xformers", "flashinfer"} <= set(peers.PEERS)
    assert [peer.name for peer in peers.chosen(["all"], "cpu")] == list(peers.PEERS)


def test_what_is_not_installed_says_so():
    workload = suites.SUITES["first"].cases[0]
    for name, module in (("flash-attn", "flash_attn"), ("xformers", "xformers"), ("flashinfer", "flashinfer")):
        if not peers._is_installed(module):
            assert peers.PEERS[name].reasons(workload, "cuda") == [f"{module} is not installed"]


# The demo's table


def test_speed_table(monkeypatch, tmp_path):
    small = lambda device, quick: [("full", speed._workload("full", 64, device, False))]  # noqa: E731
    monkeypatch.setattr(speed, "_workloads", small)
    report = speed.speed_table("cpu")
    assert isinstance(report, SpeedReport) and not report.entries[0].missing
    assert report.entries[0].times_faster_than("eager") > 0
    assert "vs eager" in report.table() and "full" in report.table()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["entries"][0]["length"] == 64 and len(data["entries"][0]["times"]["sdpa"]["rounds_s"]) >= 3
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_a_peer_without_a_number_says_why_in_the_speed_table():
    entry = speed.Entry("full", 64, {}, {}, {"eager": "red: out max at 3 of the bound"})
    text = SpeedReport("title", (entry,)).table()
    assert "no number: eager: red" in text and "x" not in text.splitlines()[3]
