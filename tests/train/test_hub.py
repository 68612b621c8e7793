"""A push as the other side sees it: huggingface_hub's own requests against a stand-in of the hub on
this machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from lorry.errors import ConfigError, LorryError
from lorry.hub import files
from lorry.hub.push import default_repo_name, push_run
from lorry.report.plots import render_png
from tests.support.hub_standin import Hub
from tests.support.hubworld import ADAPTER, CONFIG, ROW, finished_run, put, started_hub  # noqa: F401 - fixtures

UPLOADED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorry_adapter.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "run.yaml",
    "metrics.jsonl",
    "receipt.json",
    "contracts.json",
    "evaluation.json",
    "report.html",
    "report.png",
}
MADE = {"README.md", "report.html", "report.png"}


# --- what arrives


def test_the_hub_gets_exactly_the_right_files_byte_for_byte(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "render_png", render_png)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert push_run(run, "team/people") == f"{hub.url}/team/people"
    got = hub.files["team/people"]
    assert got.keys() == UPLOADED
    for name in UPLOADED - MADE:
        assert got[name] == (run / name).read_bytes(), name
    assert not [
        name
        for name, content in got.items()
        if ROW.encode() in content or hub.token.encode() in content
    ]
    assert got["report.png"].startswith(b"\x89PNG\r\n")
    assert b"exact match" in got["report.html"]
    assert hub.commits == ["Lorry run people run"]
    assert hub.private == {"team/people": False}
    assert len(hub.asked) < 20
    assert {
        p: p.read_bytes() for p in run.rglob("*") if p.is_file()
    } == before  # the run is only read


def test_the_card_is_one_that_the_hub_s_own_reader_understands(hub: Hub, run: Path) -> None:
    push_run(run, "me/people")
    card = ModelCard(hub.files["me/people"]["README.md"].decode())
    assert (card.data.base_model, card.data.library_name, card.data.datasets) == (
        "org/base",
        "peft",
        ["org/rows"],
    )
    assert [(e.dataset_name, e.metric_type, e.metric_value) for e in card.data.eval_results] == [
        ("held.jsonl", "exact_match", 0.75)
    ]
    assert 'lorry.load("me/people")' in card.text
    assert "![Loss and the other curves of the run](report.png)" in card.text


def test_a_card_that_was_edited_is_kept(hub: Hub, run: Path) -> None:
    mine = "---\nlicense: mit\n---\n\n# Mine\n"
    put(run, "README.md", mine)
    push_run(run, "me/people")
    assert hub.files["me/people"]["README.md"].decode() == mine


def test_a_run_of_several_adapters_brings_their_folders(hub: Hub, run: Path) -> None:
    for name in ("one", "two"):
        for file in ("adapter_config.json", "adapter_model.safetensors", "lorry_adapter.json"):
            (run / name).mkdir(exist_ok=True)
            shutil.copy(run / file, run / name / file)
        put(run, f"{name}/notes.txt", ROW)
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorry_adapter.json"):
        (run / file).unlink()
    push_run(run, "me/jobs")
    folders = {
        f"{n}/{f}"
        for n in ("one", "two")
        for f in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert {name for name in hub.files["me/jobs"] if "/" in name} == folders | {
        "one/lorry_adapter.json",
        "two/lorry_adapter.json",
    }


def test_a_whole_model_goes_with_all_its_shards(hub: Hub, run: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorry_adapter.json"):
        (run / file).unlink()
    put(run, "run.yaml", {**CONFIG, "lora": None, "trainable": "mlp"})
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    for n, name in enumerate(sorted(shards)):
        save_file({"w": torch.full((3,), float(n))}, run / name)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        put(run, name, {})
    push_run(run, "me/full")
    got = hub.files["me/full"]
    assert {n for n in got if n.startswith(("model", "config", "gen"))} == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert all(got[name] == (run / name).read_bytes() for name in shards)
    assert ModelCard(got["README.md"].decode()).data.library_name == "transformers"


def test_pushing_again_is_one_more_commit(hub: Hub, run: Path) -> None:
    push_run(run, "me/people")
    put(run, "evaluation.json", [{"name": "more", "metrics": {"f1": 0.5}}])
    push_run(run, "me/people")
    assert len(hub.commits) == 2
    assert b"more" in hub.files["me/people"]["evaluation.json"]
    assert "### more" in hub.files["me/people"]["README.md"].decode()


def test_without_a_name_it_is_the_directory_s_under_the_account(hub: Hub, run: Path) -> None:
    assert push_run(run) == f"{hub.url}/me/people-run"
    assert push_run(run, "short") == f"{hub.url}/me/short"


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("a--b..c", "a-b.c"),
        (".hidden-", "hidden"),
        ("ünïcode", "n-code"),
        ("x.git", "x"),
        ("—", "lorry-run"),
        ("y" * 200, "y" * 90),
    ],
)
def test_default_names_are_legal(tmp_path: Path, name: str, legal: str) -> None:
    assert default_repo_name(tmp_path / name) == legal


# --- private


def test_private_is_private(hub: Hub, run: Path) -> None:
    push_run(run, "me/quiet", private=True)
    assert hub.private == {"me/quiet": True}
    assert push_run(run, "me/quiet", private=True).endswith("me/quiet")


def test_private_refuses_a_repository_that_is_public(hub: Hub, run: Path) -> None:
    push_run(run, "me/open")
    hub.files["me/open"].clear()
    with pytest.raises(ConfigError, match="me/open exists and is public"):
        push_run(run, "me/open", private=True)
    assert hub.files["me/open"] == {}


# --- what must not leave


@pytest.mark.parametrize(
    "name",
    ["run.yaml", "metrics.jsonl", "chat_template.jinja", "tokenizer_config.json", "README.md"],
)
def test_a_token_in_a_file_stops_the_push(hub: Hub, run: Path, name: str) -> None:
    put(run, name, f"# one\n# two hf_{'Ab3' * 11}\n")
    with pytest.raises(LorryError) as caught:
        push_run(run, "me/people")
    assert hub.files == {}
    assert f"hf_{'Ab3' * 11}" not in str(caught.value)
    # which are read before, and are no YAML and no JSON now
    if name not in (
        "run.yaml",
        "metrics.jsonl",
    ):
        assert str(caught.value).startswith(f"{name}:2 holds a secret (a Hugging Face token)")


@pytest.mark.parametrize(
    "secret",
    [f"hf_oauth_{'Ab3' * 12}", f"sk-proj-{'Ab3_' * 12}", f"sk-ant-api03-{'Ab3-' * 12}", f"ghp_{'Ab3' * 12}",
     f"github_pat_{'Ab3_' * 12}", "AKIA" + "ABCD2345" * 2, "-----BEGIN RSA PRIVATE KEY-----", f"glpat-{'Ab3' * 9}",
     f"xoxb-{'123456789-' * 3}Ab3"],
    ids=lambda secret: secret[:10],
)  # fmt: skip
def test_secrets_of_other_services_stop_the_push(hub: Hub, run: Path, secret: str) -> None:
    put(run, "chat_template.jinja", f"one\n{secret}\n")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja:2 holds a secret") as caught:
        push_run(run, "me/people")
    assert hub.files == {}
    assert secret not in str(caught.value)


def test_a_variable_named_key_or_pat_counts(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "what-only-i-know")
    monkeypatch.setenv("GH_PAT", "what-only-we-know")
    for name, value in (("MY_KEY", "what-only-i-know"), ("GH_PAT", "what-only-we-know")):
        put(run, "lorry_adapter.json", {"x": value})
        with pytest.raises(ConfigError, match=rf"lorry_adapter.json:1 holds a secret \({name}\)"):
            push_run(run, "me/people")


def test_secrets_of_the_environment_count(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-of-another-hub")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    put(run, "lorry_adapter.json", {"x": "0123456789abcdef0123"})
    with pytest.raises(ConfigError, match=r"lorry_adapter.json:1 holds a secret \(WANDB_API_KEY\)"):
        push_run(run, "me/people")
    put(run, "lorry_adapter.json", {"x": "an-odd-token-of-another-hub"})
    with pytest.raises(
        ConfigError, match=r"lorry_adapter.json:1 holds a secret \(the login of the hub\)"
    ):
        push_run(run, "me/people")


def test_directories_of_this_machine_are_told(hub: Hub, run: Path) -> None:
    put(run, "adapter_config.json", {**ADAPTER, "base_model_name_or_path": "/models/base"})
    put(run, "lorry_adapter.json", {"x": f"{Path.home()}/models"})
    heard: list[str] = []
    push_run(run, "me/people", tell=heard.append)
    assert "names the base model by a directory of this machine, /models/base" in heard[0]
    assert heard[1].startswith("note: lorry_adapter.json name directories of this machine")
