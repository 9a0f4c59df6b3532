"""Every error message states the argument, what was given and what is allowed, and every message has a test."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastattn
from fastattn import attention, attention_varlen, scaled_dot_product_attention
from fastattn.errors import InputError
from fastattn.problem import Inputs, check_inputs
from fastattn.spec import AttentionSpec

PACKAGE = Path(fastattn.__file__).parent
INF, NAN = float("inf"), float("nan")


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


Q, K = x(2, 5, 4, 8), x(2, 7, 2, 8)
T, CU = x(5, 4, 8), ints(0, 2, 5)
STATE = torch.tensor([1, 2])
JAGGED = torch.nested.nested_tensor([x(5, 4, 8), x(3, 4, 8)], layout=torch.jagged).transpose(1, 2)


def dense(q=Q, k=K, v=K, **options):
    return lambda: attention(q, k, v, **options)


def packed(q=T, k=T, v=T, cu_q=CU, cu_kv=CU, **options):
    return lambda: attention_varlen(q, k, v, cu_q, cu_kv, **options)


def torch_like(query, key=None, value=None, *more, **options):
    key = query if key is None else key
    return lambda: scaled_dot_product_attention(query, key, key if value is None else value, *more, **options)


def unchecked(dropout_p=0.0, **fields):
    """What only code inside the package can build."""
    return lambda: check_inputs(Inputs(**({"q": Q, "k": K, "v": K} | fields)), AttentionSpec(1.0, dropout_p=dropout_p))


# call, argument, given, allowed
WRONG = [
    (dense(return_weights="max"), "return_weights", "'max'", 'True, False or "mean"'),
    # q, k, v
    (dense(q=None), "q", "NoneType", "a torch.Tensor"),
    (dense(k=[1.0]), "k", "list", "a torch.Tensor"),
    (dense(v=np.zeros((2, 7, 2, 8))), "v", "ndarray", "a torch.Tensor"),
    (packed(q=None), "q", "NoneType", "a torch.Tensor"),
    (torch_like(None, Q), "query", "NoneType", "a torch.Tensor"),
    (dense(q=Q.to_sparse()), "q", "torch.sparse_coo", "a dense tensor"),
    (dense(q=torch.nested.nested_tensor([Q[0], Q[0, 1:]])), "q", "a nested tensor with dense", "three nested tensors"),
    (torch_like(JAGGED, attn_mask=x(5, 5)), "query", "a nested tensor with attn_mask or other lengths", "neither"),
    (dense(q=Q[0]), "q", "shape (5, 4, 8)", "(B, S, H, D)"),
    (dense(v=K[None]), "v", "shape (1, 2, 7, 2, 8)", "(B, S, H, D)"),
    (packed(q=Q), "q", "shape (2, 5, 4, 8)", "(T, H, D)"),
    (packed(k=x(8)), "k", "shape (8,)", "(T, H, D)"),
    (torch_like(x(8)), "query", "shape (8,)", "(N, ..., H, L, E)"),
    (dense(q=x(2, 5, 4, 0)), "q", "shape (2, 5, 4, 0)", "a head dim of at least 1"),
    (packed(v=x(5, 4, 0)), "v", "shape (5, 4, 0)", "a head dim of at least 1"),
    (dense(k=x(2, 7, 0, 8), v=x(2, 7, 0, 8)), "k", "shape (2, 7, 0, 8)", "at least one head"),
    (dense(q=Q.int()), "q", "torch.int32", "float16, bfloat16, float32 or float64"),
    (dense(q=Q.cfloat()), "q", "torch.complex64", "float16, bfloat16, float32 or float64"),
    (dense(k=K.double()), "k", "torch.float64", "torch.float32, the dtype of q"),
    (dense(k=x(2, 7, 2, 9)), "k", "head dim 9", "head dim 8, that of q"),
    (dense(v=x(2, 6, 2, 8)), "v", "shape (2, 6, 2, 8)", "the shape of k, (2, 7, 2, 8)"),
    (packed(v=x(6, 4, 8)), "v", "shape (6, 4, 8)", "the shape of k, (5, 4, 8)"),
    (dense(q=x(3, 5, 4, 8)), "k", "batch 2", "batch 3, that of q"),
    (dense(k=x(2, 7, 3, 8), v=x(2, 7, 3, 8)), "k", "3 heads for 4 query heads", "divides the query heads"),
    (dense(layout="BHSD"), "k", "7 heads for 5 query heads", "divides the query heads"),
    (dense(k=x(2, 7, 2, 8, device="meta")), "k", "device meta", "device cpu, that of q"),
    (dense(q=x(2, 5, 4, 8, device="meta")), "k", "device cpu", "device meta, that of q"),
    # numbers
    (dense(scale=NAN), "scale", "nan", "a finite number"),
    (dense(scale=-INF), "scale", "-inf", "a finite number"),
    (dense(scale="wide"), "scale", "'wide'", "a Python number"),
    (dense(scale=torch.tensor(1.0, requires_grad=True)), "scale", "a tensor", "a Python number"),
    (packed(softcap=[3]), "softcap", "[3]", "a Python number"),
    (dense(softcap=-1), "softcap", "-1.0", "a positive finite number, or None"),
    (dense(softcap=INF), "softcap", "inf", "a positive finite number, or None"),
    (dense(dropout_p=1.5), "dropout_p", "1.5", "a probability in [0, 1]"),
    (dense(dropout_p=-0.1), "dropout_p", "-0.1", "a probability in [0, 1]"),
    (dense(dropout_p=NAN), "dropout_p", "nan", "a probability in [0, 1]"),
    (dense(dropout_p=True), "dropout_p", "True", "a Python number"),
    (dense(dropout_p=None), "dropout_p", "None", "a Python number"),
    (torch_like(Q, None, None, None, 2.0), "dropout_p", "2.0", "a probability in [0, 1]"),
    # names
    (dense(layout="SBHD"), "layout", "'SBHD'", "'BSHD' or 'BHSD'"),
    (dense(layout="THD"), "layout", "'THD'", "attention_varlen"),
    (dense(backend="fast"), "backend", "'fast'", "None, "),
    (packed(backend=["eager"]), "backend", "['eager']", "'eager'"),
    # band
    (dense(causal="no"), "causal", "'no'", "True or False"),
    (torch_like(Q, is_causal=None), "causal", "None", "True or False"),
    (dense(window=3), "window", "3", "(left, right)"),
    (dense(window=(1, 2, 3)), "window", "(1, 2, 3)", "(left, right)"),
    (dense(window=(-2, 0)), "window", "-2", "ints >= 0, and None or -1"),
    (dense(window=(1.5, 0)), "window", "1.5", "ints >= 0, and None or -1"),
    (packed(window=(0, True)), "window", "True", "ints >= 0, and None or -1"),
    # terms of the scores
    (dense(mask=[True]), "mask", "list", "a torch.Tensor or None"),
    (dense(bias=1.0), "bias", "float", "a torch.Tensor or None"),
    (dense(bias=x(1, 1, 1, 5, 7)), "bias", "shape (1, 1, 1, 5, 7)", "at most 4 dimensions"),
    (dense(bias=x(7, 5)), "bias", "shape (7, 5)", "broadcasts to (B, H_q, S_q, S_kv) = (2, 4, 5, 7)"),
    (dense(mask=x(2, 5, 7, dtype=torch.bool)), "mask", "shape (2, 5, 7)", "= (2, 4, 5, 7)"),
    (dense(mask=x(5, 7)), "mask", "torch.float32", "torch.bool, True = attend"),
    (dense(bias=x(5, 7, dtype=torch.bool)), "bias", "torch.bool", "float16, bfloat16, float32 or float64"),
    (dense(bias=x(5, 7, device="meta")), "bias", "device meta", "device cpu"),
    # one number for each head
    (dense(sinks=[0.0] * 4), "sinks", "list", "a torch.Tensor or None"),
    (dense(sinks=x(2)), "sinks", "shape (1, 2)", "(H_q,) = (4,) or (B, H_q) = (2, 4)"),
    (dense(alibi_slopes=x(3, 4)), "alibi_slopes", "shape (3, 4)", "(B, H_q) = (2, 4)"),
    (packed(alibi_slopes=x(1, 1, 4)), "alibi_slopes", "shape (1, 1, 4)", "(B, H_q) = (2, 4)"),
    (dense(sinks=x(4).int()), "sinks", "torch.int32", "a floating dtype"),
    (dense(alibi_slopes=x(4).requires_grad_()), "alibi_slopes", "requires grad", "one that does not"),
    # segments
    (dense(segment_ids=[0] * 5), "segment_ids", "list", "a tensor, or a pair (for q, for kv)"),
    (dense(segment_ids=(CU, CU, CU)), "segment_ids", "('Tensor', 'Tensor', 'Tensor')", "a pair"),
    (dense(segment_ids=(ints(0), None)), "segment_ids", "one of two", "a pair"),
    (dense(segment_ids=(x(2, 5), x(2, 7))), "segment_ids", "torch.float32 for q", "int32 or int64"),
    (dense(segment_ids=x(2, 5).int()), "segment_ids", "shape (2, 5) for kv", "(B, S) = (2, 7)"),
    # intervals
    (dense(intervals=[0, 5]), "intervals", "list", "(B, H_q, S_q, n, 2), or without its first"),
    (dense(intervals=x(5, 2)), "intervals", "shape (5, 2)", "(B, H_q, S_q, n, 2), or without its first"),
    (dense(intervals=x(5, 1, 2).long()), "intervals", "torch.int64", "torch.int32, pairs [start, stop)"),
    (dense(intervals=x(7, 1, 2).int()), "intervals", "shape (1, 1, 7, 1, 2)", "(1|B, 1|H_q, S_q, n, 2) = "),
    (dense(intervals=x(2, 3, 5, 1, 2).int()), "intervals", "shape (2, 3, 5, 1, 2)", "(1 or 2, 1 or 4, 5, n, 2)"),
    (dense(intervals=x(5, 1, 2, device="meta").int()), "intervals", "device meta", "device cpu, that of q"),
    (packed(intervals=x(2, 1, 5, 1, 2).int()), "intervals", "shape (2, 1, 5, 1, 2)", "(1, 1|H_q, T_q, n, 2)"),
    # dropout's state
    (dense(dropout_p=0.1, rng_state=5), "rng_state", "int", "an int64 tensor of 2"),
    (dense(dropout_p=0.1, rng_state=ints(1, 2)), "rng_state", "shape (2,), torch.int32", "an int64 tensor of 2"),
    (dense(dropout_p=0.1, rng_state=STATE[None]), "rng_state", "shape (1, 2)", "an int64 tensor of 2"),
    (dense(dropout_p=0.1, rng_state=STATE.to("meta")), "rng_state", "device meta", "device cpu"),
    # packed sequences
    (packed(cu_q=[0, 5]), "cu_seqlens_q", "list", "an int32 tensor"),
    (packed(cu_kv=None), "cu_seqlens_kv", "NoneType", "an int32 tensor"),
    (packed(cu_q=CU.long()), "cu_seqlens_q", "torch.int64", "torch.int32"),
    (packed(cu_kv=CU.cfloat()), "cu_seqlens_kv", "torch.complex64", "torch.int32"),
    (packed(cu_q=CU[None]), "cu_seqlens_q", "shape (1, 3)", "shape (N + 1,)"),
    (packed(cu_q=CU[:0]), "cu_seqlens_q", "shape (0,)", "shape (N + 1,)"),
    (packed(cu_q=CU.to("meta")), "cu_seqlens_q", "device meta", "device cpu, that of q"),
    (packed(cu_kv=ints(0, 5)), "cu_seqlens_kv", "1 sequences", "2, as in cu_seqlens_q"),
    (packed(cu_q=ints(1, 2, 5)), "cu_seqlens_q", "first value 1", "first value 0"),
    (packed(cu_q=ints(0, 6, 5)), "cu_seqlens_q", "6 followed by 5", "values that never decrease"),
    (packed(cu_kv=ints(0, 2, 4)), "cu_seqlens_kv", "last value 4", "last value 5"),
    (packed(max_seqlen_q=2), "max_seqlen_q", "2", "at least 3, the longest sequence"),
    (packed(max_seqlen_kv=2), "max_seqlen_kv", "2", "at least 3, the longest sequence"),
    (packed(max_seqlen_q=-1), "max_seqlen_q", "-1", "an int >= 0, or None"),
    (packed(max_seqlen_kv=3.0), "max_seqlen_kv", "3.0", "an int >= 0, or None"),
    (packed(*(x(5, 4, 8, device="meta"),) * 3, *(CU.to("meta"),) * 2), "max_seqlen_q", "None", "an int"),
    (unchecked(q=T, k=T, v=T, cu_seqlens_q=CU, cu_seqlens_kv=CU, mask=x(5)), "mask", "a tensor", "None with packed"),
    # the torch signature
    (torch_like(Q, None, None, x(4, 4), is_causal=True), "attn_mask", "with is_causal=True", "one of the two"),
    (torch_like(Q, K), "query, key, value", "(2, 5, 4, 8), (2, 7, 2, 8)", "batches and heads that broadcast"),
    (torch_like(Q, None, None, [True]), "attn_mask", "list", "a boolean or floating tensor, or None"),
    (torch_like(Q, None, None, x(4, 4).int()), "attn_mask", "torch.int32", "a boolean or floating tensor"),
    (torch_like(Q, None, None, x(3, 3)), "attn_mask", "shape (3, 3)", "broadcasts to (2, 5, 4, 4)"),
    (torch_like(Q, None, None, x(1, 1, 1, 4, 4)), "attn_mask", "shape (1, 1, 1, 4, 4)", "broadcasts to (2, 5, 4, 4)"),
    (torch_like(Q[0], None, None, x(3, 3)), "attn_mask", "shape (3, 3)", "broadcasts to (5, 4, 4)"),
    (torch_like(Q, K[:, :3], enable_gqa=True), "k", "3 heads for 5 query heads", "divides"),
]  # fmt: skip


def raised(call):
    with pytest.raises(InputError) as caught:
        call()
    return caught


@pytest.mark.parametrize(
    ("call", "argument", "given", "allowed"), WRONG, ids=[f"{n}-{row[1]}" for n, row in enumerate(WRONG)]
)
def test_message(call, argument, given, allowed):
    message = str(raised(call).value)
    found = re.fullmatch(r"(.+?): got (.+); allowed: (.+)", message, re.DOTALL)
    assert found, message
    assert found.group(1) == argument, message
    assert given in found.group(2), message
    assert allowed in found.group(3), message
    assert re.search(r"\. \S.{5,}\.$", message, re.DOTALL), f"no advice what to do: {message}"


def raise_lines(path):
    """Lines of every ``raise input_error(...)`` in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and "input_error" in ast.unparse(node.exc):
            yield path.name, range(node.lineno, node.end_lineno + 1)


