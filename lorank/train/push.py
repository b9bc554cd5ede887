"""A saved model pushed to the Hugging Face hub, by huggingface_hub."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lorank.train.card import NAME, is_ours
from lorank.train.data.sources import first_line
from lorank.train.hub import asked_if_reachable


def check_push(name: str) -> str:
    """A name on the hub with its owner, me/my-model, to which whoever is logged in may push.

    Raises:
        ValueError: it is no name, nobody is logged in, or the hub does not answer.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"push_to_hub must be a name on the hub such as me/my-model, got {name!r}") from None
    try:
        with asked_if_reachable():
            user = HfApi().whoami()["name"]
    except LocalTokenNotFoundError:
        raise ValueError(f"push_to_hub={name} needs a login to the hub: run hf auth login, or set HF_TOKEN") from None
    except Exception as error:  # of the network, and of the hub
        raise ValueError(f"push_to_hub={name} is not possible now: {first_line(error)}") from error
    return name if "/" in name else f"{user}/{name}"


def push(folder: Path, names: Sequence[str], place: str, *, again: str) -> str:
    """Push files of a folder to the hub in one commit, to a new private repository if that name is free.

    Args:
        names: the files. A model card that somebody changed on the hub stays as it is there.
        again: the command that repeats this.

    Returns:
        The address.

    Raises:
        OSError: it failed; what is in the folder is complete.
    """
    api = HfApi()
    try:
        address = api.create_repo(place, private=True, exist_ok=True)
        sent = [name for name in names if name != NAME or not _changed_there(api, place)]
        additions = [CommitOperationAdd(name, folder / name) for name in sent]
        api.create_commit(place, additions, commit_message="Model trained with lorank")
    except Exception as error:  # of the network, and of the hub
        raise OSError(
            f"{folder} has the whole model, but it could not be pushed to {place}: {first_line(error)}; repeat it with: {again}"
        ) from error
    return str(address)


def _changed_there(api: HfApi, place: str) -> bool:
    """Whether the hub has a model card that is not as lorank wrote it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = Path(api.hf_hub_download(place, NAME, local_dir=folder))
        except RemoteEntryNotFoundError:
            return False
        return not is_ours(card.read_text(encoding="utf-8", errors="replace"))
