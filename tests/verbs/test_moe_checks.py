"""`lorry moe`: what its experts, their rows and its export cannot be is one error before anything
trains, with nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorry.errors import LorryError
from lorry.models.moe.checkpoint import describe_moe
from lorry.verbs import moe
from tests.support.verbworld import PEOPLE, model_directory, write_rows
from tests.support.verbworld import lorry as run_lorry

MLP = "lora.target_modules=[gate_proj, up_proj, down_proj]"


def swap_tokens(run: Path) -> None:
    file = run / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    one, two = list(vocabulary)[50:52]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(document))


def change_template(run: Path) -> None:
    file = run / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_end|>", 1))


def change_base(run: Path) -> None:
    file = run / "lorry_adapter.json"
    facts = json.loads(file.read_text())
    facts["base_digest"] = "0" * len(facts["base_digest"])
    file.write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two files of rows, an empty one, and an adapter; not to be changed."""
    folder = tmp_path_factory.mktemp("checks")
    base = model_directory(folder / "base")
    for name, at in (("a", 0), ("b", 2)):
        write_rows(folder / f"{name}.jsonl", PEOPLE[at : at + 2])
    (folder / "empty.jsonl").write_text("")
    words = [f"model={base}", f"data={folder / 'b.jsonl'}", "dtype=float32", "r=2", "max_steps=1"]
    words += [MLP, "max_length=96", "save_strategy=no", f"output_dir={folder / 'there'}"]
    assert run_lorry("sft", *words) == 0
    return folder


