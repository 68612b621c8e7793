"""`lorry moe` with a router of the whole sequence: prototypes and a classifier of prompts, the
mixture's directory, who reads it, and what is refused. Float32.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorry
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.config.moe import RouterConfig
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ModelError
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import PackedInput, prompt_gates
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from lorry.verbs.mixture.stages import mixture_damage
from tests.support.tofuworld import read_json, tofu_rows, write_tofu
from tests.support.verbworld import lorry as run_lorry
from tests.support.verbworld import model_directory, write_rows

NAMES = ("Mara", "Tobias", "Ilse", "Juno", "Ada", "Bo", "Cleo", "Dirk", "Eva", "Finn")
PLACES = [{"question": f"Where does {n} live?", "answer": f"{n} lives in Oslo."} for n in NAMES]
SUMS = [
    {"question": f"What is {n} and {n + 2}?", "answer": f"It is {2 * n + 2}."} for n in range(10)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two trained experts in `mix/experts`, and prototypes over them in `mix`; not to be
    changed."""
    folder = tmp_path_factory.mktemp("prompts")
    base = model_directory(folder / "base")
    write_rows(folder / "places.jsonl", PLACES)
    write_rows(folder / "sums.jsonl", SUMS)
    words = [
        f"model={base}",
        "dtype=float32",
        "r=4",
        "max_length=128",
        "max_steps=2",
        "learning_rate=1e-2",
        "save_strategy=no",
        "threads=1",
        f"experts=[{{name: places, data: {folder}/places.jsonl}}, {{name: sums, data: {folder}/sums.jsonl}}]",
        f"output_dir={folder / 'mix'}",
    ]
    assert (
        run_lorry("moe", *words, "router={kind: prototype, prompts: 6, layer: 0, pooling: mean}")
        == 0
    )
    return folder


