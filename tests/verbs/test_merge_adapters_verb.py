"""`lorry merge RUN RUN ...`: an adapter of several, its receipt, its scale fitted on rows, and what
is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorry as library
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import load_adapter, load_start, save_adapter
from lorry.adapters.peft.start_files import adapter_digest
from lorry.adapters.spec import LoraSpec
from lorry.config import MergeSettings, build_settings, dump_settings, parse_settings
from lorry.errors import ConfigError
from lorry.verbs import merge_adapters
from tests.support.verbworld import PEOPLE, lorry, model_directory, write_rows

IDS = torch.arange(3, 30)[None]
WEIGHTS = "adapter_model.safetensors"


def save_random(base: Path, path: Path, name: str, seed: int, **settings: Any) -> Path:
    """An adapter of random values over a base, as a run leaves one."""
    model, _ = library.load(base, dtype="float32")
    spec = {"r": 4, "target_modules": ("q_proj", "down_proj"), **settings}
    adapter = attach(model, LoraSpec(**spec), name)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        adapter.values.copy_(torch.randn(adapter.values.shape, generator=draw) * 0.1)
    adapter.touch()
    save_adapter(model, path, base_name=str(base))
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; runs/law and runs/code over it, of other ranks and targets; rows.jsonl."""
    root = tmp_path_factory.mktemp("adapters")
    base = model_directory(root / "base", dtype=torch.float32)
    save_random(base, root / "runs" / "law", "law", 1)
    save_random(
        base, root / "runs" / "code", "code", 2, r=2, target_modules=("q_proj",), use_rslora=True
    )
    write_rows(root / "rows.jsonl", PEOPLE)
    return root


def logits_of(path: Path, base: Path) -> torch.Tensor:
    """PEFT's logits of an adapter directory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(path)).eval()(IDS).logits


def test_the_exact_sum_is_the_default_and_peft_reads_it(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law, code = adapters / "runs" / "law", adapters / "runs" / "code"
    out = tmp_path / "both"
    assert lorry("merge", law, code, "weights=1,-0.5", f"output_dir={out}") == 0
    told = capsys.readouterr()
    assert told.out == f"{out}\n"
    assert "merged by cat: 1 x law, -0.5 x code; 4 modules of rank 6" in told.err
    partial = "model.layers.0.mlp.down_proj"
    assert f"note: 2 modules are targets of some adapters only ({partial})" in told.err
    assert "reloaded by peft: largest logit difference" in told.err
    model, _ = library.load(adapters / "base", law, dtype="float32")
    load_adapter(model, code)
    get_bank(model).activate(Mix.constants({"law": 1.0, "code": -0.5}))
    with torch.no_grad():
        expected = model(IDS).logits
        plain = library.load(adapters / "base", dtype="float32")[0](IDS).logits
    assert (expected - plain).abs().max() > 0.1
    assert (logits_of(out, adapters / "base") - expected).abs().max() < 1e-4
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", WEIGHTS, "chat_template.jinja", "lorry_adapter.json",
        "receipt.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_seed_is_torch_s_before_peft_s_call(adapters: Path, tmp_path: Path) -> None:
    """On the native decoder too, whose modules stand in the order of transformers' own."""
    law, code = adapters / "runs" / "law", adapters / "runs" / "code"
    out = tmp_path / "dare"
    words = ("method=dare_ties_svd", "weights=0.7,1.2", "density=0.6", "seed=3")
    assert lorry("merge", law, code, *words, f"output_dir={out}") == 0
    base = AutoModelForCausalLM.from_pretrained(adapters / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(law), adapter_name="law")
    model.load_adapter(str(code), adapter_name="code")
    torch.manual_seed(3)
    model.add_weighted_adapter(
        ["law", "code"], [0.7, 1.2], "both", combination_type="dare_ties_svd", density=0.6
    )
    model.save_pretrained(tmp_path / "peft", selected_adapters=["both"])
    expected = load_file(tmp_path / "peft" / "both" / WEIGHTS)
    found = load_file(out / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)


