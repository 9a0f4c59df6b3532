"""Markdown from records: pure functions of their JSON, so that tests can compare pages with records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastattn.measure.timing import Timing
from fastattn.measure.workload import Workload

Record = dict[str, Any]
OURS = "fastattn"  # the backend that is selected automatically


def table(record: Record) -> str:
    """The whole record as a table: a line for each pass of each case, or each row of another command."""
    return _ops_table(record) if record["kind"] == "ops" else _rows_table(record)


def summary(record: Record) -> str:
    """A shorter table for a page of docs/: a line for each case with fastattn's time and the ratios to peers."""
    return _ops_summary(record) if record["kind"] == "ops" else _rows_table(record)


def conditions(record: Record) -> str:
    """The device, versions, code and date of a record, in a paragraph."""
    e = record["environment"]
    versions = ", ".join(
        f"{name} {version}" for name, version in e["versions"].items() if version and name != "fastattn"
    )
    lines = [f"{e['device']}; {versions}; {code(record)}; {record['started'][:10]}."]
    if record.get("ceilings"):
        lines.append(
            "Ceilings of the same run: " + ", ".join(_ceiling(*item) for item in record["ceilings"].items()) + "."
        )
    if record["kind"] == "fuzz" and record["finished"]:
        lines.append(_problems(record))
    if record["finished"] is None:
        lines.append("**The run did not finish**; what it had measured is here.")
    if record.get("stopped"):
        lines.append(f"**Stopped**: {record['stopped']}.")
    lines.append(f"Command: `{record['command']}`.")
    return " ".join(lines)


def _problems(record: Record) -> str:
    failed, sources, problems = len(record["failures"]), record["sources"], record["problems"]
    judged = f"{problems:,} problems of seed {record['seed']}, {failed} failures"
    by_this, earlier = sources.get(record["environment"]["source"], 0), len(sources) - 1
    by = f"; {by_this:,} of the problems judged by this code, the others by {earlier} earlier versions of it"
    return f"{judged}{by if earlier else ''}; {record['cpu_ms_per_problem']} ms of CPU time for a problem."


def code(record: Record) -> str:
    """The commit or source hash of the measured code."""
    e = record["environment"]
    if e["commit"] is None:
        return f"source {e['source']}, no git"
    return f"commit {e['commit'][:10]}" + (f" with uncommitted changes (source {e['source']})" if e["dirty"] else "")


def _ceiling(name: str, value: float) -> str:
    if name == "copy_gbps":
        return f"copy {value:.0f} GB/s"
    return f"{name.split('_')[1]} matmul {value:.3g} TFLOP/s"


# ops


def timing(result: Record, peer: str, pass_name: str) -> Timing | None:
    """The timing of a peer in a case, if it has one."""
    rounds = result["peers"].get(peer, {}).get("passes", {}).get(pass_name, {}).get("rounds_s")
    return Timing(tuple(rounds)) if rounds else None


def rivals(result: Record, pass_name: str) -> dict[str, Timing]:
    """The timings of everything that is not fastattn."""
    found = {peer: timing(result, peer, pass_name) for peer in result["peers"] if not peer.startswith(OURS)}
    return {peer: time for peer, time in found.items() if time is not None}


def best_rival(result: Record, pass_name: str) -> tuple[str, float] | None:
    """The fastest peer that passed its gate, and how many times faster fastattn is; None without either."""
    ours, others = timing(result, OURS, pass_name), rivals(result, pass_name)
    if ours is None or not others:
        return None
    best = min(others, key=lambda peer: others[peer].median)
    return best, ours.times_faster_than(others[best])


def passes_of(result: Record) -> list[str]:
    """The passes that have results, in order."""
    seen = dict.fromkeys(result["workload"]["passes"])
    for peer in result["peers"].values():
        seen |= dict.fromkeys(peer["passes"])
    return list(seen)


def _ops_table(record: Record) -> str:
    peers = _shown_peers(record)
    header = ["case", "pass", *peers, "TFLOP/s", "of matmul", "of dense", "vs best peer"]
    rows = []
    for result in record["results"]:
        for pass_name in passes_of(result):
            cells = [_cell(result, peer, pass_name) for peer in peers]
            rows.append([result["id"], pass_name, *cells, *_rates(record, result, pass_name), _best(result, pass_name)])
    legend = (
        "Time of one call ±spread, peak memory above the operands. ×: how many times faster fastattn is. Of dense: "
        "speed per kept pair, as a share of the full case of the same shape."
    )
    return "\n".join([markdown(header, rows), "", legend, *_footnotes(record)])


def _shown_peers(record: Record) -> list[str]:
    """Peers that have at least one number, fastattn first."""
    with_numbers = {
        name
        for result in record["results"]
        for name, peer in result["peers"].items()
        if any("median_s" in found or "peak_bytes" in found for found in peer["passes"].values())
    }
    return [name for name in record.get("peers", []) if name in with_numbers]


