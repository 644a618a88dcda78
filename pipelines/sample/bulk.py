"""Bulk sampling: fixed chunks over a pool of Ray actors, each committed by itself.

Image i of a job is a function of (weights, sampler settings, seed, i). A chunk is always computed whole and then cut,
so that its bytes do not depend on how many images were asked for, on the pool, or on which actor made it. A rerun makes
the missing chunks only; a larger n extends; a job of another identity in the same place is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.cluster import Cluster
from pipelines.drawing import Settings
from pipelines.errors import UserError
from pipelines.models import Model
from pipelines.pool import Crew, Pool
from pipelines.progress import Progress
from pipelines.sample.artist import Artist
from pipelines.sample.finish import Samples, finish
from pipelines.sample.job import JOB, LOCK, Job, Part
from pipelines.sample.pace import Made
from pipelines.sections import Sample
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place, identity
from pipelines.train.run import changes, environment


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

    def pool(self, job: Job, model: Model, kind: type, chunks: Sequence[Any], *arguments: Any) -> Pool:
        """Actors of a kind, an `Artist` say, that draw for a job; `arguments` are their kind's own."""
        self.cluster.check_cpus("sample.threads", job.settings.threads)
        for name, need in self.resources.items():
            if self.cluster.is_own and (have := self.cluster.resource(name)) < need:
                raise UserError(f"sample.resources: {need:g} {name} for each process, this host has {have:g}")
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
    job.check_place()
    with (out / LOCK).lock(f"sampling into {out}") as check_held:
        job.claim(model.origin)
        if (missing := _missing(job, n)) and job.parts():
            _say_what_changed(job, studio.progress)
        made = _make(job, model, missing, n, studio, check_held)
        return finish(job, n, model, made, check_held, studio.progress)


def sample_spec(model: Model, spec: Spec, n: int, session: Session, class_counts: tuple[int, ...] = ()) -> Samples:
    """The first n images of the job that a spec describes, in the store's place for it."""
    settings = Settings.of(spec.sample, class_counts=class_counts)
    name = f"{spec.name}-{identity([model.identity, asdict(settings)])[:12]}"
    return sample_job(model, settings, n, session.store / "samples" / name, Studio.of(spec.sample, session))


def _missing(job: Job, n: int) -> list[Part]:
    """The parts that have to be made; what is left of those that are damaged is deleted."""
    there, missing = job.parts(), []
    for wanted in job.wanted(n):
        serving = [part for part in there.get(wanted.chunk, ()) if part.serves(wanted)]
        whole = [part for part in serving if job.is_whole(part)]
        for damaged in set(serving) - set(whole):
            job.forget(damaged)
        if not whole:
            missing.append(wanted)
    return missing


def _make(
    job: Job, model: Model, missing: list[Part], n: int, studio: Studio, check_held: Callable[[], None]
) -> list[Made]:
    """Make parts on a pool of actors, as each is committed told to who watches."""
    made: list[Made] = []
    done = n - sum(part.count for part in missing)
    if done:
        studio.progress.advance(done, n, "images")
    if not missing:
        return made
    pool = studio.pool(job, model, Artist, missing)
    for _, part in pool.results():
        check_held()
        made.append(part)
        done += part.count
        studio.progress.advance(done, n, "images", **({"failures": pool.deaths} if pool.deaths else {}))
    if pool.deaths:
        told = "a process" if pool.deaths == 1 else f"{pool.deaths} processes"
        studio.progress.say(f"{told} died on the way; what they were at was made again")
    return made


def _say_what_changed(job: Job, progress: Progress) -> None:
    """A line where what is drawn now may have other bits than what is there."""
    then, now = (job.place / JOB).read_json().get("environment", {}), environment()
    if changed := changes(then, now):
        progress.say(f"warning: the bits may differ from those of the images that are there: {', '.join(changed)}")
