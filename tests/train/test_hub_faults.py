"""A push that cannot be: no login, no permission, no network, a hub that dies; and what surrounds a
training that is pushed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorry.config import RunConfig, build_settings
from lorry.config.schema.train import TrainConfig
from lorry.errors import ConfigError, ModelError
from lorry.hub.push import HubError, check_push, push_after, push_run
from tests.support.hub_standin import Hub
from tests.support.hubworld import finished_run, started_hub, visit  # noqa: F401 - fixtures


def described(**train: Any) -> TrainConfig:
    return build_settings(RunConfig, {"data": {"path": "x.jsonl"}, "train": train}, print).train


# --- what goes wrong


def test_no_login(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ConfigError, match="not logged in to the Hugging Face hub: run `hf auth login`"
    ):
        push_run(run, "me/people")
    assert hub.asked == []


def test_a_wrong_token(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    for name in (None, "me/people"):
        with pytest.raises(ConfigError, match="the hub does not know this token") as caught:
            push_run(run, name)
        assert "hf_xxx" not in str(caught.value)
    assert hub.files == {}


def test_a_forbidden_namespace(hub: Hub, run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"/google/people: this account or its token may not write to it"
    ):
        push_run(run, "google/people")
    assert hub.files == {}


@pytest.mark.parametrize("name", ["a/b/c", "a b", "", "a--b", "x.git", "-a", "é/a"])
def test_names_that_cannot_be(hub: Hub, run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a repository name such as OWNER/NAME"):
        push_run(run, name)
    assert hub.asked == []


@pytest.mark.parametrize(
    "where",
    ["whoami", "create", "validate-yaml", "preupload", "objects/batch", "/store/", "/commit/"],
)
def test_a_server_that_dies_in_the_middle_publishes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    with Hub(dies_at=where) as hub:
        visit(hub, monkeypatch, tmp_path)
        with pytest.raises(HubError, match="check the network and HF_ENDPOINT") as caught:
            push_run(run, None)
    assert f"nothing of {run} was published" in str(caught.value)
    assert hub.commits == []
    assert not any(hub.files.values())
    assert len(hub.asked) < 40


def test_a_connection_refused(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Hub() as hub:
        visit(hub, monkeypatch, tmp_path)
    with pytest.raises(HubError, match=f"{hub.url}/me/x: check the network"):
        push_run(run, "me/x")


def test_no_run_and_no_finished_run(hub: Hub, run: Path) -> None:
    with pytest.raises(ConfigError, match="no such run directory"):
        push_run(run / "none", "me/x")
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is missing"):
        push_run(run, "me/x")
    (run / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="holds no adapter and no model"):
        push_run(run, "me/x")
    (run / "receipt.json").unlink()
    with pytest.raises(ConfigError, match="is not a finished run"):
        push_run(run, "me/x")
    assert hub.files == {}


# --- around a training


def test_before_training_a_run_that_is_not_pushed_asks_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    check_push(described())
    check_push(described(hub_model_id="no way/at all"))
    assert hub.asked == []


def test_before_training_login_and_name_are_checked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    check_push(described(push_to_hub=True), heard.append)
    check_push(described(push_to_hub="team/x"), heard.append)
    assert heard == []
    check_push(described(push_to_hub="google/x"), heard.append)
    assert "google is not one of this account's names (me, team)" in heard[0]
    with pytest.raises(ConfigError, match="'no way' is not a repository name"):
        check_push(described(push_to_hub=True, hub_model_id="no way"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(ConfigError, match="does not know this token"):
        check_push(described(push_to_hub=True))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="not logged in"):
        check_push(described(push_to_hub=True))


def test_before_training_a_hub_that_is_away_does_not_stop_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Hub() as hub:
        visit(hub, monkeypatch, tmp_path)
    heard: list[str] = []
    check_push(described(push_to_hub=True), heard.append)
    assert "training continues and the upload is tried at its end" in heard[0]


def test_after_training_the_model_id_wins(hub: Hub, run: Path) -> None:
    heard: list[str] = []
    push_after(
        described(push_to_hub="me/first", hub_model_id="team/second", hub_private_repo=True),
        run,
        heard.append,
    )
    assert heard == [f"hub     {hub.url}/team/second"]
    assert hub.private == {"team/second": True}
    push_after(described(), run, heard.append)
    assert len(heard) == 1


def test_after_training_a_failure_says_how_to_try_again(hub: Hub, run: Path) -> None:
    heard: list[str] = []
    push_after(described(push_to_hub="google/people", hub_private_repo=True), run, heard.append)
    assert heard[0].startswith("warning: the run is finished but not on the hub: ")
    assert heard[0].endswith(
        f"try again: lorry push {run} hub_model_id=google/people hub_private_repo=true"
    )
