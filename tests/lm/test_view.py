"""The page and the picture of a model's attention: what they hold, that they load nothing, and what is refused."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from fastattn.cli import main
from fastattn.errors import DataError, InputError
from fastattn.lm.models import make_model, preset, save_pretrained
from fastattn.lm.train.tokens import train_tokenizer
from fastattn.lm.view import attention_of, plot_attention

TEXT = "the cat </script> sat"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 280)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return make_model(preset("tiny", 280)).eval()


def test_the_page_holds_the_weights_and_loads_nothing(decoder, tokenizer, tmp_path):
    view = attention_of(decoder, tokenizer, TEXT)
    page = view.write_html(tmp_path / "new" / "page.html", TEXT).read_text()
    assert "http" not in page and page.count("</script>") == 1 and "<title>the cat &lt;/script&gt; sat</title>" in page
    (kind,) = json.loads(re.search(r"const kinds = (.*);\n", page)[1])
    assert kind["tokens"] == kind["queries"] == view.tokens["self"] and "".join(kind["tokens"][1:]) == TEXT
    for layer, weights in zip(kind["layers"], view.weights["self"], strict=True):
        stored = np.frombuffer(base64.b64decode(layer["weights"]), "<u2").reshape(weights.shape) / 65535
        np.testing.assert_allclose(stored, weights.numpy(), atol=1e-5)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's script")
def test_the_script_is_valid(decoder, tokenizer, tmp_path):
    page = attention_of(decoder, tokenizer, TEXT).write_html(tmp_path / "page.html").read_text()
    script = tmp_path / "page.js"
    script.write_text(re.search(r"<script>(.*)</script>", page, re.S)[1])
    subprocess.run(["node", "--check", str(script)], check=True)


def test_an_encoder_decoder_has_three_kinds(tokenizer, tmp_path):
    model = make_model(preset("seq2seq-mini", 280))
    view = attention_of(model, tokenizer, "the cat", "sat")
    assert {kind: len(layers) for kind, layers in view.weights.items()} == {"encoder": 2, "decoder": 2, "cross": 2}
    for kind, layers in view.weights.items():
        assert layers[0].shape[1:] == (len(view.query_tokens[kind]), len(view.tokens[kind]))
    assert view.tokens["cross"][-1] == "<|end|>" and view.query_tokens["cross"][0] == "<|start|>"
    with pytest.raises(InputError, match="target: got None"):
        attention_of(model, tokenizer, "the cat")
    with pytest.raises(InputError, match="kind: got 'self'; allowed: encoder, decoder, cross"):
        view.plot(tmp_path / "x.png", "self")


def test_what_is_too_long_is_refused(decoder, tokenizer, tmp_path):
    with pytest.raises(DataError, match="the model reads 1 to 256 of them"):
        attention_of(decoder, tokenizer, TEXT * 200)
    with pytest.raises(InputError, match="target: got 'x'"):
        attention_of(decoder, tokenizer, TEXT, "x")


def test_inspect_writes_a_page_or_a_picture(decoder, tokenizer, tmp_path, capsys):
    save_pretrained(decoder, tmp_path / "model", tokenizer=tokenizer)
    command = ["inspect", "--checkpoint", str(tmp_path / "model"), "--text", TEXT, "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n" and (tmp_path / "a.html").stat().st_size > 10_000
    assert main([*command, str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "a.txt"]) == 2 and "ends in .html or .png" in capsys.readouterr().err
    assert plot_attention(decoder, tokenizer, "cat", tmp_path / "b.html").exists()
