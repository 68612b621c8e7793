"""Upload a finished run to the Hugging Face hub: one commit with what a user of the hub needs, or
nothing.

Try: ``push_run(Path("runs/people"), "me/people", private=True)``. Who it is comes from huggingface_hub
alone (`hf auth login`, or HF_TOKEN) and is never written anywhere; HF_ENDPOINT names another hub. Its
client is imported where it is asked: every run comes by here, and few of them are uploaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorry.config.schema.train import TrainConfig
from lorry.disk.documents import read_object
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError, LorryError
from lorry.runs.layout import ADAPTER_CONFIG

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SILENCE_SECONDS = 120.0  # seconds without a byte after which a request has failed
LOGIN_ADVICE = "run `hf auth login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"
STATUS_ADVICE = {
    401: f"the hub does not know this token; {LOGIN_ADVICE}",
    403: f"this account or its token may not write to it; choose a repository of your own (hub_model_id=OWNER/NAME), or {LOGIN_ADVICE}",
    404: "there is no such account or organisation, or this token cannot see it; choose another with hub_model_id=OWNER/NAME",
    413: "a file is larger than the hub accepts",
    429: "the hub limits the rate of requests; wait some minutes",
}
PushListener = Callable[[str], None]


class HubError(LorryError, OSError):
    """The hub could not be reached or did not take the upload; nothing on this machine has changed."""


def _ignore_text(text: str) -> None:
    pass


def push_run(
    run_dir: Path,
    repo_id: str | None = None,
    *,
    private: bool = False,
    tell: PushListener = _ignore_text,
) -> str:
    """Upload a finished run and return the repository's address. The run directory is only read.

    ``repo_id``: OWNER/NAME, or NAME under the account of the token; None is the directory's name.
    ``private`` makes a new repository private, and refuses one that exists and is public. ``tell``
    hears what a person should know. Raises ConfigError (no login, a bad name, no permission, a
    secret in a file), HubError (no network, a hub that fails), and what `collect_upload` raises.
    """
    from huggingface_hub import CommitOperationAdd

    from lorry.hub.files import collect_upload, find_private_paths

    token = _hub_token()
    if repo_id is not None:
        check_repo_name(repo_id)
    api = _hub_api(token)
    with _explain_hub_errors(run_dir, repo_id, api.endpoint), _bound_waiting():
        name = repo_id or default_repo_name(run_dir)
        owned = name if "/" in name else f"{api.whoami()['name']}/{name}"
        files = collect_upload(run_dir, at=owned)
        for note in _upload_notes(run_dir, find_private_paths(files)):
            tell(f"note: {note}")
        # only once all files are collected and checked: a refused run leaves no empty repository
        # None, not False: then the default of the account decides, and no repository turns public
        api.create_repo(owned, private=private or None, exist_ok=True)
        # exist_ok leaves a repository that exists as it is, public too
        if private and not api.repo_info(owned).private:
            raise ConfigError(
                f"{owned} exists and is public, but hub_private_repo is set: make it private, or use another name"
            )
        # one commit: the hub has all of the run or nothing of it
        operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
        api.create_commit(owned, operations, commit_message=f"Lorry run {run_dir.resolve().name}")
    return f"{api.endpoint}/{owned}"


@contextmanager
def push_when_finished(train: TrainConfig, run_dir: Path, tell: PushListener) -> Iterator[None]:
    """Around a training run in a directory: what `check_push` finds is said, or raised, before it;
    `push_after` follows unless it fails.
    """
    # before: a run of hours must not end in "not logged in"
    check_push(train, tell)
    yield
    push_after(train, run_dir, tell)


def push_target(train: TrainConfig) -> tuple[bool, str | None]:
    """Whether a run is to be pushed, and to which repository: train.hub_model_id, else what
    train.push_to_hub names.
    """
    requested = train.push_to_hub
    return bool(requested), train.hub_model_id or (
        requested if isinstance(requested, str) else None
    )


def check_push(train: TrainConfig, tell: PushListener = _ignore_text) -> None:
    """Before training: is there a login, does the hub know it, is the repository's name possible? A
    hub that cannot be reached now is only told, since training needs none. Raises ConfigError."""
    requested, repo_id = push_target(train)
    if not requested:
        return
    if repo_id is not None:
        check_repo_name(repo_id)
    api = _hub_api(_hub_token())
    try:
        with _explain_hub_errors(None, repo_id, api.endpoint), _bound_waiting():
            account = api.whoami()
    except HubError as error:
        tell(
            f"note: train.push_to_hub: {error}; training continues and the upload "
            "is tried at its end"
        )
        return
    owners = [account["name"], *(str(org.get("name")) for org in account.get("orgs", []))]
    owner = repo_id.split("/")[0] if repo_id and "/" in repo_id else account["name"]
    if owner not in owners:
        tell(
            f"note: train.push_to_hub: {owner} is not one of this account's names "
            f"({', '.join(owners)}); the upload may be refused"
        )


def push_after(train: TrainConfig, path: Path, tell: PushListener) -> None:
    """After training, where the run asks for it: upload, and tell the address. What goes wrong is
    told, with the command that tries again, and is no error: the run is finished."""
    requested, repo_id = push_target(train)
    if not requested:
        return
    try:
        tell(f"hub     {push_run(path, repo_id, private=train.hub_private_repo, tell=tell)}")
    except LorryError as error:
        private = " hub_private_repo=true" if train.hub_private_repo else ""
        command = f"lorry push {path}{f' hub_model_id={repo_id}' if repo_id else ''}{private}"
        tell(
            f"warning: the run is finished but not on the hub: {error}\n         try again: {command}"
        )


# --- names and logins


def check_repo_name(repo_id: str) -> None:
    """Raise ConfigError where the hub could have no repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"hub_model_id={repo_id!r} is not a repository name such as OWNER/NAME: {reason}"
        ) from None


