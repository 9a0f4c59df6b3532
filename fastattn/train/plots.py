"""The loss curve as a picture. Needs matplotlib: ``pip install 'fastattn[bench]'``."""

from __future__ import annotations

from pathlib import Path


def plot_losses(records: list[dict[str, float]], unigram_entropy: float, path: Path) -> None:
    """Draw training and held-out loss over steps, with the unigram entropy of the text, to a PNG.

    Args:
        records: of a run's log.
        unigram_entropy: nats per token.
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
    axes.axhline(unigram_entropy, color="gray", linestyle="--", label="unigram entropy of the text")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="fastattn: training on text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
