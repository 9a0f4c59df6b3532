"""Memory for gradients of a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastattn.backends.triton.arguments import coded
from fastattn.backends.triton.configs import Config
from fastattn.problem import Inputs


@dataclass(frozen=True)
class BiasSums:
    """Memory for a gradient of the bias, whose rows and columns are summed by tiles where they broadcast."""

    sums: Tensor
    grid: tuple[int, int]
    shared: tuple[int, int]  # the sequences and heads that share a number, coded
    options: dict[str, bool]

    @classmethod
    def of(cls, x: Inputs, config: Config) -> BiasSums:
        assert x.bias is not None
        rows, columns = triton.cdiv(x.q.shape[1], config.block_m), triton.cdiv(x.k.shape[1], config.block_n)
        options = {"SUM_ROWS": x.bias.shape[2] == 1, "SUM_COLUMNS": x.bias.shape[3] == 1}
        size = (
            rows if options["SUM_ROWS"] else x.q.shape[1],
            columns if options["SUM_COLUMNS"] else x.k.shape[1],
        )
        sums = torch.empty(*x.bias.shape[:2], *size, dtype=torch.float32, device=x.bias.device)
        shared = coded(x.batch // sums.shape[0]), coded(x.heads_q // sums.shape[1])
        return cls(sums, (rows * columns * sums.shape[0], sums.shape[1]), shared, options)

    def finished(self, bias: Tensor) -> Tensor:
        dims = [d for d, is_summed in zip((2, 3), self.options.values(), strict=True) if is_summed]
        return (self.sums.sum(dims, keepdim=True) if dims else self.sums).to(bias.dtype)
