"""``make hub-kernel``: the folder that Hugging Face's kernels loads, and transformers through it, without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.backends.cpu import build, library

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

LOADS = """
import sys
from pathlib import Path
import kernels, torch, torch.nn.functional as F
loaded = kernels.get_local_kernel(Path(sys.argv[1]))
q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), is_causal=True, enable_gqa=True)
torch.testing.assert_close(loaded.flash_attn_func(q, k, k, causal=True), expected.transpose(1, 2))
import fastattn
from fastattn.backends.cpu import library
print(library.delivered()[1])
print(Path(fastattn.__file__).is_relative_to(Path(sys.argv[1]).resolve()))
"""

SERVES = """
import copy
import torch
from transformers.utils import import_utils
# transformers may ask for a newer version than there is to install; what it calls is the same
import_utils.is_kernels_available = lambda *versions: True
import transformers
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, initializer_range=0.4, **sizes)
eager, ours = (
    transformers.LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=name).eval()
    for name in ("eager", "org/fastattn")
)
ours.load_state_dict(eager.state_dict())
ids = torch.randint(0, 64, (2, 9))
mask = torch.ones_like(ids)
mask[0, :4] = 0
expected, found = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (eager, ours))
torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
assert not torch.equal(found, expected), "eager itself"
from fastattn import plan
print(len(plan._known) > 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    out = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, "release/hub_kernel.py", "--out", out], cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def environment(folder, tmp_path_factory):
    """No compiler, and the library of the checkout as if compiled before: it is loaded for the same sources alone."""
    found, why = library.delivered()
    if found is None:
        pytest.skip(why)
    cache = tmp_path_factory.mktemp("cache")
    (cache / f"{build.fingerprint(ROOT / 'csrc')}-{build.LIBRARY}").symlink_to(found.path)
    return {"HF_HUB_OFFLINE": "1", "FASTATTN_CACHE": str(cache), "CXX": "no-such-compiler"}


def run(code, *arguments, cwd, **environment):
    variables = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | environment
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_kernels_loads_the_folder(folder, environment, tmp_path):
    assert sorted(x.name for x in folder.iterdir()) == ["torch-universal"]
    assert not list(folder.rglob("*.so")), "kernels are compiled where it is used"
    *_, delivery, is_its_own = run(LOADS, folder, cwd=tmp_path, **environment)
    assert delivery.endswith("; compiled at first use"), delivery
    assert is_its_own == "True", "the folder's own copy"


def test_transformers_loads_it_by_the_name_of_a_repository(folder, environment, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    printed = run(SERVES, cwd=tmp_path, LOCAL_KERNELS=f"org/fastattn={folder}", **environment)
    assert printed[-1] == "True", "served by a plan"
