"""The builders of intervals against their definitions, pair by pair, written without them."""

import functools
import itertools

import pytest
import torch

from fastattn import InputError, attention, attention_varlen, backends, intervals


def kept_by(function, s_q, s_kv):
    return torch.tensor([[bool(function(i, j)) for j in range(s_kv)] for i in range(s_q)])


def window_start(place, length, window, dilation):
    """NATTEN's get_window_start (natten/csrc, 2023) for odd windows."""
    half = window // 2
    if dilation <= 1:
        return max(place - half, 0) + (place + half >= length) * (length - place - half - 1)
    start = place - half * dilation
    if start < 0:
        return place % dilation
    if place + half * dilation >= length:
        line, whole = place % dilation, length // dilation * dilation
        rest = length - whole
        return length - rest + line - 2 * half * dilation if line < rest else whole + line - window * dilation
    return start


def neighbours(place, length, window, dilation, causal):
    if causal:
        return [p for n in range(window) if (p := place - n * dilation) >= 0]
    start = window_start(place, length, window, dilation)
    return [start + n * dilation for n in range(window)]


GRIDS = [
    ((11,), (3,), (1,), (False,)),
    ((13,), (3,), (4,), (False,)),
    ((12,), (5,), (2,), (True,)),
    ((6, 7), (3, 5), (1, 1), (False, False)),
    ((7, 11), (3, 3), (2, 3), (False, False)),
    ((5, 4), (3, 3), (1, 1), (True, False)),
    ((6, 5), (3, 5), (2, 1), (False, False)),
    ((3, 5, 4), (3, 3, 3), (1, 1, 1), (False, False, False)),
    ((4, 6, 5), (3, 3, 1), (1, 2, 1), (True, False, True)),
]


@pytest.mark.parametrize(("grid", "window", "dilation", "causal"), GRIDS)
def test_neighbourhoods_are_those_of_natten(grid, window, dilation, causal):
    found = intervals.neighbourhood(grid, window, dilation=dilation, causal=causal)
    tokens = list(itertools.product(*map(range, grid)))
    expected = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, token in enumerate(tokens):
        axes = (neighbours(*sizes) for sizes in zip(token, grid, window, dilation, causal, strict=True))
        for neighbour in itertools.product(*axes):
            expected[i, tokens.index(neighbour)] = True
    assert torch.equal(intervals.to_mask(found, len(tokens)), expected)
    outer = torch.tensor(window[:-1]).prod() * (window[-1] if dilation[-1] > 1 else 1)
    assert found.shape[1] <= outer


def test_even_windows_look_further_back():
    found = intervals.neighbourhood((6,), 4)[:, 0]
    assert found.tolist() == [[0, 4], [0, 4], [0, 4], [1, 5], [2, 6], [2, 6]]


def test_whole_rows_of_a_grid_become_one_range():
    assert intervals.neighbourhood((8, 5), (3, 5)).shape == (40, 1, 2)


