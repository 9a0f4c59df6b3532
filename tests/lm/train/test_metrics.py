"""Entropy, perplexity and bits per byte against values known by hand; the loss curve is a picture."""

import math

import numpy as np
import pytest
import torch

from fastattn.lm.train.metrics import bits_per_byte, peak_flops, perplexity, unigram_entropy
from fastattn.lm.train.plots import plot_losses


def test_unigram_entropy():
    assert unigram_entropy(np.full(8, 3)) == pytest.approx(math.log(8))
    assert unigram_entropy(np.array([0, 7, 0])) == 0.0
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_perplexity_and_bits():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e9) < math.inf
    assert bits_per_byte(math.log(2), tokens=30, text_bytes=10) == pytest.approx(3.0)


def test_the_peak_of_a_cpu_is_not_known():
    assert peak_flops(torch.device("cpu")) is None


def test_the_loss_curve_is_a_png(tmp_path):
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "lr": 1.0}, {"step": 2, "held_out_loss": 4.5}]
    plot_losses(records, {"unigram entropy": 4.8}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
