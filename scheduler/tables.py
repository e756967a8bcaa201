"""Tables of the command line: JSON items of the gateway or the ledger -> rich tables; "-" = no value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

Item = Mapping[str, Any]


class Column(NamedTuple):
    title: str
    key: str
    show: Callable[[Any], str] = str
    right: bool = False


def seconds(value: Any) -> str:
    """Milliseconds below one second, else seconds."""
    number = float(value)
    return f"{number * 1000:.0f} ms" if number < 1 else f"{number:.2f} s"


def count(value: Any) -> str:
    return f"{int(value):,}"


def mebibytes(value: Any) -> str:
    return f"{int(value) / 2**20:.1f}" if value else "0"


def yes_no(value: Any) -> str:
    return "yes" if value else "no"


def words(value: Any) -> str:
    return ", ".join(value)


def recorded(value: Any) -> str:
    """Of a receipt: whether the ledger has it."""
    return str(value).replace("_", " ")


def destination(value: Any) -> str:
    """Of an engine that changes pool."""
    return str(value["to"]) if value else ""


ENGINE_COLUMNS = (
    Column("engine", "engine_id"),
    Column("pool", "pool"),
    Column("on its way to", "flip", destination),
    Column("standing", "standing", words),
    Column("linker", "can_transfer", yes_no),
    Column("batch", "batch", count, right=True),
    Column("queued", "queued_rounds", count, right=True),
    Column("queue", "queue_s", seconds, right=True),
    Column("used tokens", "used_tokens", count, right=True),
    Column("pool tokens", "pool_tokens", count, right=True),
    Column("sessions", "sessions", count, right=True),
    Column("model", "model_id"),
    Column("url", "url"),
)

SESSION_COLUMNS = (
    Column("session", "session_id"),
    Column("parent", "parent_id"),
    Column("home", "home"),
    Column("rounds", "rounds", count, right=True),
    Column("in flight", "in_flight"),
    Column("context", "context_tokens", count, right=True),
    Column("prompt", "prompt_tokens", count, right=True),
    Column("cached", "cached_tokens", count, right=True),
    Column("output", "completion_tokens", count, right=True),
)

RECEIPT_COLUMNS = (
    Column("session", "session_id"),
    Column("round", "round_number", count, right=True),
    Column("arm", "arm"),
    Column("outcome", "outcome"),
    Column("recorded", "recorded", recorded),
    Column("home", "home"),
    Column("prefill at", "prefill_engine"),
    Column("prompt", "prompt_tokens", count, right=True),
    Column("cached", "cached_tokens", count, right=True),
    Column("d->p MiB", "bytes_decode_to_prefill", mebibytes, right=True),
    Column("p->d MiB", "bytes_prefill_to_decode", mebibytes, right=True),
    Column("d->d MiB", "bytes_home_to_home", mebibytes, right=True),
    Column("predicted", "predicted_ttft_s", seconds, right=True),
    Column("TTFT", "ttft_s", seconds, right=True),
    Column("ITL", "itl_s", seconds, right=True),
    Column("why", "reason"),
)


def list_table(items: Sequence[Item], columns: Sequence[Column]) -> Table:
    """One row per item; columns that no item has are left out."""
    shown = [column for column in columns if any(item.get(column.key) is not None for item in items)]
    table = Table(header_style="bold")
    for column in shown:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for item in items:
        table.add_row(*(_cell(item, column) for column in shown))
    return table


def status_table(ready: Item, engines: Sequence[Item], receipts: Sequence[Item]) -> Table:
    """What `antiphon status` shows."""
    table = Table(show_header=False, box=None)
    pools = Counter(str(engine.get("pool", "?")) for engine in engines)
    arms = Counter(str(receipt.get("arm") or receipt.get("outcome")) for receipt in receipts)
    table.add_row("ready", yes_no(ready.get("ready")))
    table.add_row("policy", str(ready.get("policy", "-")))
    table.add_row("ledger", str(ready.get("ledger", "-")))
    table.add_row("engines", f"{ready.get('engines_alive', 0)} alive{_counts(pools)}")
    for engine in engines:
        if flip := engine.get("flip"):
            table.add_row("changes pool", f"{engine.get('engine_id')} to {flip['to']}: {flip['reason']}")
    table.add_row("recent rounds", f"{len(receipts)}{_counts(arms)}")
    if ready.get("detail"):
        table.add_row("detail", str(ready["detail"]))
    return table


def _counts(counter: Counter[str]) -> str:
    return (
        f" ({', '.join(f'{name} {number}' for name, number in sorted(counter.items()))})" if counter else ""
    )


def _cell(item: Item, column: Column) -> str:
    value = item.get(column.key)
    return "-" if value is None or value == "" else column.show(value)
