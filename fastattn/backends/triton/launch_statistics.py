"""The host side of statistics of the weights and of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.triton import scans
from fastattn.backends.triton.arguments import PerRow, Stats
from fastattn.backends.triton.bias_sums import BiasSums
from fastattn.backends.triton.derived_configs import config_of
from fastattn.backends.triton.launch import Backward, Call, _rows, _scores, compiled
from fastattn.backends.triton.plans import device_of, launched
from fastattn.backends.triton.statistics import (
    OfKeys,
    OfRows,
    key_statistics_kernel,
    row_statistics_kernel,
    statistics_dbias_kernel,
    statistics_dk_kernel,
    statistics_dq_kernel,
)
from fastattn.problem import Grads, Inputs, Statistics, StatisticsGradient
from fastattn.spec import AttentionSpec


def forward(inputs: Inputs, spec: AttentionSpec) -> Statistics:
    """The statistics that the spec defines."""
    with device_of(inputs.q):
        pass_ = Pass.of(inputs, spec)
        entropy, largest = (inputs.q.new_zeros(inputs.lse_shape(), dtype=torch.float32) for _ in range(2))
        pass_.rows(OfRows(entropy, largest, pass_.largest_key), None, None)
        keys = of_keys(*(inputs.q.new_zeros(inputs.key_shape(), dtype=torch.float32) for _ in range(2)))
        pass_.keys(keys)
        return Statistics(entropy, largest, pass_.largest_key, keys.key_sum, keys.key_max)


def backward(gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> Grads:
    """The gradients named in ``needs``: first what they take of each row, then each by its own kernel."""
    with device_of(inputs.q):
        pass_ = Pass.of(inputs, spec)
        rows, keys = inputs.lse_shape(), inputs.key_shape()
        given = OfRows(
            _given(gradient.entropy, rows, inputs.q), _given(gradient.largest_logit, rows, inputs.q), None
        )  # fmt: skip
        dkeys = of_keys(_given(gradient.key_sum, keys, inputs.q), None)
        pass_.rows(OfRows(None, None, pass_.largest_key), given, dkeys)
        has_bias, has_sinks = "bias" in needs and inputs.bias is not None, "sinks" in needs and inputs.sinks is not None
        return Grads(
            dq=pass_.dq(given, dkeys) if "q" in needs else None,
            dk=pass_.dk(given, dkeys) if "k" in needs else None,
            dbias=pass_.dbias(given, dkeys) if has_bias else None,
            dsinks=Backward(pass_.call, pass_.call.q, pass_.stats).dsinks() if has_sinks else None,
        )


def _given(gradient: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if gradient is None:
        return like.new_zeros(shape, dtype=torch.float32)
    return gradient.to(torch.float32).contiguous()


def of_keys(key_sum: Tensor, key_max: Tensor | None) -> OfKeys:
    """Both as the kernels read or write them."""
    _, stride_b, stride_h = PerRow.of(key_sum)
    return OfKeys(key_sum, key_max, stride_b, stride_h)


@dataclass(frozen=True)
class Pass:
    """A call without values and dropout, which the weights do not depend on, and what its kernels share."""

    call: Call
    stats: Stats
    largest_key: Tensor

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec) -> Pass:
        without = AttentionSpec(spec.scale, spec.softcap, spec.left, spec.right, spec.anchor)
        call = Call.of(inputs.replace(v=inputs.k, rng_state=None), without)
        lse = inputs.q.new_empty(inputs.lse_shape(), dtype=torch.float32)
        return cls(call, Stats.like(lse), torch.empty_like(lse, dtype=torch.int64).fill_(-1))

    def rows(self, found: OfRows, given: OfRows | None, dkeys: OfKeys | None) -> None:
        call, x = self.call, self.call.inputs
        if not self.largest_key.numel():
            return
        if given is not None:  # Triton 3.6.0 cannot ask whether a tuple is None if one of its members is
            given = given._replace(largest_key=self.largest_key)
        config = config_of(call, "row_statistics")
        grid, schedule = call.schedule(x.max_seqlen_q, config.block_m, x.batch * x.heads_q)
        terms = call.with_tiles("q", config.block_m, config.block_n)
        launched(row_statistics_kernel, grid)(
            call.q, call.k, found, given, dkeys, self.stats, terms, call.sizes, schedule,
            **compiled(x.q.device, call.flags, config),
        )  # fmt: skip

    def keys(self, found: OfKeys) -> None:
        call, x = self.call, self.call.inputs
        if not found.key_sum.numel():
            return
        config = config_of(call, "key_statistics")
        grid, schedule = call.schedule(x.max_seqlen_kv, config.block_n, x.batch * x.heads_q)
        terms = call.with_tiles("kv", config.block_n, config.block_m)
        launched(key_statistics_kernel, grid)(
            call.q, call.k, found, self.stats, terms, call.sizes, schedule,
            **compiled(x.q.device, call.flags, config),
        )  # fmt: skip

    def dk(self, given: OfRows, dkeys: OfKeys) -> Tensor:
        call, x = self.call, self.call.inputs
        dk = torch.empty(x.k.shape, dtype=x.k.dtype, device=x.k.device)
        if dk.numel():
            config = config_of(call, "statistics_dk")
            grid, schedule = call.schedule(x.max_seqlen_kv, config.block_n, x.batch * x.heads_kv)
            terms = call.with_tiles("kv", config.block_n, config.block_m)
            launched(statistics_dk_kernel, grid)(
                call.q, call.k, _rows(dk), OfRows(None, None, self.largest_key), given, dkeys, self.stats, terms,
                call.sizes, schedule, **compiled(x.q.device, call.flags, config, of_keys=True),
            )  # fmt: skip
        return dk

    def dq(self, given: OfRows, dkeys: OfKeys) -> Tensor:
        call, x = self.call, self.call.inputs
        dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
        if dq.numel():
            config = config_of(call, "statistics_dq")
            grid, schedule = call.schedule(x.max_seqlen_q, config.block_m, x.batch * x.heads_q)
            terms = call.with_tiles("q", config.block_m, config.block_n)
            launched(statistics_dq_kernel, grid)(
                call.q, call.k, _rows(dq), OfRows(None, None, self.largest_key), given, dkeys, self.stats, terms,
                call.sizes, schedule, **compiled(x.q.device, call.flags, config),
            )  # fmt: skip
        return dq

    def dbias(self, given: OfRows, dkeys: OfKeys) -> Tensor:
        call, x = self.call, self.call.inputs
        assert x.bias is not None
        if 0 in (x.batch, x.q.shape[1], x.k.shape[1]):
            return torch.zeros(x.bias.shape, dtype=x.bias.dtype, device=x.bias.device)
        config = config_of(call, "statistics_dbias")
        sums = BiasSums.of(x, config)
        terms = scans.with_segments(call.terms, call.segments, "q")
        launched(statistics_dbias_kernel, sums.grid)(
            call.q, call.k, _scores(sums.sums), OfRows(None, None, self.largest_key), given, dkeys, self.stats, terms,
            call.sizes, *sums.shared, **sums.options, **compiled(x.q.device, call.flags, config),
        )  # fmt: skip
        return sums.finished(x.bias)
