"""Sines, slopes and buckets against their papers' formulas, written out one number at a time."""

import math

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.models.positions import alibi_slopes, relative_buckets, sinusoidal
from fastattn.nn.rotary import RotaryScaling, rotary_tables


def test_sines_are_those_of_the_paper():
    found = sinusoidal(torch.tensor([[0, 1], [7, 500]]), 6)
    assert found.shape == (2, 2, 6)
    for place, position in (((0, 1), 1), ((1, 0), 7), ((1, 1), 500)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert found[place][2 * i] == pytest.approx(math.sin(angle), abs=1e-4)
            assert found[place][2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-4)


def slopes_of_the_paper(heads):
    """A geometric sequence; between powers of two every second one of the next power's."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return slopes_of_the_paper(below) + slopes_of_the_paper(2 * below)[::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_slopes_are_those_of_the_paper(heads):
    found = alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor(slopes_of_the_paper(heads)))


def bucket_of_the_paper(distance, buckets, longest, causal):
    first = 0
    if causal:
        distance = max(-distance, 0)
    else:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    grown = exact + int(math.log(distance / exact) / math.log(longest / exact) * (buckets - exact))
    return first + min(grown, buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20)])
def test_buckets_are_those_of_the_paper(causal, buckets, longest):
    distances = torch.arange(-200, 201)
    found = relative_buckets(distances, buckets, longest, causal)
    expected = [bucket_of_the_paper(int(d), buckets, longest, causal) for d in distances]
    # where the logarithm is whole, fp32 and fp64 may round to different sides
    whole = [d for d, a, b in zip(distances.tolist(), found.tolist(), expected, strict=True) if a != b]
    assert all(abs(d) in (16, 32, 64) for d in whole)
    assert found.max() == buckets - 1 or causal
    assert set(found.tolist()) == set(expected)


def test_scaled_rotations_keep_short_waves_and_stretch_long_ones():
    scaling = RotaryScaling(8.0, 1.0, 4.0, 8192)
    waves = torch.tensor([2 * math.pi, 2048.0, 4096.0, 8192.0, 100000.0], dtype=torch.float64)
    factor = scaling.apply(2 * math.pi / waves) * waves / (2 * math.pi)
    between = (2 - 1) / (4 - 1)  # two turns, of one to four
    expected = [1.0, 1.0, between + (1 - between) / 8, 1 / 8, 1 / 8]
    torch.testing.assert_close(factor, torch.tensor(expected, dtype=torch.float64))
    plain, scaled = (rotary_tables(torch.arange(4), 64, scaling=x)[0] for x in (None, scaling))
    assert torch.equal(plain[:, 0], scaled[:, 0]) and not torch.equal(plain[:, -1], scaled[:, -1])


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 4.0, 8192), (8.0, 4.0, 4.0, 8192), (8.0, 1.0, 4.0, 0)])
def test_impossible_scalings_are_refused(numbers):
    with pytest.raises(InputError):
        RotaryScaling(*numbers)
