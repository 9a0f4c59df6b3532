"""Programs that run without fastattn: torch.jit.trace, torch.export, ONNX; and torch.fx."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch import fx, nn

import fastattn
from fastattn.integrations.export import plain_torch, without_fastattn

X, LONGER = torch.randn(2, 5, 32), torch.randn(3, 9, 32)


class Block(nn.Module):
    """A ViT block as torchvision writes it."""

    def __init__(self, **options):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(32), nn.Linear(32, 32)
        self.attention = fastattn.MultiHeadAttention(32, 4, batch_first=True, **options)

    def forward(self, x):
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + self.mlp(x + y)


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)


MODELS = {
    "block": Block, "causal": Causal, "window": lambda: Block(window=(2, 0)), "grouped": lambda: Block(num_kv_heads=2),
    "by formula": lambda: Block(softcap=5.0, sinks=True),
}  # fmt: skip


def elsewhere(code):
    """What a process without fastattn prints."""
    hide = "import sys; sys.modules['fastattn'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_traced_for_other_shapes(make, grad):
    model = make().eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (X,))
        for x in (X, LONGER):
            torch.testing.assert_close(traced(x), model(x))
    if grad:
        (found,), (expected,) = (
            torch.autograd.grad(m(X).square().sum(), [next(model.parameters())]) for m in (traced, model)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_loads_without_fastattn(tmp_path):
    path = tmp_path / "traced.pt"
    torch.jit.trace(Block().eval(), (X,)).save(path)
    printed = elsewhere(f"import torch; print(torch.jit.load({str(path)!r})(torch.ones(3, 7, 32)).shape)")
    assert printed == "torch.Size([3, 7, 32])"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("how", ["inside", "afterwards"])
def test_exported_in_operators_of_torch(make, how, tmp_path):
    model = make().eval()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    if how == "inside":
        with plain_torch():
            program = torch.export.export(model, (X,), dynamic_shapes=shapes)
    else:
        program = without_fastattn(torch.export.export(model, (X,), dynamic_shapes=shapes))
    assert not any("fastattn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(LONGER), model(LONGER))
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    if make is Block:
        code = f"import torch; print(torch.export.load({str(path)!r}).module()(torch.ones(3, 7, 32)).shape)"
        assert elsewhere(code) == "torch.Size([3, 7, 32])"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aotinductor_runs_without_fastattn(tmp_path):
    model, package = Block().eval().requires_grad_(False), tmp_path / "model.pt2"
    shapes = ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)},)
    program = without_fastattn(torch.export.export(model, (X,), dynamic_shapes=shapes))
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    code = f"""import torch
x, expected = torch.load({str(tmp_path / "both.pt")!r})
found = torch._inductor.aoti_load_package({str(package)!r})(x)
torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
print(found.shape)"""
    torch.save((LONGER, model(LONGER)), tmp_path / "both.pt")
    assert elsewhere(code) == "torch.Size([3, 9, 32])"


def test_onnx_agrees(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, path = Block().eval(), str(tmp_path / "model.onnx")
    shapes = {"x": {0: "batch", 1: "length"}}
    torch.onnx.export(model, (X,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: LONGER.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(LONGER), atol=1e-5, rtol=1e-5)


class Functions(nn.Module):
    def forward(self, q):
        return fastattn.scaled_dot_product_attention(q, q, q) + fastattn.attention(q, q, q, layout="BHSD", causal=True)


def test_fx_records_one_node_for_each_module_and_function():
    model = Block().eval()
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"].count("attention") == 1
    torch.testing.assert_close(graph(X), model(X))
    q = torch.randn(2, 4, 5, 8)
    torch.testing.assert_close(fx.symbolic_trace(Functions())(q), Functions()(q))
