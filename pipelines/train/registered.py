"""First weights that a registry has: kept in the store, so that a run's workers and its record name a folder."""

from pipelines.errors import UserError
from pipelines.fields import is_registered
from pipelines.models import CONFIG, dump_config
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.checkpoint import EMA


def with_first_weights(spec: Spec, session: Session) -> Spec:
    """The spec with a folder in place of a registered model's name: an alias may move on, the run stays what it is.

    UserError where there is no such model.
    """
    named = spec.train.init_from
    if named is None or not is_registered(named):
        return spec
    from pipelines.registry.register import download  # loads MLflow

    name, _, version = named.partition("@")
    try:
        model = download(name, version, session.tracker.existing())
    except UserError as error:
        raise UserError(f"train.init_from: {str(error).removeprefix('MODEL ')}") from None
    folder: Place = session.store / "first-weights" / model.digest[:16]
    folder.commit_folder({EMA: model.weights, CONFIG: dump_config(model)})
    session.progress.say(f"train.init_from: {named} is {model.origin}, kept in {folder}")
    return spec.model_copy(update={"train": spec.train.model_copy(update={"init_from": str(folder)})})
