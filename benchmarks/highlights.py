"""Tables made of several records: the six rows of the README, and the shipped examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import tables
from benchmarks.tables import Record

HEADER = ("on a CPU", "fastattn", "vs eager", "vs SDPA")
RECORDS = ("cpu", "model", "decode", "overhead")

# (what the README calls it, the case's id in cpu.json); forward and backward together
CASES = (
    ("4096 tokens, fp32, forward + backward", "fp32 b1 s4096 h2 d64 full"),
    ("4096 tokens, causal, bf16, forward + backward", "bf16 b1 s4096 h2 d64 causal"),
    ("the same, fp32, window of 256 tokens", "fp32 b1 s4096 h2 d64 causal window 255"),
)


def table(records: Mapping[str, Record]) -> str:
    """Six rows: three cases of attention, a training step, a decoding step, and the host time of one call."""
    rows = [_case(records["cpu"], *case) for case in CASES]
    step = _row(records["model"], variant="fastattn", what="training step")
    rows.append(["training step of a decoder, 2048 tokens, fp32", _time(step["step"]), step["vs eager"], "–"])
    read = _row(
        records["decode"], what="batch 4, 8192 keys, heads 8/2, D 128, equal", cache="pages of 16", dtype="bf16"
    )
    what = "one new token, 8192 keys in pages of 16, bf16, batch 4"
    rows.append([what, _time(read["fastattn"]), "–", read["vs sdpa, gathered before"]])
    call = _row(records["overhead"], what="one call, forward, fastattn")
    slower = float(call["beside"].split("×")[0])
    rows.append(["one call of 16 tokens, almost all of it host time", _time(call["value"]), "–", f"{1 / slower:.2f}×"])
    return tables.markdown(HEADER, rows)


def conditions(records: Mapping[str, Record]) -> str:
    """One line: where the rows were measured, and when."""
    environments = [record["environment"] for record in records.values()]
    devices = dict.fromkeys(e["device"] for e in environments)
    versions = dict.fromkeys(f"torch {e['versions']['torch']}" for e in environments)
    days = sorted({record["started"][:10] for record in records.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(devices)}; {', '.join(versions)}; {when}. ×: how many times faster fastattn is."


def examples(records: Sequence[Record]) -> str:
    """A row for each shipped example and score that counts: the baselines and the model on held-out data."""
    rows = []
    for record in records:
        for metric in record["metrics"]:
            baselines = record["baselines"]
            about = [f"`{record['name']}`", record["question"], "; ".join(x["what"] for x in baselines)]
            time = f"{record['seconds']:.0f} s"
            if metric != record["metrics"][0]:
                about, time = [""] * 3, ""
            reached = "; ".join(f"{x['scores'][metric]:.3g}" for x in baselines)
            rows.append([*about, metric, reached, f"**{record['model'][metric]:.3g}**", time])
    return tables.markdown(
        ("fastattn example", "task", "baseline", "score", "of the baseline", "of the model", "time"), rows
    )


def _case(record: Record, what: str, case: str) -> list[str]:
    (result,) = (result for result in record["results"] if result["id"] == case)
    ours = tables.timing(result, tables.OURS, "both")
    assert ours is not None, f"{case}: the record has no time of fastattn"
    return [what, tables.seconds(ours.median), *(tables.times(result, peer, "both") for peer in ("eager", "sdpa"))]


def _row(record: Record, **cells: str) -> Mapping[str, str]:
    (row,) = (row for row in record["results"] if all(row.get(name) == cell for name, cell in cells.items()))
    return row


def _time(cell: str) -> str:
    """A time without its spread."""
    return cell.split(" ±")[0]
