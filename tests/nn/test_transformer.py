"""torch's transformer layers with replaced attention: equal results, fewer calls, no work for padding."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune

from fastattn import MultiHeadAttention, replace_attention
from fastattn.nn import attention, transformer

E, H, N, S, T = 16, 2, 3, 6, 4
PADDING = torch.arange(S)[None] >= torch.tensor([[S], [S - 2], [1]])
OPTIONS = {
    "plain": {}, "norm first": {"norm_first": True}, "sequence first": {"batch_first": False},
    "gelu": {"activation": "gelu"}, "module": {"activation": nn.SiLU()}, "no bias": {"bias": False},
    "dropout": {"dropout": 0.3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_torchs_remarks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stacks(**options):
    """An encoder and a decoder of torch's, without dropout of weights, and the same with replaced attention."""
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64} | options
    theirs = nn.ModuleDict({
        "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, **options), 2, nn.RMSNorm(E)),
        "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, **options), 2),
    }).double()  # fmt: skip
    for module in theirs.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0  # ours drops other elements
    ours = copy.deepcopy(theirs)
    assert len(replace_attention(ours)) == 6
    return theirs.eval(), ours.eval()


def run(model, batch_first=True):
    torch.manual_seed(0)
    src, tgt = torch.randn(N, S, E).double(), torch.randn(N, T, E).double()
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    src, tgt = (src, tgt) if batch_first else (src.transpose(0, 1), tgt.transpose(0, 1))
    memory = model["encoder"](src, src_key_padding_mask=PADDING)
    return model["decoder"](tgt, memory, tgt_mask=causal, memory_key_padding_mask=PADDING), memory


@contextlib.contextmanager
def without_fastpath():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def calls(monkeypatch):
    """The classes of the modules that are called."""
    found, call = [], nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda m, *a, **k: (found.append(type(m)), call(m, *a, **k))[1])
    return found


@pytest.fixture
def lengths(monkeypatch):
    """The numbers of tokens of packed calls."""
    found, varlen = [], attention.attention_varlen
    monkeypatch.setattr(attention, "attention_varlen", lambda q, *a, **k: (found.append(len(q)), varlen(q, *a, **k))[1])
    return found


TORCHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [False, True])
def test_results_and_gradients_are_torchs(options, training, calls):
    theirs, ours = stacks(**options)
    if options.get("dropout"):  # torch's draws follow the memory order of what its own attention returns
        theirs = copy.deepcopy(ours)
        for module in theirs.modules():
            module.__class__ = next((base for base in TORCHS if isinstance(module, base)), type(module))
    found = []
    for model in (theirs, ours):
        model.train(training)
        with torch.no_grad():
            inferred = run(model, options.get("batch_first", True))
        out, memory = run(model, options.get("batch_first", True))
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append((*inferred, out, memory, *torch.autograd.grad(out.square().sum(), wanted)))
        called, calls[:] = set(calls), []
    torch.testing.assert_close(*found)
    assert not called & {nn.Linear, nn.LayerNorm, nn.Dropout, MultiHeadAttention, transformer.TransformerEncoderLayer}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_class(model):
    for layers in (model["encoder"].layers, model["decoder"].layers):
        layers[1].linear2.__class__ = Doubled


def block_of_their_own(model):
    for layers in (model["encoder"].layers, model["decoder"].layers):
        layers[0]._ff_block = lambda x: 3 * x


CHANGES = {
    "hook": lambda m: m["encoder"].layers[0].linear1.register_forward_hook(lambda m, x, y: 2 * y),
    "hook before": lambda m: m["decoder"].layers[1].norm3.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "hook of attention": lambda m: m["encoder"].layers[1].self_attn.register_forward_hook(lambda *x: (-x[2][0], None)),
    "hook of a layer": lambda m: m["encoder"].layers[1].register_forward_hook(lambda m, x, y: -y),
    "forward": lambda m: setattr(m["decoder"].layers[0].norm1, "forward", lambda x: x + 1),
    "forward of a layer": lambda m: setattr(m["encoder"].layers[0], "forward", lambda x, **_: x + 1),
    "dropout alone": lambda m: m["encoder"].layers[0].dropout.train(),
    "pruned": lambda m: prune.l1_unstructured(m["encoder"].layers[0].linear1, "weight", 0.5),
    "class": other_class, "block": block_of_their_own,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("grad", [False, True])
def test_changed_layers_compute_what_torchs_would(change, grad):
    found = []
    for model in stacks(dropout=0.3):
        change(model)
        with torch.set_grad_enabled(grad), without_fastpath():  # which ignores some of these changes
            found.append(run(model))
    torch.testing.assert_close(*found)


def test_hooks_for_all_modules_see_every_call(calls):
    model, seen = stacks()[1], []
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m))), torch.no_grad():
        run(model)
    assert {nn.Linear, nn.LayerNorm, nn.Dropout, MultiHeadAttention} <= set(seen)


