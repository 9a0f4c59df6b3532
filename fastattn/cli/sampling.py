"""The flags of generation that ``generate`` and ``chat`` share. Imports are light."""

from __future__ import annotations

import argparse
from typing import Any

from fastattn.errors import input_error

_TEMPERATURE = 0.8


def add_sampling(parser: argparse.ArgumentParser) -> Any:
    """Add the flags of sampling, and return their group."""
    group = parser.add_argument_group("how tokens are chosen")
    group.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy (default {_TEMPERATURE})")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that make up P")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="make tokens of the text so far unlikelier"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same text each time")
    return group


def sampling_of(args: argparse.Namespace) -> Any:
    """The ``Sampling`` that the flags describe; with beams only the penalty applies.

    Raises:
        InputError: a flag of drawing together with ``--beams``, or a value out of range.
    """
    from fastattn.lm.generate import Sampling

    temperature = _TEMPERATURE if args.temperature is None else args.temperature
    if getattr(args, "beams", None) is not None:
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            value = getattr(args, name)
            if value is not None:
                flag = "--" + name.replace("_", "-")
                raise input_error(flag, value, "nothing with --beams", "Beams draw nothing: leave one of the two out.")
        temperature = 0.0
    return Sampling(temperature, args.top_k, args.top_p, args.seed, args.min_p, args.repetition_penalty)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError for a count below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise input_error("--" + name.replace("_", "-"), value, "a positive int", "Give at least 1.")
