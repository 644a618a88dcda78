"""What happened at each step: immutable segments of JSON lines, one per (attempt, checkpoint interval).

A segment is committed just before the checkpoint it leads up to, so a reader that stops at the last committed
checkpoint sees every step once. Where a killed attempt's steps were made again, the later attempt's row counts; the
`exact` fields are the same bits in both, the `wall` ones are not.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from pipelines.store import Place

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer step."""

    step: int
    """Steps taken, this one included."""
    images: int
    """Images seen, this step's included."""
    time_ms: int
    """When, in milliseconds since the epoch: the timestamp of its metrics."""
    exact: dict[str, float]
    wall: dict[str, float]


class Journal:
    """The journal of a run, in a folder of its own."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def commit(self, attempt: int, rows: Iterable[Row]) -> None:
        """Write one segment; nothing where there are no rows."""
        rows = list(rows)
        if not rows:
            return
        head = {"format": FORMAT, "attempt": attempt}
        lines = [json.dumps(head), *(json.dumps(asdict(row), sort_keys=True) for row in rows)]
        name = f"{rows[-1].step:09d}-{attempt:04d}.jsonl"
        (self._place / name).write(("\n".join(lines) + "\n").encode())

    def read(self, last_step: int, after: int = 0) -> Iterator[Row]:
        """Rows of steps after+1..last_step, in order, each once."""
        rows: dict[int, tuple[int, Row]] = {}
        for name in self._place.list():
            end, attempt = (int(part) for part in name.removesuffix(".jsonl").split("-"))
            if end <= after:
                continue
            lines = (self._place / name).read().decode().splitlines()
            head = json.loads(lines[0])
            if head["format"] != FORMAT:
                raise ValueError(f"{self._place / name} has format {head['format']}, not {FORMAT}")
            for line in lines[1:]:
                row = Row(**json.loads(line))
                if after < row.step <= last_step and rows.get(row.step, (0, row))[0] <= attempt:
                    rows[row.step] = (attempt, row)
        for step in sorted(rows):
            yield rows[step][1]