def test_the_receipt_names_what_it_was_made_of(adapters: Path, tmp_path: Path) -> None:
    law, code = adapters / "runs" / "law", adapters / "runs" / "code"
    out = tmp_path / "ties"
    assert lorry(
        "merge", law, code, "method=ties_svd", "density=0.3", "rank=3", f"output_dir={out}"
    ) == 0  # fmt: skip
    receipt = json.loads((out / "receipt.json").read_text())
    made = receipt["merge"]
    assert made["sources"] == [
        {"name": each.name, "path": str(each), "sha256": adapter_digest(each), "weight": 1.0}
        for each in (law, code)
    ]
    assert {key: made[key] for key in ("method", "density", "rank", "majority_sign_method")} == {
        "method": "ties_svd", "density": 0.3, "rank": 3, "majority_sign_method": "total",
    }  # fmt: skip
    assert 0 < made["energy_lost"] < 1
    assert receipt["adapters"] == {"ties": hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()}
    assert receipt["base"]["path"] == str(adapters / "base")
    assert lorry("doctor", out) == 0
    # and it goes into a base, as any adapter does
    assert lorry("merge", out, f"output_dir={tmp_path / 'model'}") == 0
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_run_of_several_adapters_is_all_of_them(adapters: Path, tmp_path: Path) -> None:
    several = tmp_path / "jobs"
    for name in ("law", "code"):
        shutil.copytree(adapters / "runs" / name, several / name)
    assert lorry("merge", several, "method=core_linear") == 0
    made = json.loads((tmp_path / "jobs-core_linear" / "receipt.json").read_text())["merge"]
    assert [source["name"] for source in made["sources"]] == ["code", "law"]
    # a name that two share
    other = shutil.copytree(adapters / "runs" / "law", tmp_path / "other" / "law")
    out = tmp_path / "same"
    assert lorry("merge", adapters / "runs" / "law", other, f"output_dir={out}") == 0
    made = json.loads((out / "receipt.json").read_text())["merge"]
    assert [source["name"] for source in made["sources"]] == ["law", "law-2"]


