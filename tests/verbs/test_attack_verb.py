"""`lorry attack`: relearning against a plain PEFT loop, rounding against transformers with rounded
weights, other words against plain loops, and each bad input one error with nothing written.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import yaml

from lorry.adapters.quantization.codes import NF4_LEVELS
from lorry.config import EvalSettings, build_settings
from lorry.config.unlearning.attack import AttackSettings
from lorry.evaluate.unlearning import attacks
from lorry.verbs.attack import choose_forget_set
from lorry.verbs.unlearning_suite import choose_forget_split
from tests.support.padded import PaddedModel
from tests.support.ranked import SHORT_JAILBREAK
from tests.support.tofuworld import perturbed_row, read_json
from tests.support.verbworld import PEOPLE, World, lorry, write_rows

SETTINGS = ("dtype=float32", "threads=1")
NEW = [perturbed_row(name, "Oslo") for name in ("Nils", "Vera")]


def learnt_rows() -> list[dict[str, Any]]:
    """What the world's run knows by heart, with wrong answers and other words."""
    towns = [row["answer"].split()[-1].rstrip(".") for row in PEOPLE]
    return [
        perturbed_row(row["question"].split()[2], town)
        for row, town in zip(PEOPLE, towns, strict=True)
    ]


@pytest.fixture(scope="module")
def forget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "forget.jsonl", learnt_rows())


@pytest.fixture(scope="module")
def unlearned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a run: the world's, then a few steps the other way."""
    folder = tmp_path_factory.mktemp("unlearned")
    rows = write_rows(folder / "retain.jsonl", [{k: row[k] for k in PEOPLE[0]} for row in NEW])
    settings = (
        f"model={world.run}", f"forget={world.rows}", f"retain={rows}", "method=GradDiff", "r=4",
        "lora_alpha=8", "learning_rate=1e-2", "max_steps=6", "per_device_train_batch_size=2", "save_strategy=no",
        f"output_dir={folder / 'run'}",
    )  # fmt: skip
    assert lorry("unlearn", *settings, *SETTINGS) == 0
    return folder / "run"


def knowledge(model: PaddedModel, rows: list[dict[str, Any]]) -> dict[str, float]:
    """ES, probability and truth ratio of rows, by plain loops."""
    strengths, probabilities, ratios = [], [], []
    for row in rows:
        (one,) = model.answers([(row["question"], row["answer"])])
        hit = one["hit"][:-1]
        first = next((k for k in range(len(hit)) if hit[k:].all()), len(hit))
        strengths.append(1 - first / len(hit))
        probabilities.append(math.exp(one["logp"].mean()))
        texts = [row["paraphrased_answer"], *row["perturbed_answer"]]
        good, *wrong = (
            float(-m["logp"].mean()) for m in model.answers([(row["question"], t) for t in texts])
        )
        ratios.append(math.exp(good - numpy.mean(wrong)))
    return {
        "extraction_strength": float(numpy.mean(strengths)),
        "probability": float(numpy.mean(probabilities)),
        "truth_ratio": float(numpy.mean([min(t, 1 / t) for t in ratios])),
        "truth_ratio_prob_mean": float(numpy.mean([1 / (1 + t) for t in ratios])),
    }


class Merged(PaddedModel):
    """transformers with the start, then the run's own adapter, folded into its weights by PEFT."""

    def __init__(self, world: World, run: Path, folder: Path) -> None:
        super().__init__(world.base, world.run)
        start = self.model.merge_and_unload()
        folder.mkdir()
        shutil.copy(run / "adapter_model.safetensors", folder)
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        # written anew: ours says that no other reader may take it for a whole adapter
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM"
        ).save_pretrained(folder)
        self.model = peft.PeftModel.from_pretrained(start, str(folder)).merge_and_unload()
        self.model.eval()


