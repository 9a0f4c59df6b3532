"""Tasks on images: folders and tables, training that resumes, folders of Hugging Face, captions and questions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastattn.errors import DataError, InputError
from fastattn.lm.finetune import FinetuneConfig, evaluate, finetune, load_finetuned
from fastattn.lm.finetune.augment import augmented
from fastattn.lm.finetune.config import resumed_config
from fastattn.lm.finetune.datasets import find_splits, read_dataset
from fastattn.lm.generate import Sampling
from fastattn.lm.load import export, load_image, load_model, load_texts
from fastattn.lm.models import PRESETS
from fastattn.lm.train import find_checkpoint, find_model

COLOURS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}
SIZES = {"width": 32, "layers": 1, "heads": 2, "image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True, scope="module")
def small_presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-mini", PRESETS["vit-mini"] | SIZES)
        patch.setitem(PRESETS, "image-text-mini", PRESETS["image-text-mini"] | SIZES | {"vision_layers": 1})
        patch.setitem(PRESETS, "tiny", PRESETS["tiny"] | {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1})
        yield


def draw(path, colour, side, seed):
    """A square of a colour on the left or right, on dark noise."""
    pixels = np.random.default_rng(seed).integers(0, 60, (16, 16, 3), dtype=np.uint8)
    left = 0 if side == "left" else 8
    pixels[4:12, left : left + 8] = COLOURS[colour]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in a subfolder for each colour, and two tables of the same images."""
    folder = tmp_path_factory.mktemp("images")
    captions, questions = [], []
    for number in range(12):
        for colour in COLOURS:
            side = ("left", "right")[number % 2]
            path = folder / "squares" / colour / f"{number:02}.png"
            draw(path, colour, side, number)
            name = str(path.relative_to(folder))
            captions.append({"file_name": name, "text": f"a {colour} square on the {side}"})
            asked = {"what colour?": colour, "which side?": side}
            questions += [{"image": name, "question": q, "answer": a} for q, a in asked.items()]
    for name, records in (("captions", captions), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def settings(data, task="image", *, lr=3e-3, **changes):
    train = {"batch": 8, "eval_every": 20, "save_every": 10, "log_every": 1, "lr": lr}
    start = {} if {"checkpoint", "pretrained"} & set(changes) else {"preset": "mini"}
    return FinetuneConfig(task, str(data), **({"steps": 40, "vocab_size": 300} | train | start | changes))


def run(out, config, **options):
    return finetune(out, config, show_progress=False, **options)


def test_folders_and_tables_are_read_as_they_are(folder, tmp_path):
    found = read_dataset(folder / "squares", "image")
    assert found.classes() == {"blue": 12, "green": 12, "red": 12} and "baseline: always 'blue'" in found.summary()
    assert found.examples[0].fields["image"] == str(folder / "squares" / "blue" / "00.png")
    assert read_dataset(folder / "captions.jsonl", "caption").columns == {"image": "file_name", "text": "text"}
    for split, name in (("train", "1.png"), ("val", "2.png")):
        draw(tmp_path / split / "red" / name, "red", "left", 0)
    assert find_splits(tmp_path) == ([tmp_path / "train"], [[tmp_path / "val"]])
    assert find_splits(tmp_path / "train") == ([tmp_path / "train"], [])
    (tmp_path / "val" / "metadata.csv").write_text("file_name,label\nred/2.png,crimson\n")
    assert read_dataset(tmp_path / "val", "image").examples[0].fields["label"] == "crimson"
    draw(tmp_path / "trains" / "train" / "1.png", "red", "left", 0)  # a class, not a split
    assert find_splits(tmp_path / "trains") == ([tmp_path / "trains"], [])
    two = [tmp_path / "train" / "red" / "1.png", tmp_path / "val" / "red" / "2.png"]
    assert [x.fields["image"] for x in read_dataset(two, "image", labelled=False).examples] == list(map(str, two))


def test_a_vision_encoder_learns_and_leaves_as_vit(folder, tmp_path):
    config = settings(folder / "squares", augment="flip")
    whole = run(tmp_path / "whole", config)
    assert whole.scores["accuracy"] == 1.0
    learning = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert learning[0]["tokens_per_second"] > 0 and learning[0]["tflops"] > 0
    tuned = load_finetuned(whole.checkpoint)
    path = folder / "squares" / "red" / "00.png"
    found = tuned.predict([str(path), {"image": str(path)}])
    assert (
        found[0]["label"] == "red" and found[0] == found[1] and abs(sum(found[0]["probabilities"].values()) - 1) < 1e-6
    )

    assert export(whole.checkpoint, tmp_path / "hf") == "ViTForImageClassification"
    theirs = pytest.importorskip("transformers").ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    pixels = tuned.task.pixels.normalised(tuned.task.reader.read([str(path)]))
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(pixels), theirs(pixels).logits, atol=1e-5, rtol=1e-5)
    again = evaluate(find_model(tmp_path / "hf"), [str(folder / "squares")], show_progress=False)
    assert again.scores["accuracy"] == 1.0
    start = settings(folder / "squares", pretrained=str(tmp_path / "hf"), method="frozen", steps=1, lr=1e-9)
    again = load_finetuned(run(tmp_path / "again", start).checkpoint).model.backbone.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in tuned.model.backbone.state_dict().items())