def refused(made: Path, out: Path, second: str, *words: str) -> int:
    """Exit code of a mixture of a fresh expert and ``second``, which wrote nothing."""
    before = sorted(out.parent.iterdir())
    experts = f"experts=[{{name: a, data: {made / 'a.jsonl'}}}, {second}]"
    settings = ["dtype=float32", "r=2", "max_steps=1", "max_length=96", f"output_dir={out}"]
    code = run_lorry("moe", f"model={made / 'base'}", *settings, experts, *(words or [MLP]))
    assert sorted(out.parent.iterdir()) == before
    return code


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (swap_tokens, "expert 'b': .* was trained with another tokenizer than the mixture's base"),
        (change_template, "expert 'b': .* was trained with another chat template"),
        (change_base, "trained on other base weights"),
    ],
)
def test_an_adapter_of_another_base_tokenizer_or_template(
    damage: Callable[[Path], None],
    words: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first two were mixed in silence, the third was told when the other expert had trained."""
    there = tmp_path / "there"
    shutil.copytree(made / "there", there)
    damage(there)
    second = f"{{name: b, adapter: {there}, data: {made / 'b.jsonl'}}}"
    assert refused(made, tmp_path / "mix", second) in (2, 4)
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, error)


@pytest.mark.parametrize(
    ("second", "words", "message"),
    [
        ("data: FOLDER/none.jsonl", (MLP, "together=false"), "none.jsonl: no such file"),
        ("data: FOLDER/empty.jsonl", (MLP, "together=false"), "empty.jsonl: no usable row"),
        ("data: FOLDER/b.jsonl", ("lora.target_modules=[c_fc]",), "names 'c_fc', which matches"),
        (
            "data: FOLDER/b.jsonl",
            ("lora.target_modules=[gate_proj, q_proj]",),
            "expert 'a' has an adapter at model.layers.0.self_attn.q_proj",
        ),
        (
            "data: FOLDER/b.jsonl",
            ("lora.target_modules=[gate_proj, lm_head]", "router.kind=uniform", "export=[{to: hf-moe, gate: hidden}]"),
            "adapter 'a' is on lm_head, which all experts of a mixture share",
        ),
        (
            "data: FOLDER/b.jsonl",
            ("lora.target_modules=[gate_proj, q_proj]", "router.kind=uniform", "export=[{to: hf-moe, gate: hidden}]"),
            "this class of model routes MLPs only",
        ),
        (
            "data: FOLDER/b.jsonl",
            (MLP, "export=[{to: hf-moe, experts_per_token: 3}]"),
            "experts_per_token=3: there are 2 experts",
        ),
        (
            "data: FOLDER/b.jsonl",
            (MLP, "export=[{to: hf-moe, gate_mode: nonsense}]"),
            "export.0.gate_mode: got 'nonsense'; give one of 'router', 'hidden'",
        ),
        (
            "data: FOLDER/b.jsonl",
            (MLP, "export=[hf-moe, {to: gguf, outtyp: q8_0}]"),
            "export.1: unknown setting 'outtyp'",
        ),
    ],
)  # fmt: skip
def test_what_experts_and_exports_cannot_be(
    second: str,
    words: tuple[str, ...],
    message: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expert = f"{{name: b, {second.replace('FOLDER', str(made))}}}"
    assert refused(made, tmp_path / "mix", expert, *words) in (2, 3)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_export_of_a_mixture_whose_classifier_has_a_lora(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its token router was refused: the classifier's LoRA was still there under the router's name."""

    def stop(run: object, stages: object) -> None:
        raise LorryError("the checks have held")

    monkeypatch.setattr(moe, "make_experts", stop)
    experts = ", ".join(f"{{name: {n}, data: {made / n}.jsonl}}" for n in "ab")
    words = ["router.kind=sequence", "router.lora={r: 2}", "export=[{to: hf-moe}]", "dtype=float32"]
    words += [f"model={made / 'base'}", f"experts=[{experts}]", MLP, f"output_dir={tmp_path / 'm'}"]
    assert run_lorry("moe", *words) == 1
    assert "the checks have held" in capsys.readouterr().err


@pytest.mark.parametrize(
    "start",
    [
        ("init_lora_weights=eva",),
        ("init_lora_weights=orthogonal", "r=2"),
        ("init_lora_weights=mica",),
        ("variant=adalora", "init_r=4", "target_r=2"),
    ],
)
def test_experts_that_begin_otherwise_than_at_random(
    start: tuple[str, ...], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows, or a rank above 1, were asked for before anything had been read or trained."""

    def stop(run: object, stages: object) -> None:
        raise LorryError("the checks have held")

    monkeypatch.setattr(moe, "make_experts", stop)
    experts = ", ".join(f"{{name: {n}, data: {made / n}.jsonl}}" for n in "ab")
    words = ["router.kind=uniform", "dtype=float32", MLP, f"output_dir={tmp_path / 'm'}"]
    assert run_lorry("moe", f"model={made / 'base'}", f"experts=[{experts}]", *words, *start) == 1
    assert "the checks have held" in capsys.readouterr().err


def test_experts_of_the_mixture_that_makes_room(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mixture was moved away, and its experts with it; then they were missing."""
    out, there = tmp_path / "m", made / "there"
    words = [f"model={made / 'base'}", "dtype=float32", MLP, f"output_dir={out}"]
    experts = [f"experts=[{{name: a, adapter: {a}}}, {{name: b, adapter: {b}}}]"
               for a, b in ((there, there), (out / "a", out / "b"))]  # fmt: skip
    assert run_lorry("moe", *words, experts[0], "router.kind=uniform") == 0
    before = sorted(out.rglob("*"))
    capsys.readouterr()
    assert run_lorry("moe", *words, experts[1], "router.kind=arrow") == 2
    assert f"{out / 'a'} is of the mixture in {out}" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_experts_of_a_run_that_makes_room(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OUT/experts was one run of several jobs: it moved away when another expert was to be trained
    there, and the one that was brought along from it was missing."""
    out = tmp_path / "m"
    data = [f"jobs=[{{name: a, data: {made / 'a.jsonl'}}}, {{name: b, data: {made / 'b.jsonl'}}}]"]
    short = [f"model={made / 'base'}", "dtype=float32", "r=2", "max_steps=1", "max_length=96"]
    short += [MLP, "save_strategy=no"]
    assert run_lorry("sft", *short, *data, f"output_dir={out / 'experts'}") == 0
    before = sorted(out.rglob("*"))
    capsys.readouterr()
    a, b = (f"adapter: {out / 'experts' / name}" for name in "ab")
    data = f"data: {made / 'b.jsonl'}"
    for experts, more in (
        (f"{{name: a, {a}}}, {{name: b, {data}}}", "together=true"),  # trained in that run's folder
        (f"{{name: a, {a}}}, {{name: b, {data}}}", "together=false"),  # below it, on its own
        # a sum in the folder of one of its parts
        (f"{{name: c, {a}}}, {{name: a, {a.replace(': ', ': [')}, {made / 'there'}]}}", ""),
        (f"{{name: a, {b}}}, {{name: b, {data}}}", "together=true"),  # under another name
    ):
        words = [*short, f"experts=[{experts}]", "router.kind=uniform", *filter(None, [more])]
        assert run_lorry("moe", *words, f"output_dir={out}") == 2
        error = capsys.readouterr().err
        assert re.search(f"{out / 'experts'}/. is of what is in {out / 'experts'}", error)
        assert sorted(out.rglob("*")) == before


def test_a_base_that_is_a_mixture_already() -> None:
    """It was told to have no class of a mixture."""
    with pytest.raises(LorryError, match="'mixtral' is a mixture of experts already"):
        describe_moe({"model_type": "mixtral"}, experts=2, top_k=2, normalize=True)