def test_relearning_is_that_of_a_plain_loop(
    world: World, unlearned: Path, forget: Path, tmp_path: Path
) -> None:
    """The unlearned model merged, an adapter of PEFT's with our first values, torch's AdamW."""
    run = Path(shutil.copytree(unlearned, tmp_path / "run"))
    asked = ("relearn_share=0.5", "relearn_steps=[0,1,4]", "learning_rate=5e-3", "r=4")
    oracle = f"oracle={world.base}"
    assert lorry("attack", run, "relearn", f"forget={forget}", *asked, oracle, *SETTINGS) == 0
    part = read_json(run / "evals" / "attacks.json")["relearn"]
    assert (part["rows_relearnt"], part["rows_measured"]) == (2, 2)

    rows = learnt_rows()
    whole = attacks.knowledge_set("x", [_row(row) for row in rows])
    chosen, others = attacks.split_rows(whole, 0.5, 0)
    questions = [row.question for row in chosen.rows]
    assert len(set(questions) | {row.question for row in others.rows}) == 4
    taught = [row for row in rows if row["question"] in questions]
    measured = [row for row in rows if row["question"] not in questions]
    models = {"run": Merged(world, unlearned, tmp_path / "peft")}
    models["oracle"] = PaddedModel(world.base, None)
    for side, model in models.items():
        points = {0: knowledge(model, measured)} | relearn_by_peft(model, taught, measured)
        for point in part["curves"][side]:
            truth = points[point["step"]]
            found = {name: point[name] for name in truth}
            assert found == pytest.approx(truth, rel=2e-3, abs=1e-6), (side, point["step"])
    curves = part["curves"]
    assert curves["run"][-1]["loss"] < curves["run"][1]["loss"]
    rises = [c[-1]["probability"] - c[0]["probability"] for c in (curves["oracle"], curves["run"])]
    expected = 1.0 if rises[1] <= 0 else min(1.0, max(0.0, rises[0] / rises[1]))
    assert part["robustness"]["probability"] == pytest.approx(expected)


def _row(values: dict[str, Any]) -> Any:
    from lorry.data.reading.rows import DataRow

    return DataRow(values, "x:1")


