"""`lorry moe`: experts in one run, a router over them, the mixture's directory and who reads it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorry
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.peft.start_files import adapter_digest
from lorry.adapters.routing.files import read_router_record
from lorry.config import RouterRunConfig, parse_settings
from lorry.config.moe import RouterConfig, check_router
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError, ModelError
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.hub.files import collect_upload
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.loading.open import open_model
from lorry.runs.read import read_run
from lorry.runs.summary import describe_run_subject
from lorry.train.session import train_run
from tests.support.verbworld import PEOPLE, World, model_directory, write_rows
from tests.support.verbworld import lorry as run_lorry

MLP = "[gate_proj, up_proj, down_proj]"


def description(folder: Path, base: Path, **router: object) -> Path:
    """A description of two experts, and what it reads."""
    rows = [
        write_rows(folder / f"{name}.jsonl", PEOPLE[at : at + 2])
        for name, at in (("a", 0), ("b", 2))
    ]
    settings = {"top_k": 2, "train": {"max_steps": 10, "save_steps": 4}, **router}
    file = folder / "experts.yaml"
    file.write_text(f"""
model: {{name: {base}, dtype: float32}}
lora: {{target_modules: {MLP}, r: 4}}
data: {{max_length: 128}}
train: {{max_steps: 4, learning_rate: 1e-2, save_strategy: "no"}}
backend: {{threads: 1}}
experts: [{{name: one, data: {rows[0]}}}, {{name: two, data: {rows[1]}, r: 8}}]
router: {json.dumps(settings)}
output_dir: {folder / "mix"}
""")
    return file


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished mixture of two experts; not to be changed."""
    folder = tmp_path_factory.mktemp("mixture")
    assert run_lorry("moe", description(folder, model_directory(folder / "base"))) == 0
    return folder / "mix"


def copied(mixture: Path, to: Path) -> Path:
    shutil.copytree(mixture, to)
    return to


def test_what_a_mixture_is(mixture: Path) -> None:
    """Contracts hold, experts are those of the first stage bit for bit, and the load is logged."""
    contracts = json.loads((mixture / "contracts.json").read_text())
    assert {c["status"] for c in contracts} == {"held"}
    for name in ("one", "two"):
        trained = load_file(mixture / "experts" / name / "adapter_model.safetensors")
        kept = load_file(mixture / name / "adapter_model.safetensors")
        assert trained.keys() == kept.keys()
        assert all(torch.equal(trained[key], kept[key]) for key in kept)
    said = json.loads((mixture / "router" / "router.json").read_text())
    assert [e["name"] for e in said["experts"]] == ["one", "two"]
    weights = load_file(mixture / "router" / "router.safetensors")
    assert sorted(weights) == ["layers.0.mlp.weight", "layers.1.mlp.weight"]
    lines = [json.loads(line) for line in (mixture / "metrics.jsonl").read_text().splitlines()]
    load = lines[-1]["router"]["load"]
    # of two experts with top_k=2 every token has both: half of the slots each
    assert load["one"]["one"] == pytest.approx([0.5, 0.5])
    gates = lines[-1]["router"]["gate"]["two"]
    assert [a + b for a, b in zip(gates["one"], gates["two"], strict=True)] == pytest.approx(
        [1, 1], abs=1e-3
    )


def test_a_mixture_answers(mixture: Path) -> None:
    """Greedy answers of a batch are the argmax of whole forwards, and neighbours change nothing."""
    check_answers(mixture)


def check_answers(mixture: Path) -> None:
    model, tokenizer = lorry.load(mixture)
    mix = get_bank(model).active
    assert mix.router is not None
    prompts = [tokenizer.encode(p["question"]) for p in PEOPLE]
    asked: list[Mix | str | None] = [mix, "one", mix, None]
    params = SamplingParams(max_new_tokens=6)
    answers = generate_completions(model, prompts, params, adapters=asked, batch_rows=3)
    for prompt, own, answer in zip(prompts, asked, answers, strict=True):
        one = own if isinstance(own, Mix) else Mix.none() if own is None else Mix.one(own)
        tokens = list(prompt)
        for token in answer.tokens:
            call = AdapterContext(one)
            with torch.no_grad():
                hidden = model.hidden(PackedInput.of([tokens]), call).last
                assert int(model.logits(hidden[-1:], call).argmax()) == token
            tokens.append(token)


