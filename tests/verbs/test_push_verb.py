"""`lorry push`: a real run goes to a stand-in of the hub, and what came there is loaded by Lorry
and by PEFT.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lorry as library
from lorry.config.settings import PushSettings
from lorry.errors import ConfigError
from lorry.verbs import push
from tests.support.hub_standin import Hub
from tests.support.verbworld import PEOPLE, World

MAIN = """
import sys
from lorry.config.settings import PushSettings
from lorry.verbs.push import main
sys.exit(main(PushSettings(run=sys.argv[1], hub_model_id=sys.argv[2])))
"""


@pytest.fixture(scope="module")
def pushed(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, bytes], Hub]:
    """(standard output, the repository's files, the hub) of a push from a process of its own, told
    where to go by the environment alone."""
    here = {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
    }
    with Hub() as hub:
        where = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
        done = subprocess.run(
            [sys.executable, "-c", MAIN, str(world.run), "team/people"],
            env={**os.environ, **here, **where}, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, hub.files["team/people"], hub


def test_the_address_is_the_last_line(pushed: tuple[str, dict[str, bytes], Hub]) -> None:
    out, _, hub = pushed
    assert out.splitlines() == [f"{hub.url}/team/people"]


def test_no_row_and_no_checkpoint_leaves(
    world: World, pushed: tuple[str, dict[str, bytes], Hub]
) -> None:
    _, files, _ = pushed
    assert not {
        name
        for name in files
        if name.startswith(("samples", "checkpoints", "previous", "quarantine"))
    }
    answers = [row["answer"].encode() for row in PEOPLE]
    assert answers[0] in (world.run / "samples.json").read_bytes()  # the test can fail
    texts = {name: content for name, content in files.items() if not name.startswith("tokenizer")}
    assert [name for name, content in texts.items() if any(a in content for a in answers)] == []


def test_what_arrived_is_the_adapter(
    world: World, pushed: tuple[str, dict[str, bytes], Hub], tmp_path: Path
) -> None:
    """Downloaded, as files: Lorry gives the same scores as from the run, PEFT nearly so."""
    for name, content in pushed[1].items():
        (tmp_path / name).write_bytes(content)
    ids = torch.tensor([[5, 9, 200, 31, 7, 8, 300]])
    here, there = (
        library.load(path, dtype="float32")[0](ids).logits for path in (world.run, tmp_path)
    )
    assert torch.equal(here, there)
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path)(ids).logits
    torch.testing.assert_close(here, theirs, atol=1e-4, rtol=0)


def test_without_a_login_nothing_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    copy = shutil.copytree(world.run, tmp_path / "run")
    with pytest.raises(ConfigError, match="hf auth login"):
        push.main(PushSettings(run=str(copy)))