def relearn_by_peft(
    model: PaddedModel, taught: list[dict[str, Any]], measured: list[dict[str, Any]]
) -> dict[int, dict[str, float]]:
    from lorry.adapters.attach import attach, get_bank
    from lorry.adapters.spec import LoraSpec
    from lorry.models.loading.load import load_model

    folder = Path(model.words.name_or_path)
    ours = load_model(str(folder), dtype="float32", add_note=print).model
    attach(ours, LoraSpec(r=4), "relearn", seed=0)
    first = {path: slot.A.detach() for path, slot in get_bank(ours)["relearn"].slots.items()}
    names = sorted({path.rpartition(".")[2] for path in first})
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")
    model.model = peft.get_peft_model(model.model, config)
    matrices = {n: p for n, p in model.model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, matrix in matrices.items():
            if "lora_A" in name:
                matrix.copy_(first[name.split("base_model.model.")[1].split(".lora_A")[0]])
    optimizer = torch.optim.AdamW(list(matrices.values()), lr=5e-3, weight_decay=0.0)
    points = {}
    for step in range(1, 5):
        total, tokens = 0.0, 0
        for row in taught:
            prompt = model.prompt(row["question"])
            right = model.words(row["answer"] + "<|im_end|>").input_ids
            logits = model.model(input_ids=torch.tensor([prompt + right])).logits[0]
            kept = logits[len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(
                kept, torch.tensor(right), reduction="sum"
            )
            tokens += len(right)
        optimizer.zero_grad()
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(list(matrices.values()), 1.0)
        optimizer.step()
        if step in (1, 4):
            points[step] = knowledge(model, measured)
    return points


def restored(matrix: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight rounded, by numpy and by nearest levels one at a time."""
    values = matrix.double().numpy()
    if kind == "int8":
        scale = numpy.abs(values).max(1, keepdims=True) / 127
        return torch.from_numpy(numpy.rint(values / scale) * scale).float()
    flat, out = values.reshape(-1), []
    for at in range(0, len(flat), 64):
        block = flat[at : at + 64]
        most = numpy.abs(block).max()
        nearest = numpy.abs(block[:, None] / most - numpy.array(NF4_LEVELS)).argmin(1)
        out.append(numpy.array(NF4_LEVELS)[nearest] * most)
    return torch.from_numpy(numpy.concatenate(out).reshape(values.shape)).float()


def test_rounding_is_that_of_transformers_with_rounded_weights(
    world: World, unlearned: Path, forget: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(unlearned, tmp_path / "run"))
    assert lorry("attack", run, "quantize", f"forget={forget}", *SETTINGS) == 0
    part = read_json(run / "evals" / "attacks.json")["quantize"]
    merged = Merged(world, unlearned, tmp_path / "peft")
    weights = {n: p.detach().clone() for n, p in merged.model.named_parameters()}
    for kind in ("none", "int8", "nf4"):
        for name, parameter in merged.model.named_parameters():
            if "_proj" in name and kind != "none":
                parameter.data.copy_(restored(weights[name], kind))
        found = part["values"]["run"][kind]
        assert found == pytest.approx(knowledge(merged, learnt_rows()), rel=2e-3), kind
    assert part["values"]["run"]["nf4"] != part["values"]["run"]["int8"]
    before, after = (part["values"]["run"][kind]["probability"] for kind in ("none", "nf4"))
    assert part["robustness"]["probability"] == pytest.approx(min(1.0, before / after))


def test_a_plain_model_is_rounded_too(world: World, forget: Path, tmp_path: Path) -> None:
    assert lorry("attack", world.base, "quantize", f"forget={forget}", *SETTINGS) == 2
    out = f"output_dir={tmp_path / 'out'}"
    assert lorry("attack", world.base, "quantize", f"forget={forget}", out, *SETTINGS) == 0
    found = read_json(tmp_path / "out" / "attacks.json")["quantize"]["values"]["run"]
    plain = PaddedModel(world.base, None)
    for name, parameter in plain.model.named_parameters():
        if "_proj" in name:
            parameter.data.copy_(restored(parameter.detach(), "nf4"))
    assert found["nf4"] == pytest.approx(knowledge(plain, learnt_rows()), rel=2e-3)


def test_other_words_are_asked_of_run_start_and_oracle(
    world: World, unlearned: Path, forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "JAILBREAK", SHORT_JAILBREAK)
    run = Path(shutil.copytree(unlearned, tmp_path / "run"))
    asked = (f"forget={forget}", f"oracle={world.base}", "limit=1", "max_new_tokens=4")
    assert lorry("attack", run, "rephrase", *asked, *SETTINGS) == 0
    values = read_json(run / "evals" / "attacks.json")["rephrase"]["values"]
    models = {
        "run": Merged(world, unlearned, tmp_path / "peft"),
        "start": PaddedModel(world.base, world.run),
        "oracle": PaddedModel(world.base, None),
    }
    wordings = {
        "question": lambda row: row["question"],
        "paraphrased_question": lambda row: row["paraphrased_question"],
        "format": lambda row: attacks.FORMAT.format(question=row["question"]),
        "jailbreak": lambda row: attacks.JAILBREAK.format(question=row["question"]),
    }
    assert set(values) == set(models)
    for side, model in models.items():
        assert set(values[side]) == set(wordings)
        for wording, words in wordings.items():
            pairs = [(words(row), row["answer"]) for row in learnt_rows()]
            truth = numpy.mean([math.exp(one["logp"].mean()) for one in model.answers(pairs)])
            assert values[side][wording]["probability"] == pytest.approx(truth, rel=1e-3)
    knows, never = (values[side]["question"]["probability"] for side in ("start", "oracle"))
    assert knows > 0.3 > never


def test_parts_add_up_and_another_models_leave(
    world: World, unlearned: Path, forget: Path, tmp_path: Path
) -> None:
    """R, Q and their harmonic mean; a part of other rows goes."""
    out = (f"output_dir={tmp_path / 'out'}", *SETTINGS)
    few = ("relearn_steps=[0,2]", f"oracle={world.base}", "learning_rate=1e-2")
    named = ("attack", unlearned, f"forget={forget}", *out)
    assert lorry(*named[:2], "relearn", *named[2:], *few) == 0
    assert lorry(*named[:2], "quantize", *named[2:]) == 0
    found = read_json(tmp_path / "out" / "attacks.json")
    assert {"relearn", "quantize", "robustness"} < set(found)
    for name, values in found["robustness"].items():
        r, q = found["relearn"]["robustness"][name], found["quantize"]["robustness"][name]
        assert (values["R"], values["Q"]) == (r, q)
        assert values["mean"] == pytest.approx(2 * r * q / (r + q) if r + q else 0.0)
    other = write_rows(tmp_path / "other.jsonl", NEW)
    assert lorry("attack", unlearned, "quantize", f"forget={other}", *out) == 0
    assert set(read_json(tmp_path / "out" / "attacks.json")) == {"written_by", "quantize"}


def short(field: str) -> list[dict[str, Any]]:
    rows = learnt_rows()
    rows[1][field] = []
    return rows


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        (["relearn"], short("perturbed_answer"), "forget.jsonl:2: no wrong answers"),
        (["relearn"], learnt_rows()[:1], "relearning trains on some and measures the others"),
        (["rephrase"], short("paraphrased_question"), "no text in 'paraphrased_question'"),
        (["quantize"], [], "forget.jsonl"),
        (["relearn", "relearn_steps=[5,10]"], learnt_rows(), "has to start at 0"),
        (["quantize", "r=4"], learnt_rows(), "r is not used by quantize"),
        (["quantize", "batch_size=4"], learnt_rows(), "it is a setting of relearn, rephrase"),
        (["relearn", "limit=4"], learnt_rows(), "it is a setting of rephrase"),
        (["relearn", "forget_split=forget05"], learnt_rows(), "keep one"),
        (["relearn", "oracle=nowhere/at-all/x"], learnt_rows(), "nowhere"),
        (["relern"], learnt_rows(), "relearn"),
        (["relearn", "again"], learnt_rows(), "unexpected word"),
        ([], learnt_rows(), "attack"),
    ],
)
def test_bad_input_is_one_error(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    words: list[str], rows: list[dict[str, Any]], message: str,
) -> None:  # fmt: skip
    forget, out = write_rows(tmp_path / "forget.jsonl", rows), tmp_path / "out"
    kind, *settings = words or [""]
    given = [kind] if kind else []
    given += [word for word in settings if "=" not in word]
    more = [word for word in settings if "=" in word]
    code = lorry(
        "attack", world.run, *given, f"forget={forget}", f"output_dir={out}", *SETTINGS, *more
    )
    assert code in (2, 3, 4)
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not out.exists()


def test_somebody_elses_file_stays(
    world: World, forget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "attacks.json"
    theirs.write_text(json.dumps({"mine": 1}))
    assert (
        lorry(
            "attack", world.run, "quantize", f"forget={forget}", f"output_dir={tmp_path}", *SETTINGS
        )
        == 2
    )
    assert "attacks.json" in capfd.readouterr().err
    assert theirs.read_text() == '{"mine": 1}'


@pytest.fixture(scope="module")
def several(unlearned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two adapters, as jobs leave it."""
    folder = tmp_path_factory.mktemp("several") / "run"
    for name in ("a", "b"):
        shutil.copytree(unlearned, folder / name)
    return folder


@pytest.mark.parametrize("attack", ["quantize", "relearn"])
def test_one_of_several_adapters_is_chosen_by_name(
    attack: str, several: Path, unlearned: Path, forget: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(several, tmp_path / "run"))
    own = {
        "quantize": (),
        "relearn": ("relearn_share=0.5", "relearn_steps=[0,1]", "r=2"),
    }[attack]
    given = (attack, f"forget={forget}", *own, *SETTINGS)
    assert lorry("attack", run, *given, "adapter=b") == 0
    assert lorry("attack", unlearned, *given, f"output_dir={tmp_path / 'alone'}") == 0
    found = read_json(run / "evals/b/attacks.json")
    assert found == read_json(tmp_path / "alone/attacks.json")
    assert [path.name for path in run.iterdir()].count("evals") == 1


def test_several_adapters_and_none_or_no_such_named(
    several: Path, world: World, forget: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("quantize", f"forget={forget}", *SETTINGS)
    out = f"output_dir={tmp_path}"
    for words, message in {
        (
            several,
            *given,
        ): "has several adapters (a, b), and one is attacked at a time; choose it, such as adapter=a",
        (several, *given, "adapter=c"): "has no such adapter; it has a, b",
        (world.base, *given, out, f"oracle={several}"): f"such as oracle={several / 'a'}",
        (world.base, *given, out, f"adapter={several}"): f"such as adapter={several / 'a'}",
    }.items():
        assert lorry("attack", *words) == 2, words
        assert message in capsys.readouterr().err
    assert not (several / "evals").exists()


def test_rows_that_the_run_was_never_to_forget_are_not_attacked_unasked(
    unlearned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a forget set the run's own split of TOFU; a run of other rows wants one named."""
    out = f"output_dir={tmp_path / 'out'}"
    assert lorry("attack", unlearned, "relearn", out) == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "was to forget" in told
    assert "which is no split of TOFU; give forget=FILE" in told
    assert not (tmp_path / "out").exists()

    run = shutil.copytree(unlearned, tmp_path / "run")
    described = yaml.safe_load((run / "run.yaml").read_text())
    described["unlearn"]["forget"] = "tofu:forget05"
    described["jobs"] = [{"name": "ada", "unlearn": {"forget": "tofu:forget01"}}, {"name": "bo"}]
    (run / "run.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    given = {"attack": "relearn", "local": {"tofu": "t"}}
    for model, more, split in (
        ({"name": str(run)}, {}, "forget05"),
        ({"name": str(run)}, {"forget_split": "forget10"}, "forget10"),  # asked for
        ({"name": str(run), "adapter": "ada"}, {}, "forget01"),
        ({"name": str(run / "ada")}, {}, "forget01"),
        ({"name": str(run / "bo")}, {}, "forget05"),
        ({"name": str(tmp_path / "no-run")}, {}, "forget10"),
    ):
        settings = build_settings(AttackSettings, {"model": model, **given, **more}, print)
        assert choose_forget_set(settings).forget_split == split, (model, more)
        asked = build_settings(EvalSettings, {"model": model, "suite": "tofu", **more}, print)
        assert choose_forget_split(asked).forget_split == split, (model, more)
    muse = build_settings(EvalSettings, {"model": {"name": str(run)}, "suite": "muse"}, print)
    assert choose_forget_split(muse) is muse.suite
