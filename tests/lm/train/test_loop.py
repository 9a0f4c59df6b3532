"""The loop: learning, resuming bit for bit, accumulation, the log, signals, and losses that blow up."""

import math
import signal

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.train.checkpoint import find_checkpoint, sorted_steps
from fastattn.lm.train.log import Log
from fastattn.lm.train.settings import TrainConfig
from fastattn.lm.train.tasks import next_token_loss


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, key="loss"):
    return {record["step"]: record[key] for record in trainer.log.records() if key in record}


def test_it_learns(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=60, dropout=0.0, log_every=10, eval_every=30, save_every=60)
    before = trainer.held_out_loss()
    progress = trainer.run()
    assert progress.step == 60 and progress.signal is None
    assert progress.held_out_loss < before - 1.0
    assert list(logged(trainer)) == [10, 20, 30, 40, 50, 60]
    assert list(logged(trainer, "held_out_loss")) == [30, 60]
    assert progress.tokens == sum(trainer.rows.batch(step, 4).num_labels() for step in range(60))


def test_resuming_is_bit_for_bit(make_trainer, tmp_path):
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    first = make_trainer(tmp_path / "parts")
    stop_after(first, 4)
    first.run()
    second = make_trainer(tmp_path / "parts")
    second.resume(find_checkpoint(tmp_path / "parts"))
    assert second.progress.step == 4
    second.run()
    assert torch.equal(weights(straight), weights(second))
    assert logged(straight) == logged(second)
    assert logged(straight, "held_out_loss") == logged(second, "held_out_loss")


@pytest.fixture
def default_sigint():
    """Python's own handler, also where the tests were started with SIGINT ignored, as in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop_after(trainer, steps):
    """Send the process a SIGINT while it is in step number ``steps``."""
    real = trainer.loss
    calls = []

    def loss(model, batch):
        if model.training:
            calls.append(1)
            if len(calls) == steps:
                signal.raise_signal(signal.SIGINT)
        return real(model, batch)

    trainer.loss = loss


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_finishes_the_step_and_saves(make_trainer, tmp_path, capfd):
    trainer = make_trainer(tmp_path, save_every=1000)
    stop_after(trainer, 3)
    progress = trainer.run()
    assert progress.signal == signal.SIGINT and progress.step == 3
    assert capfd.readouterr().err.count("stopping after this step") == 1
    assert find_checkpoint(tmp_path).trainer_state()["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_sigint")
def test_a_second_ctrl_c_acts_at_once(make_trainer, tmp_path):
    def loss(model, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return next_token_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, loss=loss).run()


def test_what_was_logged_after_the_checkpoint_is_forgotten(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=5, save_every=2, keep=9)
    trainer.run()
    with trainer.log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    other = make_trainer(tmp_path)
    other.resume(find_checkpoint(sorted_steps(tmp_path / "checkpoints")[0]))
    assert list(logged(other)) == [1, 2]


def test_accumulation_changes_nothing_but_rounding(make_trainer, tmp_path):
    whole = make_trainer(tmp_path / "a", dropout=0.0, steps=5)
    parts = make_trainer(tmp_path / "b", dropout=0.0, steps=5, micro_batch=3)
    whole.run(), parts.run()
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-5, rtol=1e-4)


def test_seeds(make_trainer, tmp_path):
    runs = [make_trainer(tmp_path / str(n), steps=3, seed=seed) for n, seed in enumerate((0, 0, 1))]
    for trainer in runs:
        trainer.run()
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(runs[2]))  # another seed of dropout


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(make_trainer, tmp_path):
    def loss(model, batch):
        return next_token_loss(model, batch) * (math.inf if len(logged(trainer)) == 3 else 1.0)

    trainer = make_trainer(tmp_path, loss=loss, save_every=2)
    with pytest.raises(FloatingPointError, match=r"not finite at step 4.*earlier checkpoints are intact\. Lower --lr"):
        trainer.run()
    assert find_checkpoint(tmp_path).trainer_state()["step"] == 2


def test_a_time_limit_stops_with_a_checkpoint(make_trainer, tmp_path):
    progress = make_trainer(tmp_path, steps=10**6, max_minutes=0.2 / 60).run()
    assert 0 < progress.step < 10**6 and progress.held_out_loss > 0
    assert find_checkpoint(tmp_path).trainer_state()["step"] == progress.step


def test_the_held_out_loss_is_the_mean_over_labels_without_dropout(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, dropout=0.5)
    trainer.model.train()
    rows = trainer.held_out_rows
    batch = next(rows.sample(10**6, 10**6))
    trainer.model.eval()
    expected = next_token_loss(trainer.model, batch).item() / batch.num_labels()
    trainer.model.train()
    assert trainer.held_out_loss(rows=10**6) == pytest.approx(expected, rel=1e-5)
    assert trainer.model.training


def test_bfloat16_trains_on_the_cpu_too(make_trainer, tmp_path):
    exact = make_trainer(tmp_path / "a", steps=8, dropout=0.0)
    rounded = make_trainer(tmp_path / "b", steps=8, dropout=0.0, precision="bfloat16")
    assert rounded.run().loss == pytest.approx(exact.run().loss, rel=0.01)
    assert not torch.equal(weights(exact), weights(rounded))


def test_a_log_ignores_torn_lines(tmp_path):
    log = Log(tmp_path / "deep" / "log.jsonl")
    assert log.records() == []
    log.write({"step": 1, "loss": 2.0})
    with log.path.open("a") as file:
        file.write('{"ste')
    assert log.records() == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch", 0), ("micro_batch", 17), ("seed", -1), ("precision", "fp8"), ("max_minutes", 0.0)],
)
def test_refusals(field, value):
    with pytest.raises(InputError, match=f"{field}: got"):
        TrainConfig(**{field: value})
