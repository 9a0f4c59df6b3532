"""Options of the loop: recomputed activations, torch.compile, TensorBoard, the loss curve, what the bar shows."""

import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.errors import InputError, UnsupportedError
from fastattn.lm.models import Decoder, EncoderDecoder, TransformerConfig, make_model, preset
from fastattn.lm.train import loop, plots
from fastattn.lm.train.checkpoint import find_checkpoint
from fastattn.lm.train.parallel import Ranks, blocks_of, save_parts
from fastattn.lm.train.recompute import recompute_blocks

CONFIG = TransformerConfig(60, width=32, layers=3, heads=2, kv_heads=1, max_length=64, dropout=0.1)


class Calls(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op] = self.counts.get(op, 0) + 1
        return op(*args, **(kwargs or {}))


def step(model, tokens):
    """Loss and gradients of a step with dropout, the calls of operators, and the bytes kept for the backward pass."""
    kept = []

    def keep(x):
        kept.append(x.numel() * x.element_size())
        return x

    torch.manual_seed(5)
    with Calls() as calls:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens).float().logsumexp(-1).sum()
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], calls.counts, sum(kept)


def test_recomputing_changes_no_gradient_and_runs_attention_once():
    tokens = torch.randint(60, (2, 64))
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    loss, grads, _, kept = step(model, tokens)
    model.zero_grad()
    recompute_blocks(model)
    again, others, counts, less = step(model, tokens)
    assert torch.equal(loss, again) and all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    (attention,) = fastattn.SAC_SAVE_OPS
    assert counts[attention] == CONFIG.layers  # once forward, and not again
    assert counts[torch.ops.aten.silu.default] == 2 * CONFIG.layers  # the MLP twice
    assert less < kept / 2
    assert list(model.state_dict()) == list(Decoder(CONFIG).state_dict())


def test_every_kind_of_model_has_its_blocks():
    for name in ("tiny", "encoder-tiny", "seq2seq-tiny", "vit-tiny"):
        try:
            model = make_model(preset(name, vocab_size=300))
        except InputError:
            continue
        stacks = 2 if isinstance(model, EncoderDecoder) else 1
        assert len(blocks_of(model)) >= stacks * model.config.layers


def test_a_run_with_recomputing_is_the_same_run(make_trainer, tmp_path):
    plain, saving = make_trainer(tmp_path / "a", steps=4), make_trainer(tmp_path / "b", steps=4, recompute=True)
    plain.run(), saving.run()
    for ours, theirs in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_it_learns_the_same(make_trainer, tmp_path, monkeypatch):
    used = []

    def compile_without_kernels(model, *args, **options):
        used.append(model)
        return real(model, *args, **(options | {"backend": "aot_eager"}))

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    plain = make_trainer(tmp_path / "a", steps=3, dropout=0.0)
    fast = make_trainer(tmp_path / "b", steps=3, dropout=0.0, compile=True, recompute=True)
    assert fast.run().loss == pytest.approx(plain.run().loss, rel=1e-5) and used
    assert find_checkpoint(tmp_path / "b").load_pretrained().state_dict().keys() == plain.model.state_dict().keys()


def test_adamw_is_fused_on_a_cpu_too(make_trainer, tmp_path):
    assert all(group["fused"] for group in make_trainer(tmp_path).optimizer.param_groups)


def test_tensorboard_holds_the_log(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, steps=4, tensorboard=True).run()
    second = make_trainer(tmp_path, steps=6, tensorboard=True)
    second.resume(find_checkpoint(tmp_path))
    second.run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    logged = {record["step"]: record["loss"] for record in second.log.records() if "loss" in record}
    assert events.Scalars("loss")[5].value == pytest.approx(logged[6])
    assert {"held_out_loss", "lr", "grad_norm", "tokens_per_second"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_missing(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"tensorboard: got True.*pip install tensorboard"):
        make_trainer(tmp_path, tensorboard=True).run()


def test_weights_and_biases_offline(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    make_trainer(tmp_path, steps=2, save_every=2, wandb=True).run()
    second = make_trainer(tmp_path, steps=4, wandb=True)
    second.resume(find_checkpoint(tmp_path))
    second.run()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2 and len({path.name for path in runs}) == 1  # the parts of one run
    wanted, end = (b"held_out_loss", b"tokens_per_second", b"grad_norm"), time.monotonic() + 20
    while not all(name in path.read_bytes() for path in runs for name in wanted):  # its own process writes them
        assert time.monotonic() < end
        time.sleep(0.05)


def test_weights_and_biases_that_is_missing(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb: got True.*pip install wandb"):
        make_trainer(tmp_path, wandb=True).run()


@pytest.fixture
def drawn(monkeypatch):
    """The real drawing, and how many steps each picture shows."""
    steps = []

    def draw(records, levels, path):
        steps.append(max(record["step"] for record in records))
        plots.plot_losses(records, levels, path)

    monkeypatch.setattr(loop, "plot_losses", draw)
    return steps


def test_the_loss_curve_is_drawn_at_saves_and_at_the_end(make_trainer, tmp_path, drawn):
    make_trainer(tmp_path, steps=10, save_every=2).run()
    assert drawn[0] == 2 and drawn[-1] == 10 and len(drawn) < 5  # not again at once: drawing takes longer than steps
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".unfinished*"))


def test_without_matplotlib_it_trains_and_says_so(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "plot_losses", missing)
    trainer = make_trainer(tmp_path, steps=2)
    trainer.show_progress = True
    trainer.run()
    assert "No loss curve: matplotlib is missing" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


def missing(*_):
    raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def test_the_bar_and_the_log_tell_how_busy_the_device_is(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e9)
    trainer = make_trainer(tmp_path, steps=4)
    trainer.show_progress, trainer.flops_per_label = True, 1e3
    trainer.run()
    last = [record for record in trainer.log.records() if "mfu" in record][-1]
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * 1e3 / 1e9)
    shown = capsys.readouterr().err
    for word in ("loss=", "held-out=", "tok/s=", "mfu=", "4/4", "<"):
        assert word in shown, word


def test_one_process_is_all_processes():
    alone = Ranks()
    assert alone.leads and alone.most(3, 4.5) == [3, 4.5] and alone.from_first("x") == "x"
    assert torch.equal(alone.sum(torch.ones(2)), torch.ones(2))
    alone.wait()
    with alone.first_alone():
        pass


def test_numbers_cannot_be_saved_in_parts(tmp_path):
    with pytest.raises(UnsupportedError, match="'scale' has no dimension"):
        save_parts(tmp_path / "model", {"scale": torch.tensor(1.0)}, Ranks())
