"""Training in several processes, for test_parallel.py: run under torchrun, or imported for what one process does.

torchrun --nproc-per-node 2 ranks.py CORPUS FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from fastattn.cli import main
from fastattn.lm.models import Decoder, TransformerConfig
from fastattn.lm.train import Log, TrainConfig, Trainer, find_checkpoint, loop
from fastattn.lm.train.checkpoint import Checkpoint
from fastattn.lm.train.data import PackedRows
from fastattn.lm.train.parallel import joined, ranks
from fastattn.lm.train.tasks import next_token_loss
from fastattn.lm.train.tokens import Corpus

# A rate that does not depend on the steps, so that runs of different lengths agree.
TRAIN = TrainConfig(
    steps=6, batch=4, eval_every=3, eval_rows=5, save_every=3, keep=9, log_every=1,
    warmup=0, final_lr=1,
)  # fmt: skip


def train(corpus_folder, folder, resume=None, **changes):
    """Six steps of a tiny model, or those after ``resume``; the losses, training and held out."""
    corpus = Corpus.open(Path(corpus_folder))
    torch.manual_seed(1)
    config = TransformerConfig(corpus.facts.vocab_size, width=16, layers=2, heads=2, kv_heads=1, max_length=16)
    rows = PackedRows(corpus.split("train"), 16, seed=0), PackedRows(corpus.split("held_out"), 16)
    settings = TrainConfig(**(TRAIN.__dict__ | changes))
    trainer = Trainer(
        Decoder(config), corpus.tokenizer(), rows, settings, Path(folder), loss=next_token_loss, show_progress=False
    )
    if resume is not None:
        trainer.resume(Checkpoint(resume))
    trainer.run()
    ranks().wait()
    return losses(folder)


def losses(folder):
    records = Log(Path(folder) / "log.jsonl").records()
    return {(key, r["step"]): r[key] for r in records for key in ("loss", "held_out_loss", "grad_norm") if key in r}


def half(folder):
    """The checkpoint after three of six steps."""
    return Path(folder) / "checkpoints" / "step-00000003"


def finetune(folder):
    data = folder.with_suffix(".jsonl")
    if ranks().leads:
        lines = (
            json.dumps({"text": f"{word} number {n}", "label": word}) for n in range(30) for word in ("cat", "dog")
        )
        data.write_text("".join(line + "\n" for line in lines))
    ranks().wait()
    flags = [
        "--steps",
        "3",
        "--batch",
        "4",
        "--length",
        "16",
        "--eval-rows",
        "4",
        "--log-every",
        "1",
        "--device",
        "cpu",
    ]
    command = ["finetune", "--task", "classify", "--data", str(data), "--out", str(folder), "--preset", "encoder-tiny"]
    assert main([*command, *flags, "--vocab-size", "300", "--quiet"]) == 0


def run_all(corpus, folder):
    loop.plot_losses = lambda *_: None  # which takes longer than these runs
    flags = [
        "--steps",
        "4",
        "--batch",
        "4",
        "--length",
        "16",
        "--eval-rows",
        "2",
        "--device",
        "cpu",
        "--log-every",
        "1",
    ]
    run = ["train", "--corpus", str(corpus), "--out", str(folder / "command"), *flags, "--quiet"]
    with joined(torch.device("cpu")):
        assert ranks().size == 2
        assert main([*run, "--parallel", "fsdp", "--context-parallel", "2"]) == 0
        finetune(folder / "finetuned")
        train(corpus, folder / "ddp", parallel="auto")
        train(corpus, folder / "ddp parts", micro_batch=1)
        train(corpus, folder / "context", context_parallel=2)
        train(corpus, folder / "context parts", context_parallel=2, parallel="fsdp", micro_batch=2, recompute=True)
        train(corpus, folder / "fsdp", parallel="fsdp")
        train(corpus, folder / "fsdp parts", parallel="fsdp", micro_batch=1, recompute=True)
        for way in ("ddp", "fsdp"):
            train(corpus, folder / f"alone, then {way}", resume=half(folder / "alone"), parallel=way)
        train(corpus, folder / "fsdp, then ddp", resume=half(folder / "fsdp"), parallel="ddp")
        if ranks().leads:
            find_checkpoint(folder / "fsdp").load_pretrained()
            shutil.rmtree(folder / "fsdp parts" / "checkpoints")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]), Path(sys.argv[2]))
