"""Bulk sampling: fixed chunks over a pool of Ray actors, each committed by itself.

Image i of a job is a function of (weights, sampler settings, seed, i). A chunk is always computed whole and then cut,
so that its bytes do not depend on how many images were asked for, on the pool, or on which actor made it. A rerun makes
the missing chunks only; a larger n extends; a job of another identity in the same place is refused.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.cluster import Cluster
from pipelines.drawing import Settings
from pipelines.errors import Failed, UserError
from pipelines.models import Model
from pipelines.pool import Crew, Pool
from pipelines.progress import Progress, counted
from pipelines.sample.artist import Artist
from pipelines.sample.finish import Samples, finish
from pipelines.sample.job import Job, Part
from pipelines.sample.pace import Made
from pipelines.sections import Sample
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place, identity

_SEEN_SECONDS = 15.0
"""In which what an actor has written has to be seen here; what is shared by hosts may take a moment."""
_SEEN_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Studio:
    """Where images are drawn: it decides how soon they are there, and nothing of them."""

    cluster: Cluster
    workers: int
    resources: Mapping[str, float]
    """Of each worker, beside its CPUs."""
    progress: Progress

    @staticmethod
    def of(fields: Sample, session: Session) -> "Studio":
        return Studio(session.cluster, fields.workers, fields.resources, session.progress)

    def check(self, settings: Settings) -> None:
        """UserError where no process that draws so can ever be started."""
        self.cluster.check_cpus("sample.threads", settings.threads)
        for name, need in self.resources.items():
            if self.cluster.is_own and (have := self.cluster.resource(name)) < need:
                raise UserError(f"sample.resources: {need:g} {name} for each process, this host has {have:g}")

    def pool(self, job: Job, model: Model, kind: type, chunks: Sequence[Any], *arguments: Any) -> Pool:
        """Actors of a kind, an `Artist` say, that draw for a job; `arguments` are their kind's own."""
        self.check(job.settings)
        crew = Crew(
            kind=kind,
            arguments=(job, *arguments),
            shared=(model,),
            most=self.workers,
            resources={"CPU": job.settings.threads, **self.resources},
            blame="sample.workers",
            advice="if memory ran out, lower it or sample.chunk",
        )
        return Pool(self.cluster, crew, chunks, self.progress)


def sample_job(model: Model, settings: Settings, n: int, out: Place, studio: Studio) -> Samples:
    """Make images 0..n-1 of a job in `out`; those that are there already are kept.

    UserError where the place holds something else, or another process is at it.
    """
    job = Job(out, settings, model.identity, model.digest, model.spec.model.classes)
    with claimed(job, model, studio) as check_held:
        missing = _missing(job, n, studio.progress, check_held)
        made = _make(job, model, missing, n, studio, check_held)
        return finish(job, n, model, made, check_held, studio.progress)


def sample_spec(model: Model, spec: Spec, n: int, session: Session, class_counts: tuple[int, ...] = ()) -> Samples:
    """The first n images of the job that a spec describes, in the store's place for it."""
    settings = Settings.of(spec.sample, class_counts=class_counts)
    name = f"{spec.name}-{identity([model.identity, asdict(settings)])[:12]}"
    return sample_job(model, settings, n, session.store / "samples" / name, Studio.of(spec.sample, session))


@contextmanager
def claimed(job: Job, model: Model, studio: Studio) -> Iterator[Callable[[], None]]:
    """Hold the place of a job while the block runs, which is given what checks that it still is held.

    UserError where the place holds something else, another process is at it, or it is not begun and cannot be drawn.
    """
    job.check_place()
    if not job.is_claimed():
        studio.check(job.settings)  # before anything is left there
    with job.held() as check_held:
        job.check_place()  # it may have come to something since
        job.claim(model.origin, model.average)
        yield check_held


def _missing(job: Job, n: int, progress: Progress, check_held: Callable[[], None]) -> list[Part]:
    """The parts that have to be made; what is left of those that are damaged is deleted.

    Of a larger job that is there, a damaged part is made as large as it was.
    """
    there, missing, damaged = job.parts(), [], 0
    # Of a job that is done, its own parts: what a killed attempt has deleted of them is no longer there to tell.
    for wanted in job.wanted(max(n, job.finished()))[: job.chunks_of(n)]:
        if there:
            progress.advance(min(n, wanted.first + wanted.count), n, "images looked for")
        serving = [part for part in there.get(wanted.chunk, ()) if part.serves(wanted)]
        if any(whole := [job.is_whole(part) for part in serving]):
            keep = serving[whole.index(True)]
        else:
            keep = max([wanted, *serving], key=lambda part: part.count)
            missing.append(keep)
            damaged += bool(serving)
        for part, is_whole in zip(serving, whole, strict=True):
            if not is_whole:
                check_held()
                job.forget(part)
    if damaged:
        progress.say(f"{job.place}: {counted(damaged, 'damaged chunk')} made again")
    return missing


def _make(
    job: Job, model: Model, missing: list[Part], n: int, studio: Studio, check_held: Callable[[], None]
) -> list[Made]:
    """Make parts on a pool of actors, as each is committed told to who watches."""
    made: list[Made] = []
    done = n - sum(min(n, part.first + part.count) - part.first for part in missing)
    if done:
        studio.progress.advance(done, n, "images")
    if not missing:
        return made
    pool, hosts = studio.pool(job, model, Artist, missing), set[str]()
    for place, part in pool.results():
        check_held()
        wanted = missing[place]
        _check_seen(job, wanted, part)
        host, _ = part.process
        if part.changed and host not in hosts:
            told = f"the bits of {host} may differ from those of the first images"
            studio.progress.say(f"warning: {told}: {', '.join(part.changed)}")
        hosts.add(host)
        made.append(part)
        done += min(n, wanted.first + wanted.count) - wanted.first
        studio.progress.advance(done, n, "images", **({"failures": pool.deaths} if pool.deaths else {}))
    if pool.deaths:
        told = "a process" if pool.deaths == 1 else f"{pool.deaths} processes"
        studio.progress.say(f"{told} died on the way; what they were at was made again")
    return made


def _check_seen(job: Job, part: Part, made: Made) -> None:
    """Failed where what an actor has committed is not seen here: the hosts have each a folder of this name."""
    end = time.monotonic() + _SEEN_SECONDS
    while not job.is_served(part):
        if time.monotonic() > end:
            raise Failed(
                f"--out {job.place}: what a process on {made.process[0]} has written is not seen here; name a folder "
                "that all hosts of the cluster share, or s3://bucket/prefix"
            )
        time.sleep(_SEEN_LOOK_SECONDS)