def again(made: Path, output: Path, *words: str) -> int:
    """Another router over the same experts, which are brought along."""
    experts = ", ".join(
        f"{{name: {n}, adapter: {made / 'mix' / n}, data: {made / n}.jsonl}}"
        for n in ("places", "sums")
    )
    return run_lorry(
        "moe", f"model={made / 'base'}", "dtype=float32", "threads=1", f"experts=[{experts}]",
        f"output_dir={output}", *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def classifier(made: Path) -> Path:
    """A classifier over the same experts; not to be changed."""
    folder = made / "classifier"
    settings = "router={kind: sequence, hidden: [8], layer: final, pooling: mean, train: {num_train_epochs: 20, learning_rate: 1e-2}}"
    assert again(made, folder, settings) == 0
    return folder


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def prompt(tokenizer: object, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]


def test_prototypes_are_means_of_hidden_states(made: Path) -> None:
    """Of transformers' hidden states behind the first layer over prompts as chat has them, in the base; the experts are
    those that were trained, bit for bit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = made / "mix"
    said = json.loads((run / "router" / "router.json").read_text())
    assert (said["kind"], said["top_k"], said["pooling"], said["width"]) == (
        "prototype",
        1,
        "mean",
        32,
    )
    found = load_file(run / "router" / "router.safetensors")["prototypes"]
    base = AutoModelForCausalLM.from_pretrained(made / "base").float()
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    for k, rows in enumerate((PLACES, SUMS)):
        ids = [prompt(tokenizer, row["question"]) for row in rows]
        with torch.no_grad():
            states = [
                base(torch.tensor([one]), output_hidden_states=True).hidden_states[1][0].mean(0)
                for one in ids
            ]
        # six of ten by the seed: the mean is that of some six
        picked = [i for i, s in enumerate(states) if _holds(found[k], states, i)]
        assert len(picked) == 6
    for name in ("places", "sums"):
        one, two = (
            load_file(p / name / "adapter_model.safetensors") for p in (run, run / "experts")
        )
        assert all(torch.equal(one[key], two[key]) for key in two)


def _holds(mean: torch.Tensor, states: list[torch.Tensor], at: int) -> bool:
    """Whether a state is one of the six that have this mean: the least-squares weights are 1/6 or 0."""
    weights = torch.linalg.lstsq(torch.stack(states).T.double(), mean.double()).solution
    assert float((torch.stack(states).T.double() @ weights - mean.double()).norm()) < 1e-4
    return float(weights[at]) > 1 / 12


def test_each_prompt_gets_its_expert(made: Path, classifier: Path) -> None:
    """By either kind: greedy answers are those of the expert whose kind of question it is, which are
    the argmax of whole forwards; in batches, with rows that leave and enter."""
    for run in (made / "mix", classifier):
        model, tokenizer = lorry.load(run)
        mix = get_bank(model).active
        assert mix.sequence_router is not None
        asked = [*PLACES[:3], *SUMS[:3]]
        experts = ["places"] * 3 + ["sums"] * 3
        ids = [prompt(tokenizer, row["question"]) for row in asked]
        params = [SamplingParams(max_new_tokens=n) for n in (2, 4, 3, 4, 2, 3)]
        answers = generate_completions(model, ids, params, batch_rows=2)
        for one, name, answer in zip(ids, experts, answers, strict=True):
            tokens = list(one)
            for token in answer.tokens:
                call = AdapterContext(Mix.one(name))
                with torch.no_grad():
                    hidden = model.hidden(PackedInput.of([tokens]), call).last
                    assert hidden is not None
                    assert int(model.logits(hidden[-1:], call).argmax()) == token
                tokens.append(token)


def test_the_record_of_a_classifier(classifier: Path) -> None:
    """7, 2 and 1 prompts of each expert of ten; the best epoch has the largest F1."""
    said = json.loads((classifier / "router" / "router.json").read_text())
    assert said["hidden"] == [8]
    training = said["training"]
    assert training["prompts"] == {"train": 12, "val": 4, "test": 4}
    scores = [(e["val_f1"], -e["val_loss"]) for e in training["epochs"]]
    assert training["best_epoch"] == scores.index(max(scores)) + 1
    assert training["test"]["confusion"] == {"places": [2, 0], "sums": [0, 2]}
    assert sorted(load_file(classifier / "router" / "router.safetensors")) == [
        "0.bias", "0.weight", "1.bias", "1.weight",
    ]  # fmt: skip


def test_a_router_is_made_twice_bit_for_bit(made: Path, classifier: Path, tmp_path: Path) -> None:
    said = json.loads((classifier / "router" / "router.json").read_text())
    settings = "router={kind: sequence, hidden: [8], layer: final, pooling: mean, train: {num_train_epochs: 20, learning_rate: 1e-2}}"
    assert again(made, tmp_path / "two", settings) == 0
    one, two = (
        load_file(p / "router" / "router.safetensors") for p in (classifier, tmp_path / "two")
    )
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert json.loads((tmp_path / "two" / "router" / "router.json").read_text()) == said


def test_the_middle_layer_is_read_where_nothing_is_said(made: Path, tmp_path: Path) -> None:
    assert again(made, tmp_path / "default", "router.kind=prototype") == 0
    said = json.loads((tmp_path / "default" / "router" / "router.json").read_text())
    assert (said["layer"], said["pooling"]) == (1, "last")
    final = "router={kind: prototype, layer: final}"
    assert again(made, tmp_path / "final", final) == 0
    assert json.loads((tmp_path / "final" / "router" / "router.json").read_text())["layer"] is None


def test_the_verbs_read_it(
    classifier: Path,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mixture's loss of each of mixed rows is that of the row's own expert; chat switches."""
    rows = write_rows(tmp_path / "rows.jsonl", [*PLACES[:2], *SUMS[:2]])
    mix, other = copied(made / "mix", tmp_path / "mix"), copied(classifier, tmp_path / "classifier")
    for run in (mix, other):
        table = tmp_path / "results.json"
        assert (
            run_lorry("eval", run, f"data={rows}", "max_new_tokens=2", f"output_dir={table}") == 0
        )
        asked = json.loads(table.read_text())["predictions"]
        for name, row in zip(["places", "places", "sums", "sums"], asked, strict=True):
            assert row["mixture"]["loss"] == pytest.approx(row[name]["loss"], rel=1e-6)
            assert row["mixture"]["answer"] == row[name]["answer"]
            assert row[name]["loss"] < row["base"]["loss"]
        typed = "Where does Bo live?\n/router places=1\nWhat is 1 and 3?\n/router off\n/router on\n"
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        assert run_lorry("chat", run, "max_new_tokens=2") == 0
        assert "the mixture of all experts" in capsys.readouterr().err
    assert run_lorry("report", mix) == 0
    assert "prototype router over 2 experts" in " ".join(capsys.readouterr().err.split())
    assert run_lorry("doctor", other) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "sequence, level delta, right for 100.0% of the test prompts" in said
    assert "places, sums: intact" in said
    change_expert(other)
    assert run_lorry("doctor", other) == 4
    assert "not the expert 'sums'" in " ".join(capsys.readouterr().err.split())


def change_router(**change: object) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        file = run / "router" / "router.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    return apply


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        file = run / "router" / "router.safetensors"
        save_file({k: change(v).contiguous() for k, v in load_file(file).items()}, file)

    return apply


def change_expert(run: Path) -> None:
    file = run / "sums" / "adapter_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_expert, "not the expert 'sums' that the router was trained for"),
        (change_router(top_k=3), "1 to 2 of 2"),
        (change_router(layer=2), "layers are 0 to 1"),
        (change_router(pooling="max"), "mean or last"),
        (change_router(temperature=0.0), "above 0"),
        (change_router(width=31), "hidden states have 32"),
        (change_router(width=None), "hidden states have 32"),
        (change_router(input="both"), "no input"),
        (change_router(base_digest="0" * 64), "other base weights"),
        (change_weights(lambda w: w[..., :-1]), r"float32 \("),
        (change_weights(lambda w: w * float("nan")), "NaN"),
        (change_weights(lambda w: w.half()), "float16"),
        (lambda run: (run / "router" / "router.safetensors").unlink(), "is missing"),
        (lambda run: (run / "router" / "router.safetensors").write_bytes(b"\x80\x04"), "damaged"),
    ],
)
def test_a_router_of_other_experts_is_refused(
    damage: Callable[[Path], None], words: str, made: Path, classifier: Path, tmp_path: Path
) -> None:
    for number, whole in enumerate((made / "mix", classifier)):
        run = copied(whole, tmp_path / str(number))
        damage(run)
        with pytest.raises(ModelError, match=words):
            lorry.load(run)


