"""Checkpoints: ``step-00000100/`` with the weights, the optimizer, the trainer's state, the config and the tokenizer.

A folder is written under another name and renamed when complete, so every ``step-*`` folder is whole. The sizes and
SHA-256 digests of its files are in ``checksums.json`` and checked before they are used: of several checkpoints the
newest sound one is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastattn.errors import DataError, InputError
from fastattn.files import new_folder, read_limited, remove_folder
from fastattn.lm.data.images import Pixels
from fastattn.lm.models import Encoder, MaskedLM, TransformerConfig, make_model
from fastattn.lm.train.parallel import ALONE, Ranks, is_sharded, load_parts, save_parts
from fastattn.lm.train.special_tokens import SpecialTokens
from fastattn.lm.train.tokens import load_tokenizer

FORMAT = "fastattn-checkpoint-1"
_CHECKSUMS = "checksums.json"
log = logging.getLogger("fastattn")
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. The files are read when asked for."""

    folder: Path

    def damage(self) -> str | None:
        """The first file that is not what was written, and how; None if all are, or if there are no checksums.

        Checkpoints of fastattn 0.1 have none.
        """
        path = self.folder / _CHECKSUMS
        if not path.exists():
            return None
        try:
            for name, written in _read_json(path).items():
                file = self.folder / name
                if not file.is_file():
                    return f"{name} is missing"
                if file.stat().st_size != written["bytes"] or _digest(file) != written["sha256"]:
                    return f"{name} has changed since it was written"
        except (DataError, KeyError, TypeError, OSError) as error:
            return f"{_CHECKSUMS} cannot be read ({error})"
        return None

    def model_config(self) -> dict[str, Any]:
        """The config that the model is rebuilt from."""
        return _read_json(self.folder / "config.json")

    def config(self) -> TransformerConfig:
        try:
            return TransformerConfig.from_dict(self.model_config())
        except (InputError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{self.folder / 'config.json'} does not describe a model of fastattn: {error}") from error

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer.json")

    @property
    def chat_template(self) -> str | None:
        """The template of a run of fine-tuning for chat."""
        return self.trainer_state().get("settings", {}).get("chat_template")

    @property
    def pixels(self) -> Pixels:
        """The way from an image to what the model reads."""
        fields = self.trainer_state().get("settings", {}).get("pixels")
        try:
            return Pixels() if fields is None else Pixels.from_dict(fields)
        except (InputError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder / 'trainer.json'} does not hold what fastattn writes there.") from error

    def special_tokens(self, tokenizer: Tokenizer) -> SpecialTokens:
        """The marks of its texts."""
        return SpecialTokens.of(tokenizer)

    def ends(self) -> tuple[int, ...]:
        """Tokens that end generation besides the usual: none."""
        return ()

    def trainer_state(self) -> dict[str, Any]:
        state = _read_json(self.folder / "trainer.json")
        if state.get("format") != FORMAT:
            raise DataError(f"{self.folder} is not a checkpoint of fastattn (format {state.get('format')!r}).")
        step, settings = state.get("step"), state.get("settings", {})
        if type(step) is not int or step < 0 or not isinstance(settings, dict):
            raise DataError(f"{self.folder / 'trainer.json'} does not hold what fastattn writes there.")
        return state

    def load_pretrained(self, device: torch.device | str = "cpu", attention: str | None = None) -> Any:
        """The model of a pre-training run with its weights, in evaluation mode.

        Args:
            device: where to put it.
            attention: overrides the config's.

        Raises:
            DataError: the checkpoint is damaged, or was written by another kind of run: see ``fastattn.lm.load``.
        """
        if "finetune" in self.trainer_state().get("settings", {}):
            raise DataError(f"{self.folder} is of a fine-tuning run: load it with fastattn.lm.finetune.load_finetuned.")
        fields = self.config().to_dict() | ({"attention": attention} if attention else {})
        config, path = TransformerConfig.from_dict(fields), self.folder / "model.safetensors"
        with torch.device("meta"):  # so that a config without such weights takes no memory
            _check_names(path, _shapes(path), _pretraining_model(config).state_dict())
        with torch.device(device):
            model = _pretraining_model(config)
        self.load_weights(model)
        return model.eval()

    def load_weights(self, model: nn.Module) -> None:
        """Copy the stored weights into ``model``, of which several processes may hold parts."""
        path = self.folder / "model.safetensors"
        wanted = model.state_dict()
        _check_names(path, _shapes(path), wanted)
        if is_sharded(model):
            load_parts(self.folder, wanted)
        else:
            model.load_state_dict(read_tensors(path))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Copy the stored state into ``optimizer``, which serves ``model``."""
        path = self.folder / "optimizer.safetensors"
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shapes = _shapes(path)
        for key, shape in shapes.items():
            name = key.partition(":")[2]
            if name not in named or shape not in ((1,), tuple(named[name].shape)):
                raise DataError(f"{path} does not belong to this model (parameter {name or key}).")
        if not shapes:
            raise DataError(f"{path} does not belong to this model (it holds no state).")
        moments = {key for key in shapes if not key.startswith("step:")}
        if is_sharded(model):
            stored = {
                k: torch.zeros_like(named[k.partition(":")[2]]) if k in moments else torch.zeros(1) for k in shapes
            }
            load_parts(self.folder, stored)
        else:
            stored = read_tensors(path)
        fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
        for key, value in stored.items():
            kind, _, name = key.partition(":")
            parameter = named[name]
            if key in moments:
                optimizer.state[parameter][kind] = value.detach().to(parameter.device)
            else:  # AdamW keeps its step counts in host memory unless it is fused
                where = parameter.device if id(parameter) in fused else "cpu"
                optimizer.state[parameter][kind] = value.reshape(()).to(where)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    model_config: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    keep: int = 2,
    keep_also: int | None = None,
    processes: Ranks = ALONE,
) -> Checkpoint:
    """Write ``folder/step-<step>`` in one piece, then remove all but the newest ``keep`` and step ``keep_also``.

    All ``processes`` take part; the first one writes, and where each holds a part of the model, each writes its part.

    Raises:
        DataError: the disk is full or cannot be written; the earlier checkpoints are intact.
    """
    path = folder / _name(step)
    if processes.leads and path.exists() and Checkpoint(path).damage() is not None:
        remove_folder(path)
    if not processes.from_first(path.exists()):
        with new_folder(path) if processes.leads else contextlib.nullcontext(path) as here:
            unfinished = processes.from_first(here)
            for name, tensors in (("model", model.state_dict()), ("optimizer", _optimizer_tensors(optimizer, model))):
                if is_sharded(model):
                    save_parts(unfinished / name, tensors, processes)
                elif processes.leads:
                    (unfinished / f"{name}.safetensors").write_bytes(save(_contiguous(tensors)))
            if processes.leads:
                if tokenizer is not None:
                    (unfinished / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
                _write_json(unfinished / "config.json", model_config)
                _write_json(unfinished / "trainer.json", {"format": FORMAT, "step": step} | state)
                write_checksums(unfinished)
        processes.wait()
    if not processes.leads:
        return Checkpoint(path)
    earlier = [old for old in sorted_steps(folder) if old.name <= path.name]  # later ones are damaged
    for old in earlier[:-keep]:
        if keep_also is None or old.name != _name(keep_also):
            remove_folder(old)
    return Checkpoint(path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def sorted_steps(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def find_checkpoint(path: Path, *, best: bool = False) -> Checkpoint:
    """The checkpoint at ``path``, or the newest sound one in it: a run's folder, its ``checkpoints``, or one of those.

    A damaged one is passed over with a warning.

    Args:
        path: where to look.
        best: of the checkpoints in a folder take the one of the best evaluation, if the run kept it.

    Raises:
        DataError: there is none, or none that is sound.
    """
    if not path.exists():
        raise DataError(f"Checkpoint {str(path)!r} does not exist: give the --out folder of a fastattn run.")
    if (path / "trainer.json").is_file() or (path / _CHECKSUMS).is_file():
        found = Checkpoint(path)
        if (damage := found.damage()) is not None:
            raise DataError(f"{path} is damaged: {damage}. Give the folder of the run, to take the newest sound one.")
        return found
    for folder in (path / "checkpoints", path):
        steps = sorted_steps(folder)
        if steps:
            newest = _newest_sound(steps)
            return (_best(newest) if best else None) or newest
    raise DataError(
        f"{str(path)!r} holds no checkpoint of fastattn: give the --out folder of a run that has saved one."
    )


def _newest_sound(steps: list[Path]) -> Checkpoint:
    for path in reversed(steps):
        checkpoint = Checkpoint(path)
        if (damage := checkpoint.damage()) is None:
            return checkpoint
        log.warning("fastattn: %s is damaged (%s) and is not used", path, damage)
    raise DataError(f"Every checkpoint in {steps[-1].parent} is damaged; the newest: {damage}. Start a new --out.")


def _best(newest: Checkpoint) -> Checkpoint | None:
    step = newest.trainer_state().get("kept_best")
    best = Checkpoint(newest.folder.with_name(_name(step or 0)))
    if step is None or not best.folder.is_dir():
        return None
    if (damage := best.damage()) is not None:
        log.warning("fastattn: %s, the best of the run, is damaged (%s) and is not used", best.folder, damage)
        return None
    return best


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state under names like ``exp_avg:blocks.0.mlp.up.weight``; numbers have one dimension."""
    return {
        f"{key}:{name}": torch.atleast_1d(torch.as_tensor(value))
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing, truncated or not a safetensors file ({error}).") from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors in a file and their shapes, without reading them."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing, truncated or not a safetensors file ({error}).") from error


def _pretraining_model(config: TransformerConfig) -> nn.Module:
    """The model that is pre-trained with ``config``, with fresh weights."""
    model = make_model(config)
    return MaskedLM(model) if isinstance(model, Encoder) else model


def _check_names(path: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, Tensor]) -> None:
    odd = sorted(stored.keys() ^ wanted.keys()) or [n for n in wanted if stored[n] != tuple(wanted[n].shape)]
    if odd:
        raise DataError(f"{path} does not fit config.json beside it: {len(odd)} tensors differ, the first {odd[0]!r}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_limited(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is missing or not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold what fastattn writes there.")
    return content


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    sums = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    _write_json(folder / _CHECKSUMS, sums)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
