"""Importing costs little: nothing slow beside torch, and not even torch for the command line's help."""

import subprocess
import sys

from fastattn.imports import when_imported

# Packages and parts of torch that take long to import, and parts of ours that most programs do not use.
SLOW = {
    "triton", "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "torch.utils.tensorboard", "torchvision",
    "transformers", "safetensors", "tokenizers", "filelock", "matplotlib", "pandas", "scipy", "sklearn", "peft",
    "torchmetrics", "sacrebleu", "fastattn.lm", "fastattn.testing", "fastattn.measure", "fastattn.cli",
    "fastattn.integrations", "fastattn.backends.cpu", "fastattn.backends.cuda", "fastattn.backends.triton",
}  # fmt: skip


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_slow_comes_with_the_package():
    code = "import sys, torch; before = set(sys.modules); import fastattn; print(*sorted(set(sys.modules) - before))"
    assert SLOW & set(printed(code).split()) == set()


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, contextlib, io\nfrom fastattn.cli import main\n"
        "for argv in (['--help'], ['--version'], ['train', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(argv)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert {"torch", "triton"} & set(printed(code).split()) == set()


def test_operators_are_there_whenever_torch_is():
    for order in ("torch, fastattn", "fastattn, torch"):
        assert printed(f"import {order}; print(torch.ops.fastattn.forward.default)") == "fastattn.forward.default"


def test_names_without_torch_asked_for():
    code = "import fastattn\nfrom fastattn import attention, nn\nprint(attention.__name__, nn.KVCache.__name__)"
    assert printed(code) == "attention KVCache"
    assert printed("from fastattn import *; print(MultiHeadAttention.__name__)") == "MultiHeadAttention"
    assert printed("import fastattn; print({'attention', '__version__'} <= set(dir(fastattn)))") == "True"
    assert printed("import fastattn; print(hasattr(fastattn, 'no_such_name'))") == "False"


def test_several_threads_ask_for_names_first():
    code = (
        "import threading, fastattn\nfound = []\n"
        "threads = [threading.Thread(target=lambda: found.append(fastattn.attention)) for _ in range(4)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\nprint(len(found), len(set(found)))"
    )
    assert printed(code) == "4 1"


def test_flops_are_counted_whichever_comes_first():
    code = (
        "import torch\n{first}\n{second}\nx = torch.ones(1, 4, 1, 8)\n"
        "with FlopCounterMode(display=False) as counter: fastattn.attention(x, x, x)\nprint(counter.get_total_flops())"
    )
    lines = "import fastattn", "from torch.utils.flop_counter import FlopCounterMode"
    for first, second in (lines, lines[::-1]):
        assert printed(code.format(first=first, second=second)) == str(2 * 16 * 4 * 4)


def test_a_module_that_is_there_is_not_waited_for():
    called, finders = [], list(sys.meta_path)
    when_imported("json", lambda: called.append(1))
    assert called == [1] and sys.meta_path == finders
