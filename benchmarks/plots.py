"""PNG plots of an ops record: speed by length, memory by length, and the ratio to the best peer. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import OURS, Record, best_rival, passes_of
from fastattn.files import replaced_file

COLUMNS = 4  # of panels
MOST_PANELS = 16
Family = tuple[str, str]  # the cases of a panel, and the pass
Sizes = tuple[str, ...]


def draw(record: Record, folder: Path, stem: str) -> list[Path]:
    """Write the plots that the record has data for.

    Returns:
        their paths: ``<stem>-speed.png``, ``<stem>-memory.png``, ``<stem>-ratio.png``.
    """
    title = f"{record['environment']['device']}, {record['started'][:10]}"
    figures = {
        "speed": _by_length(record, "tflops", "TFLOP/s", title),
        "memory": _by_length(record, "peak_bytes", "peak memory above the operands, MB", title, factor=1e-6),
        "ratio": _ratios(record, title),
    }
    return [_save(figure, folder / f"{stem}-{name}.png") for name, figure in figures.items() if figure is not None]


def _by_length(record: Record, field: str, label: str, title: str, factor: float = 1.0) -> Any:
    """A figure with a panel for each family of cases that differ in batch, length and heads; None if there is none.

    Lines join cases that differ in length alone; a case without such another is a point.
    """
    families: dict[Family, dict[str, dict[Sizes, dict[int, float]]]] = {}
    for result in record["results"]:
        for pass_name in passes_of(result):
            lines = families.setdefault((_family(result), pass_name), {})
            for peer, found in result["peers"].items():
                value = found["passes"].get(pass_name, {}).get(field)
                if value is not None:
                    points = lines.setdefault(peer, {}).setdefault(_sizes(result), {})
                    points[result["workload"]["s_q"]] = value * factor
    worth = {family: lines for family, lines in families.items() if len(_lengths(lines)) > 1}
    if not worth:
        return None
    shown = list(worth.items())[:MOST_PANELS]
    figure, panels = _panels(len(shown))
    figure.suptitle(title)
    colours = _colours(record)
    for panel, ((family, pass_name), lines) in zip(panels, shown, strict=False):
        for peer, of_sizes in lines.items():
            style = {"linewidth": 2.5, "zorder": 3} if peer == OURS else {"linewidth": 1.2}
            for points in of_sizes.values():
                xs = sorted(points)
                panel.plot(xs, [points[x] for x in xs], "o-", markersize=3, color=colours[peer], label=peer, **style)
        lengths = _lengths(lines)
        panel.set(xscale="log", yscale="log" if field == "peak_bytes" else "linear")
        panel.set_xticks(lengths, [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths])
        panel.minorticks_off()
        panel.set_title(f"{family}, {pass_name}", fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _lengths(lines: dict[str, dict[Sizes, dict[int, float]]]) -> list[int]:
    return sorted({length for of_sizes in lines.values() for points in of_sizes.values() for length in points})


def _family(result: Record) -> str:
    """The case without batch, lengths and heads."""
    return " ".join(word for word in result["id"].split() if not re.fullmatch(r"[bsh]\d+(/\d+)?", word))


def _sizes(result: Record) -> Sizes:
    """Batch and heads of a case, in which the points of a line agree."""
    return tuple(word for word in result["id"].split() if re.fullmatch(r"[bh]\d+(/\d+)?", word))


def _ratios(record: Record, title: str) -> Any:
    """A figure with a bar for each pass of each case: how many times faster fastattn is than the best peer; or None."""
    bars = list(_bars(record))
    if not bars:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.19 * len(bars)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    labels, ratios, rivals = zip(*bars[::-1], strict=True)
    panel.barh(
        range(len(bars)),
        [ratio - 1 for ratio in ratios],
        left=1,
        color=["#2ca02c" if ratio >= 1 else "#d62728" for ratio in ratios],
    )
    panel.set_yticks(range(len(bars)), labels, fontsize=6)
    for y, (ratio, rival) in enumerate(zip(ratios, rivals, strict=True)):
        panel.text(ratio, y, f" {ratio:.2f}× {rival}", va="center", fontsize=6)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(xscale="log", title=f"{title}: how many times faster than the best peer")
    panel.margins(x=0.15, y=0.01)
    return figure


def _bars(record: Record) -> Iterator[tuple[str, float, str]]:
    for result in record["results"]:
        for pass_name in passes_of(result):
            best = best_rival(result, pass_name)
            if best is not None:
                yield f"{result['id']}, {pass_name}", best[1], best[0]


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 1), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels


def _colours(record: Record) -> dict[str, Any]:
    from matplotlib import colormaps

    others = [peer for peer in record.get("peers", []) if peer != OURS]
    palette = [colormaps["tab20"](n) for n in range(20) if n not in (6, 7)]  # red is ours
    return {OURS: "#d62728"} | {peer: palette[n % len(palette)] for n, peer in enumerate(others)}


def _save(figure: Any, path: Path) -> Path:
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
