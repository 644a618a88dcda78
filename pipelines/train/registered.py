"""First weights that a registry has: kept in the store, so that a run's workers and its record name a folder."""

from pipelines.errors import UserError, one_line
from pipelines.fields import is_registered
from pipelines.models import CONFIG, dump_config
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.checkpoint import EMA


def with_first_weights(spec: Spec, session: Session) -> Spec:
    """The spec with a folder in place of a registered model's name: a run is named by weights; an alias may move on.

    A version is fetched once; an alias is looked up anew each time, and where MLflow does not answer it is what it was
    the last time. UserError where there is no such model.
    """
    named = spec.train.init_from
    if named is None or not is_registered(named):
        return spec
    note = session.store / "first-weights" / f"{named}.json"
    known: str | None = note.read_json()["folder"] if note.exists() else None
    version = named.partition("@")[2]
    if known is None or not version.isdigit() or not (Place.of(known) / EMA).exists():
        folder = str(_fetched(named, session, known))
        if known is not None and folder != known:
            session.progress.say(f"warning: train.init_from: {named} is another model now, and this another run")
        note.write_json({"folder": folder})
        known = folder
    return spec.model_copy(update={"train": spec.train.model_copy(update={"init_from": known})})


def _fetched(named: str, session: Session, known: str | None) -> Place:
    """The folder of the model's weights, from the registry; that of the last time where MLflow does not answer."""
    from pipelines.registry.register import download  # loads MLflow

    name, _, version = named.partition("@")
    try:
        model = download(name, version, session.tracker.existing())
    except UserError as error:
        raise UserError(f"train.init_from: {str(error).removeprefix('MODEL ')}") from None
    except Exception as error:
        if known is None:
            raise
        session.progress.say(f"warning: train.init_from: {named} is what it was last time ({one_line(error)})")
        return Place.of(known)
    folder: Place = session.store / "first-weights" / model.digest[:16]
    folder.commit_folder({EMA: model.weights, CONFIG: dump_config(model)})
    session.progress.say(f"train.init_from: {named} is {model.origin}, kept in {folder}")
    return folder
