"""The schedule, the decay groups and clipping."""

import itertools

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.models import Decoder, TransformerConfig
from fastattn.lm.train.optim import OptimConfig, make_optimizer, update


def test_the_schedule_rises_and_falls():
    config = OptimConfig(lr=1.0, final_lr=0.1, warmup=10)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)
    assert config.rate(500, 100) == pytest.approx(0.1)


def test_warmup_may_be_a_part_of_the_steps():
    assert OptimConfig(lr=1.0, warmup=0.1).rate(20, 200) == 1.0 > OptimConfig(lr=1.0, warmup=0.1).rate(19, 200)
    assert OptimConfig(lr=1.0, warmup=0).rate(0, 10) == 1.0
    assert OptimConfig(lr=1.0, warmup=0).rate(0, 1) == 1.0


def test_only_matrices_are_decayed():
    model = Decoder(TransformerConfig(50, width=16, layers=1, heads=2, bias=True, sinks=True, norm="layer"))
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.dim() == 2 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert len(make_optimizer(model, OptimConfig()).param_groups) == 1


def test_update_clips_and_reports_the_norm_before():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = update(optimizer, model, rate=0.5, clip=1.0)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.3, 0.4]]), atol=1e-5, rtol=1e-5)
    assert model.weight.grad is None


def test_no_clipping():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    update(torch.optim.SGD(model.parameters(), lr=1.0), model, rate=1.0, clip=None)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[30.0, 40.0]]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("final_lr", 2.0), ("warmup", -1), ("weight_decay", -0.1), ("betas", (0.9, 1.0)), ("clip", 0.0)],
)
def test_refusals(field, value):
    with pytest.raises(InputError, match=f"{field}: got"):
        OptimConfig(**{field: value})
