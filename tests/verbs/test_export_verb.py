"""`lorry export`: transformers and PEFT read what is written, and an export that differs is not
called one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorry as library
from lorry.verbs.exports import peft as export_peft
from tests.support.verbworld import World, lorry, model_directory, train

QUESTION = "Where does Ilse live?"


def our_logits(world: World) -> torch.Tensor:
    model, words = library.load(world.run, dtype="float32")
    with torch.no_grad():
        logits: torch.Tensor = model(words(QUESTION, return_tensors="pt").input_ids).logits
    return logits


def test_to_hf(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "hf"
    assert lorry("export", world.run, "to=hf", f"output_dir={output}") == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    assert "reloaded by hf: largest logit difference" in err
    words = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(**words(QUESTION, return_tensors="pt")).logits
    assert (theirs - our_logits(world)).abs().max() < 1e-4
    prompt = words.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )
    said = model.generate(**prompt, max_new_tokens=16, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert words.decode(said, skip_special_tokens=True) == "Ilse lives in Kyoto."


def test_to_hf_in_another_format(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "narrow"
    assert lorry("export", world.run, "to=hf", "dtype=bf16", f"output_dir={output}") == 0
    assert "stored in bfloat16" in capsys.readouterr().err
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


def test_to_peft(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "peft"
    assert lorry("export", world.run, "to=peft", f"output_dir={output}") == 0
    assert "reloaded by peft: largest logit difference" in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(output)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, str(output))(
            **words(QUESTION, return_tensors="pt")
        ).logits
    assert (theirs - our_logits(world)).abs().max() < 1e-4


def test_an_export_that_differs_is_refused(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PEFT given another scale: the very mistake that nobody would see."""
    right = export_peft.write_peft

    def wrong(found: object, name: str, output: Path, weight: float) -> None:
        right(found, name, output, weight)  # type: ignore[arg-type]
        config = output / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))

    monkeypatch.setattr(export_peft, "write_peft", wrong)
    assert lorry("export", world.run, "to=peft", f"output_dir={tmp_path / 'wrong'}") == 5
    assert "more than rounding to float32 can explain" in capsys.readouterr().err
    assert not (
        tmp_path / "wrong"
    ).exists()  # what is wrong does not get the name that was asked for


def test_without_peft_lorry_opens_it_again_and_says_so(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert lorry("export", world.run, "to=peft", f"output_dir={tmp_path / 'peft'}") == 0
    err = capsys.readouterr().err
    assert "peft is not installed, so Lorry itself read the export back" in err
    assert "reloaded by lorry: largest logit difference" in err


@pytest.mark.parametrize("installed", [True, False], ids=["peft", "no peft"])
def test_an_adapter_that_cannot_be_opened_again_is_not_kept(
    installed: bool,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = export_peft.write_peft

    def cut(found: object, name: str, output: Path, weight: float) -> None:
        right(found, name, output, weight)  # type: ignore[arg-type]
        whole = (output / "adapter_model.safetensors").read_bytes()
        (output / "adapter_model.safetensors").write_bytes(whole[:-100])

    monkeypatch.setattr(export_peft, "write_peft", cut)
    if not installed:
        monkeypatch.setitem(sys.modules, "peft", None)
    assert lorry("export", world.run, "to=peft", f"output_dir={tmp_path / 'wrong'}") == 5
    assert "the export cannot be opened again and was removed" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_exported(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, code, message in (
        ((world.base, "to=hf"), 2, "is a plain model and has no adapter"),
        ((world.run, "to=peft", "adapter=animals"), 2, "no such adapter; it has people"),
        ((world.run, "to=peft", "dtype=bfloat16"), 2, "dtype=bfloat16 is for to=hf"),
        ((world.run, "to=peft", f"output_dir={world.base}"), 2, "already exists and is not empty"),
        ((tmp_path / "nope", "to=hf"), 4, "no model at"),
        ((world.run, "to=safetensors"), 2, "to"),
    ):
        assert lorry("export", *argv) == code
        assert message in capsys.readouterr().err


def test_an_adapter_on_a_tied_head(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged, the head leaves the embedding; both libraries' logits are checked by the verb itself."""
    base = model_directory(tmp_path / "base", tie_word_embeddings=True)
    run = train(tmp_path / "run", base, world.rows, "target_modules=[lm_head,q_proj]", steps=10)
    assert lorry("export", run, "to=peft") == 0
    capsys.readouterr()
    assert lorry("export", run, "to=hf") == 0
    assert "output head and embedding were tied and no longer are" in capsys.readouterr().err
    tensors = load_file(Path(f"{run}-hf") / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(
        tensors["model.embed_tokens.weight"],
        load_file(base / "model.safetensors")["model.embed_tokens.weight"],
    )
