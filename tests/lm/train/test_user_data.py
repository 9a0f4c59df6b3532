"""Data sets and loaders of torch in the trainer: their batches arrive as they are, and runs resume to the bit."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastattn.errors import DataError, InputError
from fastattn.lm.train import TrainConfig, Trainer, find_checkpoint

TRAIN = TrainConfig(steps=8, batch=4, eval_every=4, eval_rows=5, save_every=4, log_every=1)
TRAIN = dataclasses.replace(TRAIN, lr=0.03, warmup=0, final_lr=1.0)


class Points(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, number):
        x = torch.tensor([number / 10])
        return {"x": x, "y": 3 * x - 1, "noise": torch.rand(1)}


class Stream(IterableDataset):
    def __init__(self):
        self.epochs = []

    def set_epoch(self, number):
        self.epochs.append(number)

    def __iter__(self):
        return iter([Points()[n] for n in range(10)])


def squared_error(model, batch):
    return (model(batch["x"] + 0.01 * batch["noise"]) - batch["y"]).square().sum()


DATA = {
    "map-style": Points,
    "iterable": Stream,
    "loader": lambda: DataLoader(Points(), batch_size=4, shuffle=True),
    "seeded loader": lambda: DataLoader(Points(), 4, shuffle=True, generator=torch.Generator()),
}


def trainer(folder, data, seen=None, **changes):
    torch.manual_seed(0)

    def loss(model, batch):
        if seen is not None and model.training:
            seen.append(batch["y"].flatten().tolist())
        return squared_error(model, batch)

    return Trainer(
        nn.Linear(1, 1), None, (data, Points()), dataclasses.replace(TRAIN, **changes), folder,
        loss=loss, show_progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(kind, tmp_path):
    whole, first, second = [], [], []
    straight = trainer(tmp_path / "a", DATA[kind](), whole)
    straight.run()
    trainer(tmp_path / "b", DATA[kind](), first, steps=4).run()
    rest = trainer(tmp_path / "b", DATA[kind](), second)
    rest.resume(find_checkpoint(tmp_path / "b"))
    rest.run()
    assert first + second == whole and len(whole) == 8 and all(len(rows) == 4 for rows in whole)
    assert torch.equal(rest.model.weight, straight.model.weight)
    epoch = [x for rows in whole[:2] for x in rows]
    assert len(set(epoch)) == 8  # without repetition
    assert (sorted(epoch) == epoch) == (kind == "iterable")
    other = []
    trainer(tmp_path / "c", DATA[kind](), other, seed=1).run()
    assert (other == whole) == (kind == "iterable")


def test_held_out_data_of_each_kind(tmp_path):
    found = set()
    for number, kind in enumerate(DATA):
        made = trainer(tmp_path / str(number), Points())
        made.loss = lambda model, batch: batch.value["y"].sum() * 0 + len(batch.value["y"])
        made.held_out_rows = trainer(tmp_path / "x", DATA[kind]()).rows
        found.add(made.held_out_loss(7))
    assert found == {1.0}


def test_micro_batches_and_epochs(tmp_path):
    stream = Stream()
    trainer(tmp_path, stream, micro_batch=2).run()
    assert stream.epochs == [0, 1, 2, 3]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="batch: got 4; allowed: 3, that of the data loader"):
        trainer(tmp_path, DataLoader(Points(), batch_size=3)).run()
    empty = Stream()
    empty.__class__ = type("Empty", (Stream,), {"__iter__": lambda self: iter([])})
    with pytest.raises(DataError, match="gave nothing in epoch 0"):
        trainer(tmp_path / "b", empty).run()
    with pytest.raises(InputError, match="a batch of type list; allowed: tensors with a row"):
        trainer(tmp_path / "c", DataLoader(["a", "b", "c", "d"], batch_size=4)).run()
