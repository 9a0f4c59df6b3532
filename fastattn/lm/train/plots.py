"""The loss curve as a picture. Needs matplotlib: ``pip install 'fastattn[bench]'``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastattn.files import replaced_file


def plot_losses(records: list[dict[str, float]], levels: Mapping[str, float], path: Path) -> None:
    """Draw training and held-out loss over steps to a PNG, in one piece.

    Args:
        records: of a run's log.
        levels: what to compare with: losses by name, drawn as lines across.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    for name, level in levels.items():
        axes.axhline(level, color="gray", linestyle="--", label=name)
    axes.set(xlabel="step", ylabel="loss (nats per label)", title="fastattn: training")
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png")