def test_scale_auto_is_the_lowest_loss_of_half_the_rows(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against `lorry eval` on the other half."""
    law, code = adapters / "runs" / "law", adapters / "runs" / "code"
    out, rows = tmp_path / "fitted", adapters / "rows.jsonl"
    words = ("merge", law, code, "method=core_tsv", "weights=1,-1")
    assert lorry(*words, "scale=auto", f"data={rows}", f"output_dir={out}") == 0
    told = capsys.readouterr().err
    made = json.loads((out / "receipt.json").read_text())["merge"]
    found = made["chosen_on"]
    assert f"scale={made['scale']:g}" in told
    assert len(found["losses"]) == 15
    assert found["losses"][f"{made['scale']:g}"] == min(found["losses"].values())
    plain = tmp_path / "plain"
    assert lorry(*words, f"output_dir={plain}") == 0
    held_out = write_rows(tmp_path / "held_out.jsonl", PEOPLE[1::2])

    def losses(adapter: Path) -> list[float]:
        """Of the base and of the adapter, on the rows held out."""
        results = tmp_path / "eval.json"
        assert lorry(
            "eval", adapter, f"data={held_out}", f"output_dir={results}", "dtype=float32",
            "max_new_tokens=1",
        ) == 0  # fmt: skip
        sides = json.loads(results.read_text())["sides"]
        return [side["metrics"]["loss"] for side in sides.values()]

    held = found["held_out_losses"]
    assert losses(plain) == pytest.approx([held["base"], held["1"]], abs=1e-5)
    # what was written has the factor in it
    assert losses(out)[1] == pytest.approx(held["chosen"], abs=1e-5)


@pytest.mark.parametrize("nan_below", [0.45, 2.0])
def test_scale_auto_takes_no_loss_that_is_no_number(
    nan_below: float,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NaN at the first scales, where `min` would stay; at all of them there is none to choose."""

    def losses(opened: Any, rows: Any, mix: Mix, batch_rows: int) -> tuple[float, float]:
        scale = mix.terms[0].gate if mix.terms else 0.0
        assert isinstance(scale, float)
        return (scale if scale > nan_below else float("nan")), 1.0 / (scale or 1.0)

    monkeypatch.setattr(merge_adapters, "halves_loss", losses)
    law, code, out = adapters / "runs" / "law", adapters / "runs" / "code", tmp_path / "out"
    rows = adapters / "rows.jsonl"
    done = lorry("merge", law, code, "scale=auto", f"data={rows}", f"output_dir={out}")
    if nan_below == 2.0:
        assert done == 4
        assert "infinite or NaN at every scale" in capsys.readouterr().err
        assert not out.exists()
        return
    assert done == 0
    made = json.loads((out / "receipt.json").read_text(), parse_constant=pytest.fail)["merge"]
    assert made["scale"] == 0.5
    found = made["chosen_on"]["losses"]
    assert found["0.4"] is None
    assert found["0.6"] == 0.6


def test_adapters_over_one_start_stay_over_it(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, law = adapters / "base", adapters / "runs" / "law"
    for seed, name in enumerate(("one", "two")):
        model, _ = library.load(base, dtype="float32")
        load_start(model, law)
        attach(model, LoraSpec(r=2, target_modules=("v_proj",)), name)
        with torch.no_grad():
            draw = torch.Generator().manual_seed(seed)
            values = get_bank(model)[name].values
            values.copy_(torch.randn(values.shape, generator=draw) * 0.3)
        save_adapter(model, tmp_path / name, base_name=str(base))
    out = tmp_path / "both"
    assert lorry("merge", tmp_path / "one", tmp_path / "two", f"output_dir={out}") == 0
    assert "reloaded by lorry" in capsys.readouterr().err
    merged, _ = library.load(out, dtype="float32")
    pair, _ = library.load(tmp_path / "one", tmp_path / "two", dtype="float32")
    get_bank(pair).activate(Mix.constants({"one": 1.0, "two": 1.0}))
    with torch.no_grad():
        assert (merged(IDS).logits - pair(IDS).logits).abs().max() < 1e-4
    # one on the bare base is another kind of thing
    assert lorry("merge", tmp_path / "one", law, f"output_dir={tmp_path / 'x'}") == 4
    assert "trained on top of the base model alone" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_refused_leaves_nothing(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law, code = adapters / "runs" / "law", adapters / "runs" / "code"
    out = tmp_path / "out"

    def refused(code: int, words: str, *argv: object) -> None:
        assert lorry("merge", *argv, f"output_dir={out}") == code
        told = capsys.readouterr()
        assert words in told.err
        assert told.out == ""
        assert "Traceback" not in told.err
        assert list(tmp_path.glob("out*")) == []

    refused(2, "weights has 1 numbers for 2 adapters", law, code, "weights=[1]")
    refused(2, "merged adapter is zero: every weight is 0", law, code, "weights=[0,0]")
    refused(2, "merged adapter is zero: scale is 0", law, code, "scale=0")
    refused(2, "zero: density=1e-09", law, code, "method=ties_svd", "density=1e-9")
    refused(2, "of adapter 'code' is 0", law, code, "method=core_tsv", "weights=[1,0]")
    refused(2, "is named twice", law, adapters / "runs" / ".." / "runs" / "law")
    refused(2, "have the ranks 4, 2", law, code, "method=ties")
    refused(4, "holds no adapter", law, adapters / "base")
    one_row = write_rows(tmp_path / "one.jsonl", PEOPLE[:1])
    refused(3, "one row; scale=auto", law, code, "scale=auto", f"data={one_row}")
    other = model_directory(tmp_path / "other", dtype=torch.float32, seed=5)
    foreign = save_random(other, tmp_path / "foreign", "foreign", 1)
    refused(4, "trained on other base weights", law, foreign)
    # PEFT's own files have no digest: the bases that they name are compared
    (foreign / "lorry_adapter.json").unlink()
    refused(4, "only adapters of the same base model can be merged", law, foreign)
    copied = shutil.copytree(adapters / "base", tmp_path / "copied")
    config = json.loads((foreign / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(copied)
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    assert lorry("merge", law, foreign, f"output_dir={tmp_path / 'fine'}") == 0
    capsys.readouterr()
    broken = shutil.copytree(code, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / WEIGHTS)
    refused(4, "holds values that are not finite", law, broken)
    out.mkdir()
    (out / "mine").write_text("kept")
    assert lorry("merge", law, code, f"output_dir={out}") == 2
    assert (out / "mine").read_text() == "kept"


def test_one_adapter_and_other_tokenizers_are_told(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = shutil.copytree(adapters / "runs" / "law", tmp_path / "law")
    code = shutil.copytree(adapters / "runs" / "code", tmp_path / "code")
    assert lorry("merge", law, "method=ties", "weights=[-1]") == 0
    assert "one adapter is copied, as in PEFT; ties has nothing to do" in capsys.readouterr().err
    made = json.loads((tmp_path / "law-ties" / "receipt.json").read_text())["merge"]
    assert made["method"] == "linear"
    for folder, text in ((law, "{{ messages }}"), (code, "{{ messages[0].content }}")):
        (folder / "chat_template.jinja").write_text(text)
    assert lorry("merge", law, code) == 0
    assert f"warning: {code / 'chat_template.jinja'} differs from" in capsys.readouterr().err


def test_the_command_line_tells_the_two_forms_apart() -> None:
    def read(*words: str) -> MergeSettings:
        return parse_settings(MergeSettings, list(words), print)

    one, several = read("runs/a"), read("runs/a", "runs/b", "runs/c", "weights=1,-0.5,2")
    assert (one.several, one.output_dir) == (False, Path("runs/a-merged"))
    assert (several.run, several.others) == ("runs/a", ["runs/b", "runs/c"])
    assert (several.several, several.output_dir) == (True, Path("runs/a-cat"))
    assert several.weights == [1, -0.5, 2]
    ties = read("runs/a/", "method=ties")
    assert (ties.several, ties.output_dir) == (True, Path("runs/a-ties"))
    peft = read("a", "b", "combination_type=svd", "svd_rank=4")
    assert (peft.method, peft.rank) == ("svd", 4)
    for settings in (one, several, ties, peft):
        assert build_settings(MergeSettings, settings.model_dump(), print) == settings
        assert "several" not in dump_settings(settings)
    for words, message in (
        (["a", "density=0.3"], "density is for merging several adapters"),
        (["a", "data=f"], "data.path is for merging several adapters"),
        (["a", "b", "dtype=bfloat16"], "dtype is for merging one adapter"),
        (["a", "b", "adapter=x"], "name the folder of one, RUN/NAME"),
        (["a", "b", "weight=0.5"], r"give weights=\[...\]"),
        (
            ["a", "b", "method=svd", "density=0.3"],
            "method=svd does not use density; the methods that do: ti",
        ),
        (["a", "b", "method=core_iso", "seed=1"], "core_iso does not use seed"),
        (
            ["a", "b", "method=linear", "majority_sign_method=frequency"],
            "does not use majority_sign",
        ),
        (["a", "b", "rank=4"], "method=cat does not use rank"),
        (["a", "b", "scale=auto"], "needs rows to choose the coefficient by; give data=FILE"),
        (["a", "b", "data=f"], "data.path is read with scale=auto only"),
        (["a", "b", "method=tie"], "linear, cat, svd"),
        (["a", "b", "density=0", "method=ties"], "above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(*words)