def test_padding_is_dropped_once_and_comes_back_as_zeros(lengths, calls):
    theirs, ours = (model["encoder"] for model in stacks())
    x = torch.randn(N, S, E).double()
    for padding in (PADDING, torch.ones_like(PADDING)):
        with torch.no_grad():
            out = ours(x, src_key_padding_mask=padding)
        assert lengths == [int((~padding).sum())] * 2 and not out[padding].any()
        lengths.clear()
        if not padding.all():  # torch refuses a batch of nothing
            with torch.no_grad():
                torch.testing.assert_close(out, theirs(x, src_key_padding_mask=padding))


def kept_by(name):
    """What keeps torch's encoder from dropping padding, as keyword arguments of ``stacks`` and ``encoder``."""
    flipped = {"src_key_padding_mask": PADDING.flip(1)}
    floating = {"src_key_padding_mask": torch.zeros(N, S).double().masked_fill(PADDING, -3.0)}
    return {"flipped": ({}, flipped), "floating": ({}, floating), "norm first": ({"norm_first": True}, {}),
            "a mask": ({}, {"mask": torch.ones(S, S, dtype=torch.bool).triu(1)})}[name]  # fmt: skip


@pytest.mark.parametrize("name", ["flipped", "floating", "norm first", "a mask"])
def test_padding_stays_where_torch_keeps_it(name, lengths):
    options, given = kept_by(name)
    theirs, ours = (model["encoder"] for model in stacks(**options))
    x, given = torch.randn(N, S, E).double(), {"src_key_padding_mask": PADDING, **given}
    with torch.no_grad():
        out = ours(x, **given)
        with without_fastpath() if name == "floating" else contextlib.nullcontext():  # it drops what is not 0
            expected = theirs(x, **given)
    assert not lengths
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("how", ["gradients", "autocast", "training"])
def test_padding_is_computed_where_it_may_be_needed(how, lengths):
    encoder = stacks()[1]["encoder"].train(how == "training").float()
    with torch.set_grad_enabled(how == "gradients"), torch.autocast("cpu", enabled=how == "autocast"):
        out = encoder(torch.randn(N, S, E), src_key_padding_mask=PADDING)
    assert not lengths and out[PADDING].any()


def test_positions_and_windows_in_packed_sequences(lengths):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = MultiHeadAttention(E, H, batch_first=True, window=(2, 0), rope=True, num_kv_heads=1).double()
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(N, S, E).double()
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=PADDING)
        lengths.clear()
        assert replace_attention(encoder) == [] and type(encoder) is transformer.TransformerEncoder
        torch.testing.assert_close(encoder(x, src_key_padding_mask=PADDING), before)
    assert lengths == [int((~PADDING).sum())] * 2


class Encoder(nn.TransformerEncoder):
    """Somebody's own encoder."""


def test_classes_and_copies():
    encoder = stacks()[1]["encoder"]
    assert isinstance(encoder, nn.TransformerEncoder) and isinstance(encoder.layers[0], nn.TransformerEncoderLayer)
    x = torch.randn(N, S, E).double()
    with torch.no_grad():
        expected = encoder(x)
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            torch.testing.assert_close(other(x), expected)
    own = Encoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 1)
    replace_attention(own)
    assert type(own) is Encoder and type(own.layers[0]) is transformer.TransformerEncoderLayer
    untouched = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    transformer.upgrade_layers(untouched)
    assert type(untouched) is nn.TransformerEncoderLayer


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model["decoder"](y, self.model["encoder"](x))


def test_fx_records_each_as_one_node_and_compiled_they_agree():
    wrapped, (x, y) = Wrapped(stacks()[1]), (torch.randn(N, n, E).double() for n in (S, T))
    graph = fx.symbolic_trace(wrapped)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    expected = wrapped(x, y)
    torch.testing.assert_close(graph(x, y), expected)
    torch.testing.assert_close(torch.compile(wrapped, backend="aot_eager", fullgraph=True)(x, y), expected)