def test_every_message_is_tested():
    files = [PACKAGE / name for name in ("functional.py", "problem.py", "layout.py", "dispatch.py")]
    sites = [site for path in files for site in raise_lines(path)]
    seen = [raised(call).traceback[-1] for call, *_ in WRONG]
    reached = {(Path(entry.path).name, entry.lineno + 1) for entry in seen}
    missing = [(name, lines[0]) for name, lines in sites if not any((name, line) in reached for line in lines)]
    assert len(sites) > 30 and not missing


@pytest.mark.parametrize(
    ("function", "given", "meant"),
    [
        (attention, "is_causal", "causal="),
        (fastattn.explain, "attn_mask", "mask= (True: attend) or bias= (added to the scores)"),
        (attention_varlen, "cu_seqlens_k", "cu_seqlens_kv="),
        (fastattn.explain_varlen, "windows", "window="),
        (fastattn.attention_with_kv_cache, "cache_seqlens", "cache_lengths="),
        (fastattn.explain_with_kv_cache, "softmax_scale", "scale="),
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(function, given, meant):
    required = [Q, K, K, ints(1), ints(1)][
        : 4 if "cache" in function.__name__ else 5 if "varlen" in function.__name__ else 3
    ]
    with pytest.raises(TypeError, match=re.escape(f"'{given}'. Did you mean {meant}? Allowed: q, k")):
        function(*required, **{given: True})


def test_a_name_like_none_of_ours():
    with pytest.raises(TypeError, match=r"'zzz'\. Allowed: q, k, v, causal"):
        attention(Q, K, K, zzz=1)


def test_errors_are_what_a_caller_expects_to_catch():
    assert issubclass(fastattn.InputError, ValueError)
    assert issubclass(fastattn.UnsupportedError, NotImplementedError)


@pytest.mark.parametrize(
    "call",
    [
        dense(scale=np.float64(0.5), softcap=0),
        dense(window=[2, -1], causal=True),
        dense(dropout_p=0, rng_state=None),
        dense(mask=x(7, dtype=torch.bool), bias=x(5, 1)),
        packed(T[:0], T[:0], T[:0], CU[:1], CU[:1]),
        packed(max_seqlen_q=100, max_seqlen_kv=3),
    ],
)
def test_the_lenient_side_of_the_checks(call):
    assert call().isfinite().all()


def test_meta_tensors_give_shapes():
    q, k = x(2, 5, 4, 8, device="meta"), x(2, 7, 2, 16, device="meta")
    assert attention(q, k[..., :8], k).shape == (2, 5, 4, 16)
    t, cu = x(5, 4, 8, device="meta"), CU.to("meta")
    out, lse = attention_varlen(t, t, t, cu, cu, max_seqlen_q=3, max_seqlen_kv=3, return_lse=True)
    assert out.shape == (5, 4, 8) and lse.shape == (4, 5) and lse.dtype == torch.float32