def default_repo_name(run_dir: Path) -> str:
    """A legal repository name from the run directory's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.resolve().name)
    # the hub refuses "--", ".." and names that end in .git
    name = re.sub(r"([.-])[.-]+", r"\1", name)[:90].strip(".-_").removesuffix(".git")
    return name or "lorry-run"


def _hub_token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ConfigError(f"not logged in to the Hugging Face hub: {LOGIN_ADVICE}")
    return token


def _hub_api(token: str) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="lorry")


def _upload_notes(run_dir: Path, private_paths: list[str]) -> list[str]:
    """What a person may not expect of what is uploaded."""
    from lorry.hub.files import published_adapter_folders

    notes = []
    for folder in [run_dir, *published_adapter_folders(run_dir)]:
        config = folder / ADAPTER_CONFIG
        base = read_object(config).get("base_model_name_or_path") if config.is_file() else None
        if isinstance(base, str) and Path(base).is_absolute():
            notes.append(
                "adapter_config.json names the base model by a directory of this "
                f"machine, {base}; on other machines PEFT has to be given the base "
                "model"
            )
            break
    if private_paths:
        notes.append(
            f"{', '.join(private_paths)} name directories of this machine and are "
            "uploaded as they are"
        )
    return notes


# --- errors and time


@contextmanager
def _bound_waiting() -> Iterator[None]:
    """huggingface_hub waits for ever by default; here a silent server is a failure."""
    from huggingface_hub import get_session

    session = get_session()
    # one session serves all of huggingface_hub, so its own value is put back
    before = session.timeout
    session.timeout = SILENCE_SECONDS
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _explain_hub_errors(run_dir: Path | None, repo_id: str | None, endpoint: str) -> Iterator[None]:
    """What huggingface_hub raises, as an error that says what to do. HTTPError: of the client,
    every kind that is a failed connection; RuntimeError: of an upload, from what failed;
    ValueError: an answer that is none of the hub's.
    """
    from huggingface_hub.errors import HTTPError

    where = f"{endpoint}/{repo_id}" if repo_id else endpoint
    try:
        yield
    except (LorryError, DiskError):
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        status, reason = _response_status(error), _root_reason(error)
        outcome = f"; nothing of {run_dir} was published" if run_dir else ""
        # 401 to 404 are settings to change, exit code 2; the rest is the hub's state of today
        if status in STATUS_ADVICE and status < 413:
            raise ConfigError(f"{where}: {STATUS_ADVICE[status]} ({reason}){outcome}") from error
        advice = STATUS_ADVICE.get(status or 0) or (
            "the hub reports an error of its own; try again later"
            if status
            else "check the network and HF_ENDPOINT"
        )
        raise HubError(f"{where}: {advice} ({reason}){outcome}") from error


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _response_status(error: BaseException) -> int | None:
    """The status of the answer behind an error, if there was one."""
    answers = (getattr(link, "response", None) for link in _error_chain(error))
    # the nearest answer: an upload's error wraps the one that began it
    return next((int(a.status_code) for a in answers if a is not None), None)


def _root_reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    messages = [
        str(link).strip().splitlines()[0] for link in _error_chain(error) if str(link).strip()
    ]
    return messages[-1] if messages else type(error).__name__