def _cell(result: Record, peer: str, pass_name: str) -> str:
    found = result["peers"].get(peer, {}).get("passes", {}).get(pass_name, {})
    parts = []
    if "median_s" in found:
        parts.append(f"{seconds(found['median_s'])} ±{found['spread']:.0%}")
    if "peak_bytes" in found:
        parts.append(size(found["peak_bytes"]))
    if not parts and "error" in found:
        return "red" if found["error"].startswith("red") else "failed"
    return ", ".join(parts) or "–"


def _rates(record: Record, result: Record, pass_name: str) -> list[str]:
    """TFLOP/s, and what share they are of a matrix product, and of attention without features."""
    tflops = _tflops(result, pass_name)
    ceiling = record.get("ceilings", {}).get(f"matmul_{result['workload']['dtype']}_tflops")
    dense = next((x for x in record["results"] if _is_dense_of(x, result)), None)
    if tflops is None:
        return ["–", "–", "–"]
    of_dense = _tflops(dense, pass_name) if dense is not None and dense is not result else None
    return [f"{tflops:.3g}", *(f"{tflops / whole:.0%}" if whole else "–" for whole in (ceiling, of_dense))]


def _tflops(result: Record, pass_name: str) -> float | None:
    """Of kept pairs only."""
    found: float | None = result["peers"].get(OURS, {}).get("passes", {}).get(pass_name, {}).get("tflops")
    return found


def _is_dense_of(dense: Record, result: Record) -> bool:
    """Whether a case is another's shape without its features."""
    shape = ("dtype", "batch", "s_q", "s_kv", "heads_q", "heads_kv", "d_qk", "d_v")
    plain, other = Workload.from_dict(dense["workload"]), Workload.from_dict(result["workload"])
    return not plain.features and all(getattr(plain, name) == getattr(other, name) for name in shape)


def _best(result: Record, pass_name: str) -> str:
    best = best_rival(result, pass_name)
    return f"{best[1]:.2f}× {best[0]}" if best else "–"


def _ops_summary(record: Record) -> str:
    peers = [name for name in _shown_peers(record) if not name.startswith(OURS)]
    passes = list(dict.fromkeys(p for result in record["results"] for p in passes_of(result)))
    header = ["case"]
    for pass_name in passes:
        header += [pass_name, *(f"vs {peer}" for peer in peers), "of matmul", "of dense"]
    header.append("peak memory: " + " / ".join([OURS, *peers]))
    rows = []
    for result in record["results"]:
        row = [result["id"]]
        for pass_name in passes:
            ours = timing(result, OURS, pass_name)
            row.append(seconds(ours.median) if ours else "–")
            row += [times(result, peer, pass_name) for peer in peers]
            row += _rates(record, result, pass_name)[1:]
        rows.append([*row, _memory([OURS, *peers], result)])
    return "\n".join([markdown(header, rows), "", *_footnotes(record)]).rstrip()


def times(result: Record, peer: str, pass_name: str) -> str:
    """How many times faster fastattn is than a peer, as a cell."""
    ours, theirs = timing(result, OURS, pass_name), timing(result, peer, pass_name)
    return f"{ours.times_faster_than(theirs):.2f}×" if ours and theirs else "–"


def _memory(peers: Sequence[str], result: Record) -> str:
    peaks = [
        max(
            (found.get("peak_bytes", 0) for found in result["peers"].get(peer, {}).get("passes", {}).values()),
            default=0,
        )
        for peer in peers
    ]
    return " / ".join(size(peak) if peak else "–" for peak in peaks) if any(peaks) else ""


def _footnotes(record: Record) -> Iterator[str]:
    """The reasons for missing numbers, each once with the number of cases."""
    reasons: dict[str, int] = {}
    for result in record["results"]:
        if result.get("why"):
            reasons[f"not run: {result['why']}"] = reasons.get(f"not run: {result['why']}", 0) + 1
        for name, peer in result["peers"].items():
            errors = [found["error"] for found in peer["passes"].values() if found.get("error")]
            for why in dict.fromkeys([peer["why"], *errors]):
                if why:
                    reasons[f"{name}: {why}"] = reasons.get(f"{name}: {why}", 0) + 1
    if reasons:
        yield ""
        yield "No number:"
        yield ""
        for reason, count in sorted(reasons.items()):
            yield f"- {reason} ({count} case{'s' if count > 1 else ''})"


# other commands, whose records hold finished rows


def _rows_table(record: Record) -> str:
    columns = record["columns"]
    return markdown(columns, [[str(row.get(column, "")) for column in columns] for row in record["results"]])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in the source too."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with 3 digits in a fitting unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.2g} µs"


def size(value: float) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
