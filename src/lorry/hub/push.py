"""Upload a finished run to the Hugging Face hub: one commit with what a user of the hub needs, or nothing.

Try: ``push(Path("runs/people"), "me/people", private=True)``. Who it is comes from huggingface_hub alone (`hf auth login`, or
HF_TOKEN) and is never written anywhere; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from lorry.config import Run
from lorry.disk.documents import read_object
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, LorryError
from lorry.hub.files import adapter_folders, places, upload
from lorry.runs.layout import ADAPTER_CONFIG

SILENCE = 120.0  # seconds without a byte after which a request has failed
LOGIN = "run `hf auth login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"
ADVICE = {
    401: f"the hub does not know this token; {LOGIN}",
    403: f"this account or its token may not write to it; choose a repository of your own (hub_model_id=OWNER/NAME), or {LOGIN}",
    404: "there is no such account or organisation, or this token cannot see it; choose another with hub_model_id=OWNER/NAME",
    413: "a file is larger than the hub takes",
    429: "the hub asks for fewer requests; wait some minutes",
}
Tell = Callable[[str], None]


class HubError(LorryError, OSError):
    """The hub could not be reached or did not take the upload; nothing on this machine has changed."""


def _quiet(text: str) -> None:
    pass


def push(run_dir: Path, repo_id: str | None = None, *, private: bool = False, tell: Tell = _quiet) -> str:
    """Upload a finished run and return the repository's address. The run directory is only read.

    ``repo_id``: OWNER/NAME, or NAME under the account of the token; None is the directory's name. ``private`` makes a new
    repository private, and refuses one that exists and is public. ``tell`` hears what a person should know. Raises ConfigError
    (no login, a bad name, no permission, a secret in a file), HubError (no network, a hub that fails), and what `upload` raises.
    """
    token = _token()
    if repo_id is not None:
        check_name(repo_id)
    api = _api(token)
    with _blaming(run_dir, repo_id, api.endpoint), _bounded():
        name = repo_id or default_name(run_dir)
        owned = name if "/" in name else f"{api.whoami()['name']}/{name}"
        files = upload(run_dir, at=owned)
        for note in _notes(run_dir, places(files)):
            tell(f"note: {note}")
        api.create_repo(owned, private=private or None, exist_ok=True)
        if private and not api.repo_info(owned).private:
            raise ConfigError(f"{owned} exists and is public, but hub_private_repo is set: make it private, or use another name")
        operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
        api.create_commit(owned, operations, commit_message=f"Lorry run {run_dir.resolve().name}")
    return f"{api.endpoint}/{owned}"


def wanted(run: Run) -> tuple[bool, str | None]:
    """Whether a run is to be pushed, and to which repository: train.hub_model_id, else what train.push_to_hub names."""
    asked = run.train.push_to_hub
    return bool(asked), run.train.hub_model_id or (asked if isinstance(asked, str) else None)


def check_push(run: Run, tell: Tell = _quiet) -> None:
    """Before training: is there a login, does the hub know it, is the repository's name possible? A hub that cannot be reached
    now is only told, since training needs none. Raises ConfigError."""
    asked, repo_id = wanted(run)
    if not asked:
        return
    if repo_id is not None:
        check_name(repo_id)
    api = _api(_token())
    try:
        with _blaming(None, repo_id, api.endpoint), _bounded():
            account = api.whoami()
    except HubError as error:
        tell(f"note: train.push_to_hub: {error}; training goes on and the upload is tried at its end")
        return
    owners = [account["name"], *(str(org.get("name")) for org in account.get("orgs", []))]
    owner = repo_id.split("/")[0] if repo_id and "/" in repo_id else account["name"]
    if owner not in owners:
        tell(f"note: train.push_to_hub: {owner} is none of this account's names ({', '.join(owners)}); the upload may be refused")


def push_after(run: Run, path: Path, tell: Tell) -> None:
    """After training, where the run asks for it: upload, and tell the address. What goes wrong is told, with the command that
    tries again, and is no error: the run is finished."""
    asked, repo_id = wanted(run)
    if not asked:
        return
    try:
        tell(f"hub     {push(path, repo_id, private=run.train.hub_private_repo, tell=tell)}")
    except LorryError as error:
        private = " hub_private_repo=true" if run.train.hub_private_repo else ""
        again = f"lorry push {path}{f' hub_model_id={repo_id}' if repo_id else ''}{private}"
        tell(f"warning: the run is finished but not on the hub: {error}\n         try again: {again}")


# --- names and logins


def check_name(repo_id: str) -> None:
    """Raise ConfigError where the hub could have no repository of this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"hub_model_id={repo_id!r} is no name of a repository, such as OWNER/NAME: {reason}") from None


def default_name(run_dir: Path) -> str:
    """A legal repository name from the run directory's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.resolve().name)
    name = re.sub(r"([.-])[.-]+", r"\1", name)[:90].strip(".-_").removesuffix(".git")
    return name or "lorry-run"


def _token() -> str:
    token = get_token()
    if not token:
        raise ConfigError(f"not logged in to the Hugging Face hub: {LOGIN}")
    return token


def _api(token: str) -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="lorry")


def _notes(run_dir: Path, naming: list[str]) -> list[str]:
    """What a person may not expect of what is uploaded."""
    notes = []
    for folder in [run_dir, *adapter_folders(run_dir)]:
        config = folder / ADAPTER_CONFIG
        base = read_object(config).get("base_model_name_or_path") if config.is_file() else None
        if isinstance(base, str) and Path(base).is_absolute():
            notes.append(
                f"adapter_config.json names the base by its directory here, {base}: elsewhere PEFT must be given the base"
            )
            break
    if naming:
        notes.append(f"{', '.join(naming)} name directories of this machine and go to the hub as they are")
    return notes


# --- errors and time


@contextmanager
def _bounded() -> Iterator[None]:
    """huggingface_hub waits for ever by default; here a silent server is a failure."""
    session = get_session()
    before = session.timeout
    session.timeout = SILENCE
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _blaming(run_dir: Path | None, repo_id: str | None, endpoint: str) -> Iterator[None]:
    """What huggingface_hub raises, as an error that says what to do. HTTPError: of the client, every kind that is a failed
    connection; RuntimeError: of an upload, from what failed; ValueError: an answer that is none of the hub's."""
    where = f"{endpoint}/{repo_id}" if repo_id else endpoint
    try:
        yield
    except (LorryError, DiskError):
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        status, reason = _status(error), _reason(error)
        left = f"; nothing of {run_dir} was published" if run_dir else ""
        if status in ADVICE and status < 413:
            raise ConfigError(f"{where}: {ADVICE[status]} ({reason}){left}") from error
        advice = ADVICE.get(status or 0) or ("the hub fails; try again later" if status else "check the network and HF_ENDPOINT")
        raise HubError(f"{where}: {advice} ({reason}){left}") from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    """The status of the answer behind an error, if there was one."""
    answers = (getattr(link, "response", None) for link in _chain(error))
    return next((int(a.status_code) for a in answers if a is not None), None)


def _reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    said = [str(link).strip().splitlines()[0] for link in _chain(error) if str(link).strip()]
    return said[-1] if said else type(error).__name__
