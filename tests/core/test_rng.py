"""Random bits of dropout: Philox against known answers, and the statistics of the bits."""

import itertools

import pytest
import torch

from fastattn import rng
from fastattn.spec import AttentionSpec

# Random123's kat_vectors for philox4x32-7: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    assert [f"{int(word):08x}" for word in rng.philox(words(counter), words(key))] == answer.split()


def philox_in_plain_ints(counter, key, rounds):
    """A transcription of the paper's round function, sharing nothing with ours."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_elements_follow_the_documented_counter():
    seed, offset, heads = 0x1234_5678_9ABC_DEF0, 2**35 + 11, 3
    i, j = torch.arange(7)[:, None], torch.arange(70)[None, :]
    bits = rng.random_bits(torch.tensor([seed, offset]), torch.tensor(2 * heads + 1), i, j)
    for row, column in itertools.product(range(7), range(70)):
        counter = (row, (column // 32) * 4 + (column % 8) // 2, 2 * heads + 1, offset % 2**32)
        word = philox_in_plain_ints(counter, (seed % 2**32, seed >> 32), 7)[(column % 32) // 8]
        assert int(bits[row, column]) == (word >> (16 * (column % 2))) & 0xFFFF


def drawn(seed=1, offset=0, head=0, rows=256, columns=256):
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    return rng.random_bits(torch.tensor([seed, offset]), torch.tensor(head), i, j)


def test_bits_are_uniform():
    bits = drawn()
    counts = torch.bincount(bits.flatten() // 256, minlength=256).double()
    expected = counts.sum() / 256
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5
    for bit in range(16):
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / 256


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_survivors_are_as_many_as_promised(p):
    spec = AttentionSpec(1.0, dropout_p=p)
    i, j = torch.arange(256)[:, None], torch.arange(256)[None, :]
    rate = float(rng.dropout_keep(spec, torch.tensor([3, 5]), torch.tensor(1), i, j).double().mean())
    assert abs(rate - (1 - p)) <= 5 * (p * (1 - p)) ** 0.5 / 256


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 1 + 2**32}, {"offset": 1}, {"head": 1}], ids=["seed", "high seed", "offset", "head"]
)
def test_other_coordinates_give_unrelated_bits(other):
    one, two = drawn().double().flatten(), drawn(**other).double().flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / 256


def test_neighbours_are_unrelated():
    bits = drawn().double()
    for one, two in ((bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1]), (bits[:, 8:], bits[:, :-8])):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 5 / 250


def test_a_tile_is_a_part_of_the_whole():
    i, j = torch.arange(40, 56)[:, None], torch.arange(96, 130)[None, :]
    tile = rng.random_bits(torch.tensor([1, 0]), torch.tensor(0), i, j)
    assert torch.equal(tile, drawn()[40:56, 96:130])


def test_states_follow_the_seed_of_torch():
    torch.manual_seed(5)
    first, second = rng.new_rng_state(torch.device("cpu")), rng.new_rng_state(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, rng.new_rng_state(torch.device("cpu"))) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 64), (5, 70), (31, 33), (96, 96)])
def test_columns_are_the_elements_one_by_one(begin, end):
    state = torch.tensor([2**62 - 3, 2**40 + 5])
    head, i = torch.arange(6).view(2, 3, 1, 1), torch.arange(4, 9)[:, None]
    columns = rng.random_bits_of_columns(state, head, i, begin, end)
    assert torch.equal(columns, rng.random_bits(state, head, i, torch.arange(begin, end)))
