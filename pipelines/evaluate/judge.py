"""Images that are drawn and looked at by one process, and never kept: only what was seen of them is."""

from typing import Any

import numpy as np

from pipelines.evaluate.kept import Telling, repeat
from pipelines.evaluate.look import Look, Looker
from pipelines.models import Model
from pipelines.sample.artist import Drawer
from pipelines.sample.bulk import Studio
from pipelines.sample.job import Job, Part


class _Judge(Drawer):
    def __init__(self, job: Job, looker: Looker) -> None:
        super().__init__(job)
        self._looker = looker

    def do(self, shared: tuple[Any], part: Part) -> tuple[Look, list[str]]:
        """Draw a part and look at it, unless that was done before; with what there is to warn of."""

        def draw() -> tuple[Any, Any]:
            labels = self._job.labels(range(part.first, part.first + part.count))
            return self.drawn(shared, part.chunk)[: part.count], np.asarray(labels, dtype=np.int64)

        def look(key: str) -> Look:
            return self._looker.kept(key, draw)

        return Telling(look)(f"{self._job.identity[:32]}-{part.stem}")


def draw_and_look(job: Job, model: Model, n: int, looker: Looker, studio: Studio) -> Look:
    """What there is to see of the first n images of a job, of which none is written anywhere."""
    parts, found = job.wanted(n), {}
    for place, (look, lines) in studio.pool(job, model, _Judge, parts, looker).results():
        repeat(lines)
        found[place] = look
        studio.progress.advance(sum(parts[done].count for done in found), n, "images")
    return Look.joined([found[place] for place in range(len(parts))])
