"""Losses as pictures. Needs matplotlib: ``pip install 'fastattn[bench]'``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattn.files import replaced_file


def plot_losses(records: list[dict[str, float]], levels: Mapping[str, float], path: Path) -> None:
    """Draw training and held-out loss over steps to a PNG, in one piece.

    Args:
        records: of a run's log.
        levels: what to compare with: losses by name, drawn as lines across.
        path: of the picture.
    """
    figure, axes = _drawing()
    for name, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:  # a line through one point would not be seen
            axes.plot(*zip(*points, strict=True), style if len(points) > 1 else "o", label=label, markersize=4)
    for name, level in levels.items():
        axes.axhline(level, color="gray", linestyle="--", label=name)
    axes.set(xlabel="step", ylabel="loss (nats per label)", title="fastattn: training")
    _save(figure, axes, path)


def plot_rates(rates: Sequence[float], losses: Sequence[float], suggestion: float, path: Path) -> None:
    """Draw the loss over the learning rate to a PNG, and the rate that is suggested."""
    figure, axes = _drawing()
    axes.semilogx(rates, losses, label="training, smoothed")
    axes.axvline(suggestion, color="gray", linestyle="--", label=f"suggested: {suggestion:.2g}")
    axes.set(xlabel="learning rate", ylabel="loss (nats per label)", title="fastattn: search for the learning rate")
    _save(figure, axes, path)


def _drawing() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png")
