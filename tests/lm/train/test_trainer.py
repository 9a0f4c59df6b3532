"""The trainer knows no task: any model, rows and loss; metrics, early stopping, the best checkpoint, frozen weights."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastattn.errors import DataError, InputError
from fastattn.lm.train.checkpoint import find_checkpoint, sorted_steps
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.settings import TrainConfig

OPTIM = {"lr": 0.03, "warmup": 0, "final_lr": 1.0, "weight_decay": 0.0}  # a rate that does not depend on the steps


@dataclass(frozen=True)
class Points:
    """Points of a line to be learned."""

    x: Tensor
    y: Tensor

    def to(self, device):
        return Points(self.x.to(device), self.y.to(device))

    def split(self, rows):
        return (Points(*parts) for parts in zip(self.x.split(rows), self.y.split(rows), strict=True))

    def num_labels(self):
        return len(self.y)


class Line:
    def batch(self, step, rows):
        x = torch.arange(step * rows, (step + 1) * rows)[:, None] % 7 / 7.0
        return Points(x, 3 * x - 1)

    def sample(self, rows, batch_rows):
        return self.batch(0, rows).split(batch_rows)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head, self.unused = nn.Linear(1, 8), nn.Linear(8, 1), nn.Linear(1, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone(x)))


def squared_error(model, batch):
    return (model(batch.x) - batch.y).square().sum()


@pytest.fixture
def make(tmp_path):
    def make(model=None, evaluate=None, folder=tmp_path, **changes):
        config = TrainConfig(steps=20, batch=4, eval_every=2, eval_rows=7, save_every=10, log_every=1, **OPTIM)
        return Trainer(
            Net() if model is None else model, None, (Line(), Line()), dataclasses.replace(config, **changes), folder,
            loss=squared_error, evaluate=evaluate, model_config={"kind": "net"}, show_progress=False,
        )  # fmt: skip

    return make


def scripted(*values):
    """An evaluation that finds these values of "score", one after another, and the last one from then on."""
    left = list(values)
    return lambda model: {"score": left.pop(0) if len(left) > 1 else left[0]}


def test_any_model_rows_and_loss(make):
    trainer = make(steps=200)
    before = trainer.held_out_loss()
    assert trainer.run().held_out_loss < before / 20
    checkpoint = find_checkpoint(trainer.folder)
    assert checkpoint.model_config() == {"kind": "net"}
    assert not (checkpoint.folder / "tokenizer.json").exists()
    model = Net()
    checkpoint.load_weights(model)
    assert torch.equal(model.head.weight, trainer.model.head.weight)


def test_metrics_are_of_the_model_in_evaluation_mode_and_go_into_the_log(make):
    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        return {"score": 0.5}

    progress = make(evaluate=evaluate, steps=4).run()
    assert progress.metrics == {"score": 0.5}
    trainer = make()
    assert [r["score"] for r in trainer.log.records() if "score" in r] == [0.5, 0.5]


def test_patience_stops_and_the_best_checkpoint_stays(make):
    options = {"patience": 3, "metric": "score", "greater_is_better": True, "keep": 1, "save_every": 1}
    trainer = make(evaluate=scripted(1, 5, 3, 4, 5, 9), **options)
    progress = trainer.run()
    assert (progress.step, progress.best, progress.best_step, progress.stale) == (10, 5, 4, 3)
    assert [path.name for path in sorted_steps(trainer.folder / "checkpoints")] == ["step-00000004", "step-00000010"]
    assert find_checkpoint(trainer.folder).folder.name == "step-00000010"
    assert find_checkpoint(trainer.folder, best=True).folder.name == "step-00000004"


def test_without_patience_it_goes_on_and_the_best_is_still_known(make):
    progress = make(evaluate=scripted(5, 1, 2), steps=10, keep_best=True, metric="score", save_every=3, keep=1).run()
    assert (progress.step, progress.best, progress.best_step) == (10, 1, 4)
    assert find_checkpoint(make().folder, best=True).folder.name == "step-00000004"


def test_patience_counts_on_after_a_resume(make):
    make(evaluate=scripted(1, 2), patience=9, metric="score", steps=6).run()
    again = make(evaluate=scripted(2), patience=4, metric="score")
    again.resume(find_checkpoint(again.folder))
    progress = again.run()
    assert (progress.step, progress.best, progress.best_step, progress.stale) == (10, 1, 2, 4)


def test_a_metric_that_nothing_measures(make):
    with pytest.raises(InputError, match="metric: got 'f1'; allowed: held_out_loss, score"):
        make(evaluate=scripted(1), metric="f1").run()


def test_frozen_weights_stay_and_have_no_state_yet_everything_resumes(make, tmp_path):
    def frozen():
        model = Net()
        model.backbone.requires_grad_(False)
        return model

    straight = make(frozen(), folder=tmp_path / "straight")
    straight.run()
    assert torch.equal(straight.model.backbone.weight, Net().backbone.weight)
    stored = load_file(find_checkpoint(straight.folder).folder / "optimizer.safetensors")
    assert {name.split(":")[1] for name in stored} == {"head.weight", "head.bias"}
    make(frozen(), steps=10, folder=tmp_path / "parts").run()
    second = make(frozen(), folder=tmp_path / "parts")
    second.resume(find_checkpoint(tmp_path / "parts"))
    second.run()
    for ours, theirs in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_other_trained_weights_is_refused(make):
    make(steps=4).run()
    model = Net()
    model.backbone.requires_grad_(False)
    with pytest.raises(DataError, match=r"optimizer\.safetensors does not belong to this model \(parameter .*backbone"):
        make(model).resume(find_checkpoint(make().folder))
