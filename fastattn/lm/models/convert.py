"""Models from and to folders in Hugging Face's format: ``config.json`` and safetensors. See ``hf_formats``.

A folder is written under another name and renamed when complete. A damaged folder raises a ``DataError`` that names the
fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fastattn.errors import DataError, InputError, input_error
from fastattn.files import new_folder, read_limited
from fastattn.lm.models import heads
from fastattn.lm.models.config import AttentionKind, PoolerActivation, TransformerConfig
from fastattn.lm.models.encoder import Encoder
from fastattn.lm.models.hf_formats import HF_FORMATS, HFFormat, Json, Tensors
from fastattn.lm.models.make import AnyModel, make_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AnyHead = heads.MaskedLM | heads.SequenceClassifier | heads.TokenClassifier | heads.SpanExtractor
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPECIAL = ("bos", "eos", "pad", "decoder_start")


def from_pretrained(
    path: str | Path, *, backbone_only: bool = False, attention: AttentionKind = "fastattn"
) -> AnyModel | AnyHead:
    """The model of a folder in Hugging Face's format: any of ``fastattn.lm.models.hf_formats``.

    The weights keep the dtype they are stored in, and are read one after the other. The heads of encoders for masked
    tokens, classification, token classification and spans come as those of ``fastattn.lm.models``.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors``, or the parts named in
            ``model.safetensors.index.json``; or a name on the Hugging Face hub, where ``huggingface_hub`` is installed.
        backbone_only: leave out the head of an encoder, for another one to be put on.
        attention: as in ``TransformerConfig``.

    Returns:
        the model, in evaluation mode.

    Raises:
        DataError: the folder is missing, incomplete, damaged, or of a format that fastattn does not have.

    Example:
        >>> import tempfile, torch
        >>> from fastattn.lm.models import Encoder, MaskedLM, from_pretrained, preset, save_pretrained
        >>> model = MaskedLM(Encoder(preset("bert-tiny", vocab_size=100)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, f"{folder}/bert")
        ...     again = from_pretrained(f"{folder}/bert")
        >>> bool((again.backbone.embedding.weight == model.backbone.embedding.weight).all())
        True
    """
    folder = _find(path)
    fields = _read_json(folder / "config.json")
    hf_format = HF_FORMATS.get(str(fields.get("model_type", "")))
    if hf_format is None:
        raise DataError(
            f"{folder} holds a model of type {fields.get('model_type')!r}; fastattn has {', '.join(HF_FORMATS)}."
        )
    with _open(folder, hf_format) as stored:
        config = _config(hf_format, fields, stored, folder)
        config = dataclasses.replace(config, attention=attention)
        head = None if backbone_only else head_class(hf_format, fields)
        with torch.device("meta"):
            model = _build(hf_format, config, head, stored, fields)
        names = {ours: hf_format.names(ours, config, head) for ours in model.state_dict()}
        _check_names(hf_format, folder, names, stored, backbone_only)
        state = {}
        for ours, like in model.state_dict().items():
            whole = _gather(hf_format, [(name, stored[name]) for name in names[ours]], ours, like, folder)
            state[ours] = hf_format.reordered(whole, ours, config, back=True)
    model.load_state_dict(state, assign=True)
    model.hf_model_type = hf_format.model_type
    return model.eval()


def save_pretrained(
    model: AnyModel | AnyHead,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    special_tokens: Mapping[str, int] | None = None,
    chat_template: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a folder that ``transformers`` loads, and ``from_pretrained`` too.

    A model that was read from such a folder is written in the same format, another in the first that describes it.

    Args:
        model: whose config one of ``fastattn.lm.models.hf_formats`` describes.
        path: of the folder, which must not exist. It appears when it is complete.
        tokenizer: is written too, as ``tokenizer.json``.
        special_tokens: ids of "bos", "eos", "pad" and "decoder_start" where the model has them, for their generation.
        chat_template: is written too, as ``chat_template.jinja``.
        image_processor: is written too, as ``preprocessor_config.json``.
        more: entries of ``config.json`` that the format does not have; transformers keeps them and reads none.
        max_shard_bytes: of a file of weights; a larger model is written in several, one after the other, so that memory
            holds the model and one of them.

    Raises:
        InputError: the model has no Hugging Face equivalent; the message names the fields that prevent it.
        DataError: the folder exists, or cannot be written.

    Example:
        >>> import tempfile
        >>> from fastattn.lm.models import Decoder, TransformerConfig, save_pretrained
        >>> model = Decoder(TransformerConfig(vocab_size=100, width=64, layers=2, heads=4, kv_heads=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, f"{folder}/llama")
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already: choose another folder, or remove it.")
    odd = sorted(set(special_tokens or {}) - set(_SPECIAL))
    if odd:
        raise input_error("special_tokens", odd, f"names of {_SPECIAL}", "Give the ids by these names.")
    fields, tensors = _describe(model)
    ids = special_tokens or {}
    fields |= {f"{name}_token_id": fields.get(f"{name}_token_id", ids.get(name)) for name in _SPECIAL[:3]}
    if "decoder_start" in ids:
        fields["decoder_start_token_id"] = ids["decoder_start"]
    with new_folder(path) as folder:
        _write_tensors(folder, tensors, max_shard_bytes)
        _write_json(folder / "config.json", {**(more or {}), **fields})
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.longest}
            names = {f"{name}_token": tokenizer.id_to_token(ids[name]) for name in _SPECIAL[:3] if name in ids}
            _write_json(folder / "tokenizer_config.json", kind | names)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if image_processor is not None:
            _write_json(folder / "preprocessor_config.json", dict(image_processor))


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], most: int) -> None:
    """Write one file, or shards of at most ``most`` bytes and the index of them."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if shards[-1] and size > most:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(name)
    parts = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    parts = parts if len(parts) > 1 else ["model.safetensors"]
    for part, names in zip(parts, shards, strict=True):
        save_file({name: tensors[name].contiguous() for name in names}, folder / part, metadata={"format": "pt"})
    if len(parts) > 1:
        places = {name: part for part, names in zip(parts, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _find(path: str | Path) -> Path:
    """The folder at ``path``, or of a copy of the hub's model of this name."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise DataError(f"{folder} holds no config.json: give the folder of a model in Hugging Face's format.")
    if not isinstance(path, str) or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{folder} does not exist: give the folder of a model in Hugging Face's format.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        todo = "give a folder, or install huggingface_hub to fetch a model by its name"
        raise DataError(f"There is no folder {path!r}: {todo}.") from None
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"There is no folder {path!r}, and the hub gives no model of this name ({reason}).") from error


class _Stored(Mapping[str, Tensor]):
    """The tensors of a folder under the names of its format; each is read when asked for."""

    def __init__(self, files: Sequence[Any], hf_format: HFFormat) -> None:
        self._files: dict[str, tuple[Any, str]] = {}
        names = [(file, name) for file in files for name in file.keys()]  # noqa: SIM118 - not a dict
        # A file of a backbone alone lacks the prefix; the first BERT has TensorFlow's names of the norm.
        prefix = "" if any(name.startswith(hf_format.prefix) for _, name in names) else hf_format.prefix
        for file, name in names:
            known = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            self._files[prefix + known] = (file, name)

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self._files[name]
        return file.get_tensor(stored_name)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextlib.contextmanager
def _open(folder: Path, hf_format: HFFormat) -> Iterator[_Stored]:
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        todo = "fastattn reads safetensors only; transformers' save_pretrained writes them"
        raise DataError(f"{folder} has no model.safetensors: {todo}.")
    paths = [single] if single.is_file() else [folder / name for name in _parts(index)]
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            try:
                files.append(stack.enter_context(safe_open(path, framework="pt")))
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is missing, truncated or not a safetensors file ({error}).") from error
        yield _Stored(files, hf_format)


def _parts(index: Path) -> list[str]:
    """The files that an index names."""
    parts = _read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(x, str) and Path(x).name == x for x in parts.values()):
        raise DataError(f"{index} does not name the files of a model.")
    return sorted(set(parts.values()))


def _config(hf_format: HFFormat, fields: Json, stored: Tensors, folder: Path) -> TransformerConfig:
    try:
        return hf_format.read(fields, stored)
    except KeyError as error:
        raise DataError(
            f"{folder / 'config.json'} lacks {error}, which a model of type {hf_format.model_type} has."
        ) from error
    except (InputError, DataError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{folder / 'config.json'}: {error}") from error


def head_class(hf_format: HFFormat, fields: Json) -> str | None:
    """The class of ``heads.py`` for the model that ``config.json`` names."""
    architecture = (fields.get("architectures") or [hf_format.architecture])[0]
    of_theirs = hf_format.also | {theirs: ours for ours, (theirs, _) in hf_format.heads.items()}
    return of_theirs.get(architecture)


def _build(
    hf_format: HFFormat, config: TransformerConfig, head: str | None, stored: Tensors, fields: Json
) -> AnyModel | AnyHead:
    """A model without weights."""
    model: Any = make_model(config)
    if head is None:
        return model
    if head in ("SequenceClassifier", "TokenClassifier"):
        output = f"{hf_format.heads[head][1]['output']}.weight"
        count = stored[output].shape[0] if output in stored else 1
        names = [name for _, name in sorted((int(i), name) for i, name in (fields.get("id2label") or {}).items())]
        more: dict[str, Any] = {"labels": names if len(set(names)) == count else None}
        if head == "SequenceClassifier" and hf_format.poolings:
            ours = {theirs: pool for pool, theirs in hf_format.poolings.items()}
            more["pool"] = ours.get(fields.get("classifier_pooling", "cls"))
        return getattr(heads, head)(model, count, **more)
    return getattr(heads, head)(model)


def _check_names(
    hf_format: HFFormat, folder: Path, names: Mapping[str, Sequence[str]], stored: Tensors, backbone_only: bool
) -> None:
    wanted = {name for theirs in names.values() for name in theirs} | set(hf_format.copies)
    missing = sorted(wanted - set(stored))
    foreign = {
        x
        for x in set(stored) - set(hf_format.zeros)
        if not re.fullmatch(hf_format.unused, x) and not (backbone_only and _is_of_head(hf_format, x))
    }
    for name in hf_format.zeros:
        if name in stored and bool(stored[name].any()):
            raise DataError(f"{folder}: {name} is not zero, and fastattn has no such tensor.")
    for what, odd in (("lacks", missing), ("has, beside those of the model,", sorted(foreign - wanted))):
        if odd:
            more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
            raise DataError(f"{folder} {what} the tensors {', '.join(odd[:5])}{more}.")
    for name, other in hf_format.copies.items():
        if not torch.equal(stored[name], stored[other]):
            raise DataError(f"{folder}: {name} differs from {other}, and fastattn has one tensor for both.")


def _is_of_head(hf_format: HFFormat, name: str) -> bool:
    return bool(hf_format.heads) and not name.startswith(hf_format.prefix)


def _gather(hf_format: HFFormat, parts: Sequence[tuple[str, Tensor]], ours: str, like: Tensor, folder: Path) -> Tensor:
    """Our tensor from theirs."""
    tensors = [x.T if _is_transposed(hf_format, ours, x) else x for _, x in parts]
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0].clone(memory_format=torch.contiguous_format)
    if parts[0][0] in hf_format.shapes and whole.numel() == like.numel():
        whole = whole.reshape(like.shape)
    if whole.shape != like.shape:
        names = " + ".join(name for name, _ in parts)
        shapes = f"{tuple(whole.shape)}, and config.json asks for {tuple(like.shape)}"
        raise DataError(f"{folder}: {names} has the shape {shapes}{' (transposed)' if hf_format.transposed else ''}.")
    return whole


def _is_transposed(hf_format: HFFormat, ours: str, tensor: Tensor) -> bool:
    return hf_format.transposed and tensor.dim() == 2 and "blocks." in ours


def _describe(model: AnyModel | AnyHead) -> tuple[Json, dict[str, Tensor]]:
    """Config and tensors of ``model`` in the format that represents them exactly; InputError if none does."""
    head = type(model).__name__ if isinstance(model, AnyHead) else None
    config = _explicit(model.config, head)
    reasons, unsaid = list[str](), list[str]()
    read_from = getattr(model, "hf_model_type", None)
    for hf_format in sorted(HF_FORMATS.values(), key=lambda x: x.model_type != read_from):  # stable: else in order
        if hf_format.kind == config.kind:
            fields = hf_format.write(config)
            tensors, unplaced = _scatter(model, hf_format, config, head)
            try:
                known = _explicit(hf_format.read(fields, tensors), head)
            except (DataError, InputError, ArithmeticError, TypeError) as error:  # it cannot even say what differs
                unsaid.append(f"for {hf_format.model_type}, {error}")
                continue
            reason = _differences(config, known) or _head_reason(hf_format, model, head) or unplaced
            if not reason:
                if head is None and hf_format.heads:  # their class of a backbone alone has no prefix
                    tensors = {name.removeprefix(hf_format.prefix): tensor for name, tensor in tensors.items()}
                return _with_facts(fields, hf_format, model, head), tensors
            reasons.append(f"for {hf_format.model_type}, {reason}")
    todo = "Checkpoints of fastattn hold any model; one to export has the parts of a format, as every preset does."
    nearest = "; ".join([*sorted(reasons, key=len), *unsaid][:2])
    given = f"a model of kind {config.kind!r}" + (f" that differs: {nearest}" if nearest else "")
    raise input_error("model", given, "the format of one of " + ", ".join(HF_FORMATS), todo)


def pooler_of_classifiers(encoder: Encoder) -> PoolerActivation | None:
    """The activation after the pooler that Hugging Face's classifiers have on such an encoder; None without one."""
    for activation in get_args(PoolerActivation):
        with torch.device("meta"):
            config = dataclasses.replace(encoder.config, pooler=True, pooler_activation=activation)
            trial = heads.SequenceClassifier(Encoder(config), 2)
        with contextlib.suppress(InputError):
            _describe(trial)
            return activation
    return None


def _differences(config: TransformerConfig, known: TransformerConfig) -> str:
    """Fields of ``config`` that the format lost, given the config ``known`` that it reads back."""
    pairs = ((f.name, getattr(config, f.name), getattr(known, f.name)) for f in dataclasses.fields(config))
    differ = [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs and name != "attention"]
    return ", ".join(f"{name} is {ours!r} and would be {theirs!r}" for name, ours, theirs in differ)


def _head_reason(hf_format: HFFormat, model: AnyModel | AnyHead, head: str | None) -> str:
    """The reason why the format has no such head."""
    if head is not None and head not in hf_format.heads:
        return f"there is no {head}"
    if isinstance(model, heads.SequenceClassifier):
        pools = hf_format.poolings or {"first": ""}
        if model.pool not in pools or model.config.pooler != hf_format.pools:
            return f"pool would be {' or '.join(map(repr, pools))}, with pooler={hf_format.pools} in the config"
    return ""


def _with_facts(fields: Json, hf_format: HFFormat, model: AnyModel | AnyHead, head: str | None) -> Json:
    """The config with what the weights and the head add to it."""
    architecture = hf_format.heads[head][0] if head else hf_format.architecture
    fields |= {"model_type": hf_format.model_type, "architectures": [architecture]}
    fields |= {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if isinstance(model, heads.SequenceClassifier) and hf_format.poolings:
        fields |= {"classifier_pooling": hf_format.poolings[model.pool]}
    if isinstance(model, heads.SequenceClassifier | heads.TokenClassifier):
        fields |= {"id2label": {str(i): label for i, label in enumerate(model.labels)}}
        fields |= {"label2id": {label: i for i, label in enumerate(model.labels)}}
    return fields


def _scatter(
    model: AnyModel | AnyHead, hf_format: HFFormat, config: TransformerConfig, head: str | None
) -> tuple[dict[str, Tensor], str]:
    """Their tensors from ours, and a sentence on those that the format lacks."""
    found: dict[str, Tensor] = {}
    unplaced = []
    for ours, tensor in model.state_dict().items():
        try:
            names = hf_format.names(ours, config, head)
        except KeyError:
            unplaced.append(ours)
            continue
        tensor = hf_format.reordered(tensor, ours, config)
        sizes = [len(tensor) // len(names)] * len(names)
        if len(names) == 3:  # queries, keys and values
            sizes = [heads * config.head_shape.head_dim for heads in (config.heads, *[config.head_shape.kv_heads] * 2)]
        for name, part in zip(names, tensor.detach().split(sizes if len(names) > 1 else len(tensor)), strict=True):
            if name in hf_format.shapes:
                part = part.reshape(hf_format.shapes[name](config))
            found[name] = part.T if _is_transposed(hf_format, ours, part) else part
    found |= {name: make(config) for name, make in hf_format.zeros.items()}
    found |= {name: found[other].clone() for name, other in hf_format.copies.items()}
    return found, f"there is no place for {', '.join(unplaced[:3])}" if unplaced else ""


def _explicit(config: TransformerConfig, head: str | None) -> TransformerConfig:
    """The same model with defaults filled in, and the fields that it does not read at theirs."""
    _, kv_heads, head_dim = config.head_shape
    values: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "mlp_width": config.hidden}
    values |= {"norm_eps": config.norm_eps or (1e-5 if config.norm == "layer" else 1e-6)}
    unused = {
        "rope_base": config.positions != "rope",
        "local_rope_base": config.positions != "rope" or config.window is None,
        "global_layers": config.window is None,
        "position_offset": config.positions != "learned",
        "pooler_activation": not config.pooler,
        "head_transform": head in (None, "MaskedLM"),
        "rope_scaling": config.positions != "rope",
        "relative_buckets": config.positions != "relative",
        "relative_distance": config.positions != "relative",
        "image_size": not config.has_images,
        "patch_size": not config.has_images,
        "channels": not config.has_images,
        "max_length": config.kind == "vision",
        "tie_embeddings": config.kind in ("encoder", "vision"),
        "logit_scale": config.kind in ("encoder", "vision"),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    values |= {name: defaults[name] for name, is_unused in unused.items() if is_unused}
    if config.attention_scale == head_dim**-0.5:
        values["attention_scale"] = None
    values["qkv_bias"] = config.bias if config.qkv_bias is None else config.qkv_bias
    if config.local_rope_base == config.rope_base:
        values["local_rope_base"] = None
    if config.kind == "encoder-decoder":
        values["decoder_layers"] = config.decoder_layers or config.layers
    return dataclasses.replace(config, **values)


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(read_limited(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is missing or not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold the settings of a model.")
    return content