@pytest.fixture(scope="module")
def tuned(made: Path) -> Path:
    """A classifier with a LoRA of its own over the same experts; not to be changed."""
    words = "router={kind: sequence, layer: 0, top_k: 2, lora: {r: 2}, train: {max_steps: 4, eval_steps: 2}}"
    assert again(made, made / "tuned", words) == 0
    return made / "tuned"


def test_a_classifier_with_a_lora_of_its_own(
    tuned: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run holds every contract and chooses by F1; class scores of what is read back are those of
    transformers with PEFT's reading of the files; answers are the argmax of whole forwards under the
    gates that these scores make."""
    contracts = json.loads((tuned / "contracts.json").read_text())
    assert {c["status"] for c in contracts} == {"held"}
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_f1" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert all("eval_perplexity" not in line and "eval_nll_sums" in line for line in evaluated)
    said = json.loads((tuned / "router" / "router.json").read_text())
    assert said["training"]["prompts"] == {"train": 12, "val": 4, "test": 4}
    best = max(line["eval_f1"] for line in evaluated)
    assert said["training"]["val"]["f1"] == pytest.approx(best, abs=1e-6)
    assert load_file(tuned / "router" / "router.safetensors").keys() == {"0.weight", "0.bias"}
    receipt = json.loads((tuned / "receipt.json").read_text())
    assert "router/prompt_adapter/adapter_model.safetensors" in receipt["router"]

    model, tokenizer = lorry.load(tuned)
    router = get_bank(model).active.sequence_router
    assert router is not None
    twin = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made / "base").float(),
        tuned / "router" / "prompt_adapter",
    )
    weights = load_file(tuned / "router" / "router.safetensors")
    ids = [prompt(tokenizer, row["question"]) for row in (*PLACES[:3], *SUMS[:2])]
    with torch.no_grad():
        states = [
            twin(torch.tensor([one]), output_hidden_states=True).hidden_states[1][0, -1]
            for one in ids
        ]
    scores = torch.stack(states) @ weights["0.weight"].T + weights["0.bias"]
    gates = scores.softmax(-1)  # of two experts both
    torch.testing.assert_close(prompt_gates(model, ids, router), gates, rtol=1e-5, atol=1e-5)

    answers = generate_completions(model, ids, SamplingParams(max_new_tokens=3), batch_rows=2)
    for one, own, answer in zip(ids, gates.tolist(), answers, strict=True):
        call = AdapterContext(Mix.constants(dict(zip(("places", "sums"), own, strict=True))))
        for n, token in enumerate(answer.tokens):
            with torch.no_grad():
                hidden = model.hidden(PackedInput.of([[*one, *answer.tokens[:n]]]), call).last
                assert hidden is not None
                assert int(model.logits(hidden[-1:], call).argmax()) == token
    # scores read the same gates: those of what stands before the answer
    batch = collate([TokenizedExample([*ids[0], 5, 6], [0.0] * len(ids[0]) + [1.0, 1.0])])
    call = AdapterContext(
        Mix.constants(dict(zip(("places", "sums"), gates[0].tolist(), strict=True)))
    )
    want = {"s": TokenScore(log_prob)}
    routed, plain = (
        evaluate_wants(model, batch, want, which)["s"]
        for which in (AdapterContext(get_bank(model).active), call)
    )
    torch.testing.assert_close(routed, plain, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert run_lorry("doctor", tuned) == 0
    assert "with a LoRA of its own" in " ".join(capsys.readouterr().out.split())


def remove_adapter(run: Path) -> None:
    shutil.rmtree(run / "router" / "prompt_adapter")


def change_adapter(run: Path) -> None:
    file = run / "router" / "prompt_adapter" / "adapter_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_adapter, "router/prompt_adapter: not the adapter that the router was trained with"),
        (remove_adapter, "router/prompt_adapter is missing"),
        (change_router(adapter_sha256=None), "knows no adapter of the router"),
        (change_router(kind="prototype", hidden=[]), "kind 'prototype' has no adapter of its own"),
        (change_weights(lambda w: w * 2), "not the weights that router.json was written with"),
        (change_expert, "not the expert 'sums'"),
    ],
)
def test_a_router_of_another_lora_is_refused(
    damage: Callable[[Path], None], words: str, tuned: Path, tmp_path: Path
) -> None:
    run = copied(tuned, tmp_path / "run")
    damage(run)
    with pytest.raises(ModelError, match=words):
        lorry.load(run)
    if "kind" not in words:
        # and `lorry moe` would make it again
        assert words in str(mixture_damage(run))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["router={kind: sequence, val_split: 0.2}"], "together 1.05; they must add to 1"),
        (["router={kind: sequence, train: {max_steps: 3}}"], "router.train.max_steps"),
        (["router={kind: prototype, lora: {r: 8}}"], "router.lora is for router.kind=sequence"),
        (["router={kind: sequence, lora: {r: auto}}"], "r=auto is of experts"),
        (["router={kind: sequence, lora: {rank: 8}}"], "router.lora: has no setting 'rank'"),
        (["router={kind: sequence, lora: {r: 0}}"], "router.lora: r: Input should be"),
        (
            ["router={kind: sequence, lora: {r: 2, use_dora: true}}"],
            "router.lora: use_dora: a classifier's own adapter is plain LoRA",
        ),
        (
            ["router={kind: sequence, lora: {r: 2, init_lora_weights: pissa}}"],
            "init_lora_weights: a classifier's own adapter begins at random",
        ),
        (["router={kind: sequence, dropout: 0.2, lora: {r: 2}}"], "give lora_dropout there"),
        (
            ["router={kind: sequence, layer: 0, lora: {r: 2, layers_to_transform: 1}}"],
            "the output of layer 0 is read",
        ),
        (["router={kind: sequence, lora: {r: 2}, train: {steps: 1}}"], "router.train.steps"),
        (["router={kind: sequence, prompts: 4}"], "router.prompts is for router.kind=prototype"),
        (["router={kind: prototype, hidden: [8]}"], "router.hidden is for router.kind="),
        (["router={kind: prototype, train: {seed: 3}}"], "kind=prototype trains nothing"),
        (["router={kind: prototype, label_loss: 0.5}"], "router.label_loss is for router.kind="),
        (["router={kind: prototype, top_k: 3}"], "there are 2 experts"),
        (["router={kind: prototype, layer: 7}"], "layers are 0 to 1"),
    ],
)
def test_settings_that_cannot_be(
    words: list[str], says: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(made, tmp_path / "out", *words) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "router").exists()


@pytest.mark.parametrize(
    ("rows", "words", "code", "says"),
    [
        (
            SUMS[:2],
            "router.kind=sequence",
            3,
            "expert 'sums' has 2 prompts, of which router.val_split",
        ),
        (
            [{"text": "A tale of sums. " * 4}],
            "router.kind=prototype",
            3,
            "none of its 1 rows has a prompt",
        ),
        ([], "router.kind=prototype", 3, "no usable row"),
        (PLACES, "router.kind=prototype", 2, "nothing tells them apart"),
    ],
)
def test_rows_that_make_no_router(
    rows: list[dict[str, str]],
    words: str,
    code: int,
    says: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    experts = (
        f"experts=[{{name: places, adapter: {made / 'mix' / 'places'}, data: {made}/places.jsonl}}, "
        f"{{name: sums, adapter: {made / 'mix' / 'sums'}, data: {file}}}]"
    )
    out = tmp_path / "out"
    assert again(made, out, experts, words) == code
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (out / "router").exists()


def test_one_expert_chooses_by_itself() -> None:
    """top_k=1 needs no gradient here; of a router of tokens it is still refused."""
    assert RouterConfig.model_validate({"kind": "prototype"}).top_k == 1
    assert RouterConfig.model_validate({"kind": "sequence", "top_k": 2}).top_k == 2
    assert RouterConfig().top_k == 2
    with pytest.raises(ValueError, match="no gradient"):
        RouterConfig(top_k=1)


def test_a_suite_asks_the_mixture_too(made: Path, tmp_path: Path) -> None:
    """It asked each expert alone. A prompt has one of them here, so that each row's value is that
    expert's; and gradients are asked of experts that are frozen."""
    run = copied(made / "mix", tmp_path / "mix")
    tofu = write_tofu(tmp_path / "tofu")
    words = ["suite=tofu", "forget_split=forget05", "dtype=float32", "threads=1"]
    named = "metrics=[forget_Q_A_Prob,mia_gradnorm]"
    assert run_lorry("eval", run, *words, f"local.tofu={tofu}", named) == 0
    found = {
        name: read_json(run / "evals" / name / "TOFU_EVAL.json")
        for name in ("places", "sums", "mixture")
    }
    model, tokenizer = lorry.load(run)
    router = get_bank(model).active.sequence_router
    assert router is not None
    rows = tofu_rows()["forget05_perturbed"]
    gates = prompt_gates(model, [prompt(tokenizer, row["question"]) for row in rows], router)
    for number, row in enumerate(gates.tolist()):
        assert sorted(row) == [0.0, 1.0]
        own, mixed = (
            found[name]["forget_Q_A_Prob"]["value_by_index"][str(number)]["prob"]
            for name in (router.adapters[row.index(1.0)], "mixture")
        )
        assert mixed == pytest.approx(own, rel=1e-6)
    assert 0 <= found["mixture"]["mia_gradnorm"]["agg_value"] <= 1