def test_sliding_tiles_are_neighbourhoods_of_tiles():
    grid, tile, window = (4, 6, 8), (2, 3, 2), (1, 2, 3)
    order = intervals.tile_order(grid, tile)
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)[order]
    tiles = places // torch.tensor(tile)
    expected = torch.ones(len(order), len(order), dtype=torch.bool)
    for n, (length, width) in enumerate(zip((2, 2, 4), window, strict=True)):
        first = (tiles[:, n] - width // 2).clamp(0, length - width)
        expected &= (tiles[None, :, n] >= first[:, None]) & (tiles[None, :, n] < first[:, None] + width)
    assert torch.equal(intervals.to_mask(intervals.sliding_tiles(grid, tile, window), len(order)), expected)
    assert torch.equal(order[order.argsort()], torch.arange(len(order)))


IDS = [0] * 3 + [1] * 5 + [2] * 2  # of documents of 3, 5 and 2 tokens
CHOSEN = torch.tensor([[2, 0, -1], [1, 1, -4]])
PATTERNS = {
    "causal": (intervals.causal(4, 9), lambda i, j: j <= i + 5),
    "documents": (intervals.documents([3, 5, 2]), lambda i, j: IDS[i] == IDS[j]),
    "causal documents": (intervals.documents([3, 5, 2], causal=True), lambda i, j: IDS[i] == IDS[j] and j <= i),
    "segments": (intervals.segments(torch.tensor([IDS]))[0, 0], lambda i, j: IDS[i] == IDS[j]),
    "prefix": (intervals.prefix_lm(9, 4), lambda i, j: j < 4 or j <= i),
    "prefixes": (intervals.prefix_lm(9, torch.tensor([4, 12]))[1, 0], lambda i, j: True),
    "chunks": (intervals.chunked(11, 4), lambda i, j: i // 4 == j // 4 and j <= i),
    "window": (intervals.sliding_window(9, 2, 1), lambda i, j: -2 <= j - i <= 1),
    "global": (intervals.sliding_window(12, 2, 1, global_tokens=3), lambda i, j: -2 <= j - i <= 1 or min(i, j) < 3),
    "dilated": (intervals.dilated(13, 2, 1, dilation=3), lambda i, j: j - i in (-6, -3, 0, 3)),
    "shared prefix": (
        intervals.shared_prefix(3, [5, 2]),
        lambda i, j: j <= i and (j < 3 or IDS[i] == IDS[j]),
    ),
    "shared prefix, both ways": (
        intervals.shared_prefix(3, [5, 2], causal=False),
        lambda i, j: IDS[i] == IDS[j] or (j < 3 <= i),
    ),
    "block diffusion": (
        intervals.block_diffusion(7, 3),
        lambda i, j: (
            (j < 7 and i < 7 and i // 3 == j // 3)
            or (j >= 7 and (j - 7) // 3 < i // 3 if i < 7 else j >= 7 and (j - 7) // 3 <= (i - 7) // 3)
        ),
    ),
    "selected blocks": (
        intervals.selected_blocks(CHOSEN, 4, 5, rows=3),
        lambda i, j: j // 4 in CHOSEN[i // 3].tolist(),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_keep_what_their_formulas_say(name):
    found, formula = PATTERNS[name]
    s_q, s_kv = found.shape[0], 12 if name == "selected blocks" else 9 if name == "causal" else found.shape[0]
    assert found.dtype == torch.int32
    assert torch.equal(intervals.to_mask(found, s_kv), kept_by(formula, s_q, s_kv))
    assert torch.equal(intervals.merged(found), found)  # in order, and as few as can be


def test_ranges_and_masks_turn_into_each_other():
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(-3, 20, (2, 3, 40, 5), generator=draw)
    given = torch.stack([starts, starts + torch.randint(-2, 7, starts.shape, generator=draw)], -1).int()
    mask, found = intervals.to_mask(given.clamp(0, 20), 20), intervals.merged(given.clamp(0, 20))
    assert torch.equal(intervals.to_mask(given, 20), mask)
    assert torch.equal(found, intervals.from_mask(mask))
    other = intervals.from_mask(torch.rand(40, 20, generator=draw) > 0.5)
    assert torch.equal(intervals.to_mask(intervals.union(given, other), 20), mask | intervals.to_mask(other, 20))
    both = intervals.intersection(given, other)
    assert torch.equal(intervals.to_mask(both, 20), mask & intervals.to_mask(other, 20))
    nothing = torch.zeros(4, 0, 2, dtype=torch.int32)
    assert intervals.merged(nothing).tolist() == intervals.from_mask(mask[0, 0, :4, :0]).tolist() == [[[0, 0]]] * 4


@pytest.mark.parametrize("backend", [name for name in ("eager", "portable", "cpu") if backends()[name] is None])
def test_rows_without_ranges_keep_nothing(backend):
    """Also in a call whose plan is one for a range, and packed; an empty tensor has no address to give to a kernel."""
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in "qkv")
    one, none, ends = torch.tensor([[0, 5]]).int().expand(5, 1, 2), torch.zeros(5, 0, 2).int(), torch.tensor([0, 5, 10])
    attend = functools.partial(attention, backend=backend)
    packed = {"cu_seqlens_q": ends.int(), "cu_seqlens_kv": ends.int(), "max_seqlen_q": 5, "max_seqlen_kv": 5}
    for ranges in (one, none) * 2:
        nothing = ranges is none
        assert bool((attend(q, k, v, intervals=ranges) == 0).all()) == nothing
        rows = (x.flatten(0, 1) for x in (q, k, v))
        out = attention_varlen(*rows, **packed, intervals=ranges.repeat(2, 1, 1), backend=backend)
        assert bool((out == 0).all()) == nothing
    out, found = attend(q, k, v, intervals=none, return_stats=True)
    assert not out.any() and not found.key_sum.any() and not found.entropy.any() and (found.largest_key == -1).all()
    assert not torch.func.jvp(lambda x: attend(x, k, v, intervals=none), (q,), (k,))[1].any()
    assert not torch.func.grad(lambda x: attend(q, k, x, intervals=none).sum())(v).any()


WRONG = {
    "floats": (lambda: intervals.merged(torch.zeros(2, 1, 2)), "intervals"),
    "no mask": (lambda: intervals.from_mask(torch.zeros(2, 2)), "mask"),
    "negative": (lambda: intervals.documents([2, -1]), "lengths"),
    "scattered": (lambda: intervals.segments(torch.tensor([[0, 1, 0]])), "tokens of one id apart"),
    "flat": (lambda: intervals.segments(torch.tensor([0, 1])), "segment_ids"),
    "no chunk": (lambda: intervals.chunked(4, 0), "chunk"),
    "rows": (lambda: intervals.selected_blocks(CHOSEN, 4, 9, rows=3), "chosen"),
    "window": (lambda: intervals.neighbourhood((4, 9), 5), "window"),
    "dimensions": (lambda: intervals.neighbourhood((4, 9), (3, 3, 3)), "window"),
    "tile": (lambda: intervals.tile_order((4, 9), (2, 2)), "tile"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_is_allowed(name):
    call, word = WRONG[name]
    with pytest.raises(InputError, match=word) as error:
        call()
    assert "allowed: " in str(error.value)