def test_it_resumes_with_the_same_bits(folder, tmp_path):
    config = settings(folder / "squares", augment="shift", steps=8, dropout=0.1)
    finished = run(tmp_path / "whole", config.changed({"save_every": 4, "keep": 3}))
    (tmp_path / "whole" / "checkpoints" / "step-00000008").rename(tmp_path / "step-00000008")  # as after a kill
    first = find_checkpoint(tmp_path / "whole")
    again = run(tmp_path / "whole", resumed_config(first, {}), resume=first)
    before = load_finetuned(find_checkpoint(tmp_path / "step-00000008")).model.state_dict()
    after = load_finetuned(again.checkpoint).model.state_dict()
    assert first.folder.name == "step-00000004" and finished.progress.step == again.progress.step == 8
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_captions_then_questions_are_learned_beyond_what_text_tells(folder, tmp_path):
    captions, questions = folder / "captions.jsonl", folder / "questions.jsonl"
    first = run(tmp_path / "captions", settings(captions, "caption", eval=str(captions), steps=200, lr=5e-3))
    second = settings(questions, "vqa", eval=str(questions), checkpoint=str(tmp_path / "captions"), steps=240, lr=5e-3)
    seen = run(tmp_path / "questions", second)
    text = [json.loads(line) for line in questions.read_text().splitlines()]
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"prompt": x["question"], "response": x["answer"]}) for x in text)
    )
    blind = settings(tmp_path / "text.jsonl", "instruct", eval=str(tmp_path / "text.jsonl"), preset="tiny", steps=60)
    unseen = run(tmp_path / "blind", blind)
    assert first.scores["exact match"] > 0.75
    # Without the image a third of the colours and half of the sides can be guessed.
    assert seen.scores["exact match"] > 0.6 > 0.42 > unseen.scores["exact match"]

    tuned = load_finetuned(seen.checkpoint)
    path = str(folder / "squares" / "red" / "01.png")
    (found,) = tuned.predict([{"image": path, "question": "what colour?"}])
    texts, _ = load_texts(seen.checkpoint)
    image = load_image(seen.checkpoint, path, texts.model)
    assert found["answer"] == "red" == texts.best("what colour?", 9, beams=2, image=image)
    assert "".join(texts.stream("what colour?", 9, Sampling(temperature=0), image=image)) == "red"
    assert export(seen.checkpoint, tmp_path / "hf") == "PaliGemmaForConditionalGeneration"
    texts, _ = load_texts(find_model(tmp_path / "hf"))
    assert torch.equal(load_image(find_model(tmp_path / "hf"), path, texts.model), image)
    assert "".join(texts.stream("what colour?", 9, Sampling(temperature=0), image=image)) == "red"
    with pytest.raises(InputError, match="reads text alone"):
        load_image(unseen.checkpoint, path, load_model(unseen.checkpoint))


def test_augmentation_moves_pixels_and_keeps_their_values():
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).float().repeat(8, 1, 1, 1)
    assert augmented(images, "none") is images
    for kind in ("shift", "flip"):
        found = augmented(images, kind)
        rows, columns = found[:, 0, :, 0] // 16 % 16, found[:, 0, 0] % 16
        falls = (columns.diff(dim=-1) < 0).any(-1)
        assert found.shape == images.shape and not (rows.diff(dim=-1) < 0).any() and not torch.equal(found, images)
        assert not falls.any() if kind == "shift" else falls.any() and not falls.all()
        assert (found[:, 1] - found[:, 0] == 256).all()  # channels move together


def test_what_is_wrong_is_named(folder, tmp_path):
    (tmp_path / "gone.jsonl").write_text(json.dumps({"image": "gone.png", "label": "x"}))
    with pytest.raises(DataError, match=r"There is no image .*gone.png"):
        run(tmp_path / "run", settings(tmp_path / "gone.jsonl", eval=str(tmp_path / "gone.jsonl")))
    (tmp_path / "odd.jsonl").write_text(json.dumps({"image": {"bytes": "x"}, "label": "x"}))
    with pytest.raises(DataError, match="path of a file, not of type dict"):
        read_dataset(tmp_path / "odd.jsonl", "image")
    with pytest.raises(DataError, match="is missing"):
        read_dataset(folder / "squares" / "red", "image")
    for changes in ({"length": 16}, {"augment": "turn"}, {"checkpoint": "x", "image_size": 8}, {"patch_size": 5}):
        with pytest.raises(InputError):
            settings(folder / "squares", **changes)
    with pytest.raises(InputError, match="tasks with images"):
        FinetuneConfig("classify", "x", preset="tiny", augment="shift")
    other = run(tmp_path / "run", settings(folder / "squares", steps=1))
    with pytest.raises(InputError, match="one of kind vision"):
        run(tmp_path / "other", settings(folder / "captions.jsonl", "caption", checkpoint=str(other.checkpoint.folder)))