def test_a_mixture_is_read_by_the_verbs(
    mixture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copied(mixture, tmp_path / "mix")
    rows = write_rows(tmp_path / "rows.jsonl", PEOPLE)
    assert run_lorry("eval", run, f"data={rows}") == 0
    assert "mixture" in capsys.readouterr().out
    assert run_lorry("doctor", run) == 0
    assert run_lorry("report", run) == 0
    typed = "Hello\n/router one=1\nHello\n/router off\n/router on\n/adapter two\n/router three=1\n"
    subject = describe_run_subject(read_run(run))
    assert subject["adapter"] == "token router over 2 experts: one, two"
    assert [Path(part).name for part in subject["data"].split(", ")] == ["a.jsonl", "b.jsonl"]
    trained = describe_run_subject(read_run(run / "experts"))
    assert [Path(part).name for part in trained["data"].split(", ")] == ["a.jsonl", "b.jsonl"]
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    capsys.readouterr()
    assert run_lorry("chat", run, "max_new_tokens=2") == 3
    told = capsys.readouterr().err
    assert "the gates one=1" in told
    assert "the mixture of all experts" in told
    assert "/router three=1: give on, off, or NAME=NUMBER for names of one, two" in told


def test_a_finished_mixture_is_not_made_again(
    mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (mixture / "router" / "router.safetensors").stat().st_mtime_ns
    assert run_lorry("moe", mixture.parent / "experts.yaml") == 0
    told = capsys.readouterr().err
    assert told.count("has finished, and nothing it was made of has changed") == 2
    assert "training in" not in told
    assert "is read as" not in told
    assert f"report  {mixture / 'report.html'}\n" in told
    assert (mixture / "router" / "router.safetensors").stat().st_mtime_ns == before


def test_a_stopped_router_goes_on_bit_for_bit(mixture: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle to the very router that was never stopped."""
    run = copied(mixture, tmp_path / "mix")
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    for name in ("receipt.json", "router/router.safetensors"):
        (run / name).unlink()
    file = run / "run.yaml"
    settings = file.read_text().replace(f"output_dir: {mixture}\n", f"output_dir: {run}\n")
    file.write_text(settings)
    again = parse_settings(
        RouterRunConfig, [str(file), "train.resume_from_checkpoint=auto"], lambda text: None
    )
    train_run(again)
    here, there = (load_file(where / "router" / "router.safetensors") for where in (run, mixture))
    assert all(torch.equal(here[key], there[key]) for key in there)


def test_another_router_makes_room(mixture: Path, tmp_path: Path) -> None:
    """What a mixture was moves to previous/N whole, experts and router; and the hub takes none."""
    run = copied(mixture, tmp_path / "mix")
    file = tmp_path / "again.yaml"
    text = (run / "run.yaml").read_text()
    file.write_text(text.replace(f"output_dir: {mixture}\n", f"output_dir: {run}\n"))
    (run / "run.yaml").write_text(file.read_text())
    settings = [str(file), "router.temperature=2", "train.max_steps=2"]
    train_run(parse_settings(RouterRunConfig, settings, lambda text: None))
    for name in ("one/adapter_config.json", "router/router.json", "receipt.json", "run.yaml"):
        assert (run / "previous" / "1" / name).is_file(), name
    assert json.loads((run / "router" / "router.json").read_text())["temperature"] == 2
    lorry.load(run)
    with pytest.raises(ConfigError, match="its router cannot be uploaded yet"):
        collect_upload(run, at="me/mixture")


def test_a_mixture_of_whole_mlps(mixture: Path, tmp_path: Path) -> None:
    """level=expert through the verb: trained, read back, loaded, and its answers are those of whole
    forwards."""
    run = copied(mixture, tmp_path / "mix")
    file = tmp_path / "again.yaml"
    text = (run / "run.yaml").read_text()
    file.write_text(text.replace(f"output_dir: {mixture}\n", f"output_dir: {run}\n"))
    (run / "run.yaml").write_text(file.read_text())
    settings = [str(file), "router.level=expert", "train.max_steps=2"]
    train_run(parse_settings(RouterRunConfig, settings, lambda text: None))
    assert json.loads((run / "router" / "router.json").read_text())["level"] == "expert"
    check_answers(run)


def change_expert(run: Path, name: str = "two") -> None:
    file = run / name / "adapter_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})


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


def other_order(run: Path) -> None:
    file = run / "router" / "router.json"
    said = json.loads(file.read_text())
    first, second = said["experts"]
    said["experts"] = [
        {"name": first["name"], "sha256": second["sha256"]},
        {"name": second["name"], "sha256": first["sha256"]},
    ]
    file.write_text(json.dumps(said))


def reverse_experts(run: Path) -> None:
    file = run / "router" / "router.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "experts": said["experts"][::-1]}))


def rename_expert(run: Path) -> None:
    (run / "two").rename(run / "three")


def pickle_router(run: Path) -> None:
    weights = run / "router" / "router.safetensors"
    weights.rename(weights.with_suffix(".pt"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_expert, r"two: not the expert 'two' that the router was trained for"),
        (other_order, r"not the expert 'one'"),
        (reverse_experts, r"router.safetensors: not the weights .* two, one in this order"),
        (change_weights(lambda w: w * 1.01), r"router.safetensors: not the weights"),
        (lambda run: (run / "router" / "router.json").unlink(), "router.json is missing"),
        (change_router(kind="uniform"), "gates has no number but 0"),
        (rename_expert, r"expert 'two' is missing in"),
        (change_router(top_k=3), "1 to 2 of 2"),
        (change_router(kind="hash"), "kind 'hash'"),
        (change_router(base_digest="0" * 64), "other base weights"),
        (change_router(more=1), "more is not valid in a router file"),
        (change_router(input="both"), "is missing"),
        (change_weights(lambda w: w[:, :-1]), r"float32 \(2, 31\)"),
        (change_weights(lambda w: w * float("nan")), "NaN"),
        (change_weights(lambda w: w.half()), "float16"),
        (lambda run: (run / "router" / "router.safetensors").write_bytes(b"\x80\x04"), "damaged"),
        (pickle_router, r"router.safetensors is missing.* router.pt beside it is a pickle"),
    ],
)
def test_a_router_of_other_experts_is_refused(
    damage: Callable[[Path], None], words: str, mixture: Path, tmp_path: Path
) -> None:
    run = copied(mixture, tmp_path / "mix")
    damage(run)
    with pytest.raises(ModelError, match=words):
        lorry.load(run)


def spare_adapter(run: Path) -> None:
    shutil.copytree(run / "two", run / "three")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_router(gates=None), "gates has no number but 0"),
        (change_router(gates={}), "gates has no number but 0"),
        (change_router(kind="fixed", gates={"one": 0.0, "two": 0}), "gates has no number but 0"),
        (change_router(gates={"three": 1.0}), "gates has 'three': 1.0"),
        (change_router(level="expert"), "token at expert"),
        (spare_adapter, "three is an adapter that the router does not know"),
    ],
)
def test_constant_gates_that_say_nothing_are_refused(
    damage: Callable[[Path], None], words: str, mixture: Path, tmp_path: Path
) -> None:
    """Without gates the mix has no term: the base answered in silence."""
    run = copied(mixture, tmp_path / "mix")
    change_router(kind="uniform", gates={"one": 0.5, "two": 0.5})(run)
    (run / "router" / "router.safetensors").unlink()
    damage(run)
    with pytest.raises(ModelError, match=words):
        lorry.load(run)


@pytest.mark.usefixtures("charts")
def test_a_uniform_mixture_of_adapters_that_are_there(mixture: Path, tmp_path: Path) -> None:
    """Nothing trains: the sum of the experts, half each, is what a plain forward has."""
    experts = ", ".join(f"{{name: {n}, adapter: {mixture / n}}}" for n in ("one", "two"))
    made = tmp_path / "uniform"
    base = mixture.parent / "base"
    words = [f"model={base}", "dtype=float32", f"experts=[{experts}]", f"output_dir={made}"]
    assert run_lorry("moe", *words, "router.kind=uniform") == 0
    model, _ = lorry.load(made)
    assert get_bank(model).active == Mix.constants({"one": 0.5, "two": 0.5})
    theirs, _ = lorry.load(base, dtype="float32")
    for name in ("one", "two"):
        load_adapter(theirs, mixture / name, name)
    get_bank(theirs).activate(Mix.constants({"one": 0.5, "two": 0.5}))
    ids = torch.tensor([[5, 9, 3, 7]])
    assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_a_mixture_that_nothing_trained_is_read_like_any_run(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`runs`, `report`, `doctor` and `eval` knew nothing of it; what was measured of it goes aside with
    it when another is made in its place."""
    adapters = {n: mixture / n for n in ("one", "two")}
    experts = ", ".join(f"{{name: {n}, adapter: {path}}}" for n, path in adapters.items())
    made = tmp_path / "mix"
    words = [f"model={mixture.parent / 'base'}", "dtype=float32", f"experts=[{experts}]"]
    words += ["router.kind=arrow", f"output_dir={made}"]
    assert run_lorry("moe", *words) == 0
    receipt = json.loads((made / "receipt.json").read_text())
    weights = {n: path / "adapter_model.safetensors" for n, path in adapters.items()}
    assert receipt["adapters"] == {
        n: hashlib.sha256(file.read_bytes()).hexdigest() for n, file in weights.items()
    }
    capsys.readouterr()
    assert run_lorry("runs", tmp_path, "format=json") == 0
    (state,) = json.loads(capsys.readouterr().out)
    assert (state["state"], state["adapter"]) == (
        "finished",
        "arrow router over 2 experts: one, two",
    )
    assert run_lorry("report", made) == 0
    assert run_lorry("doctor", made) == 0
    told = capsys.readouterr().out
    assert "nothing was trained here" in told
    assert "one, two: intact" in told
    rows = f"data={mixture.parent / 'a.jsonl'}"
    assert run_lorry("eval", made, rows, "max_new_tokens=2", "dtype=float32") == 0
    (entry, *_) = json.loads((made / "evaluation.json").read_text())
    assert entry["metrics"]
    # an expert that has gone is no damage to this kind
    shutil.rmtree(made / "one")
    assert run_lorry("doctor", made) == 0
    assert "one: gone" in capsys.readouterr().out
    assert run_lorry("moe", *words, "router.temperature=2") == 0
    assert not (made / "evaluation.json").exists()
    assert {"evaluation.json", "run.yaml", "router"} <= {
        path.name for path in (made / "previous" / "1").iterdir()
    }


@pytest.mark.parametrize("kind", ["token", "uniform"])
@pytest.mark.parametrize(
    "damage", [lambda run: (run / "router" / "router.json").unlink(), change_expert]
)
def test_a_damaged_mixture_has_not_finished(
    damage: Callable[[Path], None], kind: str, mixture: Path, tmp_path: Path
) -> None:
    """`lorry moe` again makes it again, and keeps what was there."""
    experts = ", ".join(
        f"{{name: {n}, adapter: {mixture / n}, data: {mixture.parent / rows}.jsonl}}"
        for n, rows in (("one", "a"), ("two", "b"))
    )
    words = [f"model={mixture.parent / 'base'}", "dtype=float32", f"experts=[{experts}]"]
    train = ["router.train={max_steps: 1, save_strategy: 'no'}"] if kind == "token" else []
    words += ["max_length=128", f"router.kind={kind}", f"output_dir={tmp_path / 'mix'}", *train]
    assert run_lorry("moe", *words) == 0
    damage(tmp_path / "mix")
    with pytest.raises(ModelError):
        lorry.load(tmp_path / "mix")
    assert run_lorry("moe", *words) == 0
    lorry.load(tmp_path / "mix")
    assert (tmp_path / "mix" / "previous" / "1" / "router").is_dir()


def test_every_legal_name_of_an_expert_is_found_again(mixture: Path, tmp_path: Path) -> None:
    """Of 64 characters, and with signs at its ends."""
    names = ("n" * 64, "-two.")
    experts = ", ".join(
        f"{{name: {new}, adapter: {mixture / old}}}"
        for new, old in zip(names, ("one", "two"), strict=True)
    )
    words = [f"model={mixture.parent / 'base'}", "dtype=float32", f"experts=[{experts}]"]
    assert run_lorry("moe", *words, "router.kind=uniform", f"output_dir={tmp_path / 'mix'}") == 0
    model, _ = lorry.load(tmp_path / "mix")
    assert get_bank(model).active == Mix.constants(dict.fromkeys(names, 0.5))


@pytest.mark.parametrize("left", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_expert_that_is_half_there_has_not_gone(
    left: str, mixture: Path, tmp_path: Path
) -> None:
    """`arrow` does without an expert whose folder is gone; one that is damaged is no such one."""
    experts = ", ".join(f"{{name: {n}, adapter: {mixture / n}}}" for n in ("one", "two"))
    words = [f"model={mixture.parent / 'base'}", "dtype=float32", f"experts=[{experts}]"]
    made = tmp_path / "mix"
    arrow = "router={kind: arrow, top_k: 1}"
    assert run_lorry("moe", *words, arrow, f"output_dir={made}") == 0
    for file in (made / "one").iterdir():
        if file.name != left:
            file.unlink()
    with pytest.raises(ModelError):
        lorry.load(made)
    shutil.rmtree(made / "one")
    model, _ = lorry.load(made)
    assert tuple(get_bank(model).routers["router"].adapters) == ("two",)


def test_an_adapter_that_is_there_beside_one_that_is_trained(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first keeps its values and takes no rows of the other, neither to train nor to route."""
    experts = f"[{{name: one, adapter: {mixture / 'one'}}}, {{name: new, data: {mixture.parent / 'a'}.jsonl}}]"
    made = tmp_path / "mix"
    words = [f"model={mixture.parent / 'base'}", "dtype=float32", f"experts={experts}", "r=4"]
    more = ["lora.target_modules=[gate_proj, up_proj, down_proj]", "max_steps=2", "max_length=128"]
    assert run_lorry("moe", *words, *more, f"output_dir={tmp_path / 'routed'}") == 2
    assert "expert 'one' has no data: a router of kind=token" in capsys.readouterr().err
    assert run_lorry("moe", *words, *more, "router.kind=uniform", f"output_dir={made}") == 0
    told = capsys.readouterr().err
    assert f"experts: training in {made / 'experts'}\n" in told
    assert f"report  {made / 'report.html'}" in told
    taken, given = (
        load_file(folder / "one" / "adapter_model.safetensors") for folder in (made, mixture)
    )
    assert all(torch.equal(taken[key], given[key]) for key in given)
    assert (made / "new" / "adapter_model.safetensors").is_file()


def test_prototypes_of_another_number_format_are_made_again(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but model.dtype has changed: they are those of a mixture that never had another."""
    experts = ", ".join(
        f"{{name: {n}, adapter: {mixture / n}, data: {mixture.parent / d}.jsonl}}"
        for n, d in (("one", "a"), ("two", "b"))
    )
    words = [f"model={mixture.parent / 'base'}", f"experts=[{experts}]", "router.kind=prototype"]
    for folder, dtype in (("made", "float32"), ("made", "bfloat16"), ("fresh", "bfloat16")):
        made = [f"dtype={dtype}", f"output_dir={tmp_path / folder}"]
        assert run_lorry("moe", *words, *made) == 0
    assert "router: its settings changed" in " ".join(capsys.readouterr().err.split())
    again, fresh, before = (
        load_file(tmp_path / folder / "router" / "router.safetensors")["prototypes"]
        for folder in ("made", "fresh", "made/previous/1")
    )
    assert torch.equal(again, fresh)
    assert not torch.equal(again, before)


def route_anew(mixture: Path, made: Path, *settings: str) -> None:
    """Another router over the experts of a mixture, trained on its rows for three steps."""
    experts = ", ".join(
        f"{{name: {n}, adapter: {mixture / n}, data: {mixture.parent / d}.jsonl}}"
        for n, d in (("one", "a"), ("two", "b"))
    )
    words = [f"model={mixture.parent / 'base'}", "dtype=float32", f"experts=[{experts}]"]
    more = ["data.max_length=128", "router.train={max_steps: 3}", *settings]
    assert run_lorry("moe", *words, *more, f"output_dir={made}") == 0
    contracts = json.loads((made / "contracts.json").read_text())
    assert {c["status"] for c in contracts} <= {"held", "not_checked"}


def test_experts_that_train_with_their_router(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mixture's experts are the trained ones, those that they came from stay; a run that was
    stopped goes on bit for bit."""
    run, came_from = tmp_path / "made", mixture / "experts"
    before = {name: adapter_digest(came_from / name) for name in ("one", "two")}
    words = [
        f"model={mixture.parent / 'base'}",
        *("dtype=float32", "data.max_length=128", "backend.threads=1", f"output_dir={run}"),
        "experts="
        + json.dumps(
            [
                {"name": name, "adapter": str(came_from / name), "data": str(mixture.parent / rows)}
                for name, rows in (("one", "a.jsonl"), ("two", "b.jsonl"))
            ]
        ),
        "router.train={max_steps: 4, save_steps: 2, learning_rate: 1e-2}",
        "train_experts=true",
    ]
    assert run_lorry("moe", *words) == 0
    assert {c["status"] for c in json.loads((run / "contracts.json").read_text())} == {"held"}
    known = {e.name: e.sha256 for e in read_router_record(run).experts}
    trained = {name: adapter_digest(run / name) for name in before}
    assert known == trained
    assert not set(trained.values()) & set(before.values())
    assert {name: adapter_digest(came_from / name) for name in before} == before
    # what the stage is known by
    assert "train_experts: true" in (run / "run.yaml").read_text()
    receipt = json.loads((run / "receipt.json").read_text())
    (model, _), sizes = lorry.load(run), 0
    for name in ("one", "two"):
        sizes += get_bank(model)[name].num_parameters()
    router = get_bank(model).routers["router"]
    assert receipt["trainable_parameters"] == sizes + sum(
        t.numel() for t in router.tensors().values()
    )
    assert "trained with it" in describe_run_subject(read_run(run))["adapter"]
    check_answers(run)
    assert run_lorry("doctor", run) == 0
    card = (run / "README.md").read_text()
    assert "A `token` router over 2 LoRA experts for `base`, each in a folder of its name" in card
    assert "and the experts with it, on `a.jsonl`, `b.jsonl`." in card
    assert "library_name: lorry" in card
    assert "lora.r" not in card  # the run's own, by default: no expert has it
    assert 'subfolder="one"' in card

    files = [run / name / "adapter_model.safetensors" for name in before]
    files.append(run / "router" / "router.safetensors")
    whole = [load_file(file) for file in files]
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    for file in (run / "receipt.json", *files):
        file.unlink()
    capsys.readouterr()
    assert run_lorry("moe", *words) == 0
    assert "training resumes from its newest checkpoint" in capsys.readouterr().err
    for file, there in zip(files, whole, strict=True):
        here = load_file(file)
        assert all(torch.equal(here[key], there[key]) for key in there)


def test_a_router_with_hidden_layers(mixture: Path, tmp_path: Path) -> None:
    """It trains, holds the contracts, is read back, and a file of other widths is refused."""
    made = tmp_path / "mix"
    route_anew(mixture, made, "router.hidden=[6]")
    weights = load_file(made / "router" / "router.safetensors")
    assert [tuple(weights[f"layers.0.mlp.{n}"].shape) for n in ("hidden.0.weight", "weight")] == [
        (6, 32),
        (2, 6),
    ]
    model, _ = lorry.load(made)
    router = get_bank(model).routers["router"]
    assert all(torch.equal(value, weights[name]) for name, value in router.tensors().items())
    change_router(hidden=[7])(made)
    with pytest.raises(ModelError, match=r"float32 \(7,"):
        lorry.load(made)


def assert_greedy(model: CausalLM, tokenizer: Any, mix: Mix) -> None:
    """Answers of batches of two are the argmax of whole forwards, whoever is in the batch."""
    prompts = [tokenizer.encode(p["question"]) for p in PEOPLE]
    asked = [mix, Mix.one("one"), mix, mix]
    params = SamplingParams(max_new_tokens=5)
    answers = generate_completions(model, prompts, params, adapters=asked, batch_rows=2)
    for prompt, own, answer in zip(prompts, asked, answers, strict=True):
        tokens, call = list(prompt), AdapterContext(own)
        for token in answer.tokens:
            with torch.no_grad():
                hidden = model.hidden(PackedInput.of([tokens]), call).last
                assert int(model.logits(hidden[-1:], call).argmax()) == token
            tokens.append(token)


def test_a_router_where_transformers_runs_the_model(mixture: Path, tmp_path: Path) -> None:
    """Trained there, contracts hold; answers are those of whole forwards, also with the model's own
    cache; and Lorry's decoder gives the same logits of the same files."""
    made = tmp_path / "mix"
    route_anew(
        mixture, made, "model.native=false", "router.top_k=1", "router.straight_through=true"
    )
    line = json.loads((made / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(line["router"]["load"]) == {"one", "two"}
    opened = open_model(
        ModelConfig(name=str(made), dtype="float32", native=False), lambda note: None
    )
    native, tokenizer = lorry.load(made)
    assert opened.mixture is not None
    assert_greedy(opened.model, tokenizer, opened.mixture)
    prompts = PackedInput.of([tokenizer.encode(p["question"]) for p in PEOPLE])
    states = [
        model.hidden(prompts, AdapterContext(mix)).last
        for model, mix in ((opened.model, opened.mixture), (native, get_bank(native).active))
    ]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_vectors_of_the_experts_are_a_mixture(mixture: Path, tmp_path: Path) -> None:
    """phatgoose: contracts hold, vectors move and are read back; answers; other files are refused."""
    made = tmp_path / "mix"
    route_anew(mixture, made, "router.kind=phatgoose", "router.top_k=1", "router.temperature=0.1")
    line = json.loads((made / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss_nll_one", "loss_nll_two"} <= line.keys()
    said = json.loads((made / "router" / "router.json").read_text())
    assert (said["kind"], said["top_k"], said["temperature"]) == ("phatgoose", 1, 0.1)
    weights = load_file(made / "router" / "router.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert weights[name].shape == (2, 48)
    assert all(bool(row.any()) for row in weights[name])
    model, tokenizer = lorry.load(made)
    mix = get_bank(model).active
    router = get_bank(model).routers["router"]
    assert all(torch.equal(value, weights[name]) for name, value in router.tensors().items())
    assert_greedy(model, tokenizer, mix)
    for damage, words in (
        (change_weights(lambda w: w * float("nan")), "NaN"),
        (change_router(top_k=3), "1 to 2 of 2"),
        (change_expert, "not the expert 'two'"),
    ):
        damage(copied(made, tmp_path / words[:3]))
        with pytest.raises(ModelError, match=words):
            lorry.load(tmp_path / words[:3])


@pytest.mark.parametrize("kind", ["arrow", "spectr"])
def test_a_mixture_that_needs_no_training(
    kind: str,
    mixture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of adapters that are there, without data: answers, verbs; and an expert comes and goes."""
    base, made = mixture.parent / "base", tmp_path / "made"
    experts = ", ".join(f"{{name: {n}, adapter: {mixture / n}}}" for n in ("one", "two"))
    words = [f"model={base}", "dtype=float32", f"experts=[{experts}]", f"output_dir={made}"]
    assert run_lorry("moe", *words, f"router.kind={kind}", "router.top_k=1") == 0
    said = json.loads((made / "router" / "router.json").read_text())
    assert (said["kind"], said["top_k"]) == (kind, 1)
    model, tokenizer = lorry.load(made)
    mix = get_bank(model).active
    assert_greedy(model, tokenizer, mix)
    rows = write_rows(tmp_path / "rows.jsonl", PEOPLE)
    assert run_lorry("eval", made, f"data={rows}") == 0
    assert run_lorry("doctor", made) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("/router one=1\nHello\n/router on\nHello\n"))
    assert run_lorry("chat", made, "max_new_tokens=2") == 0
    capsys.readouterr()
    shutil.copytree(made / "one", made / "three")
    (made / "two").rename(tmp_path / "two")
    notes = list[str]()
    opened = open_model(ModelConfig(name=str(made), dtype="float32"), notes.append)
    assert opened.mixture is not None
    assert [term.adapter for term in opened.mixture.terms] == ["one", "three"]
    assert any("two has gone; three has come" in note for note in notes)
    change_expert(made, "one")
    with pytest.raises(ModelError, match="not the expert 'one'"):
        lorry.load(made)


def test_an_expert_that_no_linear_router_gates(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And settings that such a router does not read; nothing is written."""
    base, made = mixture.parent / "base", tmp_path / "made"
    experts = ", ".join(f"{{name: {n}, adapter: {mixture / n}}}" for n in ("one", "two"))
    words = [f"model={base}", "dtype=float32", f"experts=[{experts}]", f"output_dir={made}"]
    for setting, said in (
        ("router.top_k=3", "there are 2 experts"),
        ("router.input=both", "kind=arrow does not use it"),
        ("router.hidden=[4]", "kind=arrow does not use it"),
        ("router.train={max_steps: 1}", "kind=arrow trains nothing"),
    ):
        assert run_lorry("moe", *words, "router.kind=arrow", setting) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not made.exists()


def test_a_mixture_is_no_list_of_adapters_to_merge(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(mixture), "method=cat", f"output_dir={tmp_path / 'merged'}"]
    assert run_lorry(*words) == 2
    assert "is a mixture of experts, and its router cannot be merged" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert not (tmp_path / "merged").exists()


def test_gates_of_experts_that_are_not_there() -> None:
    router = RouterConfig(kind="fixed", gates={"three": 1.0})
    with pytest.raises(ValueError, match="names 'three'; the experts are one, two"):
        check_router(router, ["one", "two"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["router.top_k=1"], "no gradient"),
        (["router.top_k=3"], "there are 2 experts"),
        (["router.kind=fixed"], "router.gates={EXPERT: g} is for router.kind=fixed"),
        (["router={kind: fixed, gates: {one: 0, two: 0.0}}"], "router.gates are all 0"),
        (["lora.target_modules=all-linear", "max_steps=1"], "router.input=mlp does not gate"),
        (["experts=[{name: one, data: a.jsonl}]"], "at least two"),
        (["experts=[{name: router, data: a.jsonl}, {name: b, data: a.jsonl}]"], "router"),
        (["experts=[{name: one}, {name: two}]"], "neither data=FILE nor adapter=DIR"),
        (["router.train={steps: 1}"], "router.train.steps: Extra inputs are not permitted"),
        (["router.train={max_steps: many}"], "router.train.max_steps"),
        (
            ["experts=[{name: a, data: a.jsonl, test_size: 0.5}, {name: b, data: a.jsonl}]"],
            "expert 'b' has no held-out rows",
        ),
        (["push_to_hub=true"], "`lorry moe` uploads nothing"),
    ],
)
def test_what_no_mixture_can_be(
    more: list[str], words: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_lorry("moe", description(tmp_path, world.base), *more)
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    # what the router cannot be is said before its experts have trained
    assert "input=mlp" in words or not (tmp_path / "mix").exists()


def test_rows_that_are_not_there_leave_nothing(world: World, tmp_path: Path) -> None:
    made = tmp_path / "mix"
    experts = f"[{{name: a, data: {world.rows}}}, {{name: b, data: {tmp_path / 'nope.jsonl'}}}]"
    words = [f"model={world.base}", "dtype=float32", f"experts={experts}", f"output_dir={made}"]
    assert run_lorry("moe", *words, "lora.target_modules=[gate_proj, up_proj, down_proj]") == 3
    assert not made.exists()


@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("aux_loss", 0.5), ("input", "both")])
def test_constant_gates_refuse_what_they_do_not_read(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"router.{name} is for router.kind=token"):
        RouterConfig.model_validate({"kind": "uniform", name: value})
