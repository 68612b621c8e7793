"""`lorry export MIXTURE`: a run with a router as a stock class, as one dense model, as GGUF, as the
adapters for a server; each against transformers, PEFT or llama.cpp computing what its files say.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorry as library
from lorry.verbs.checks.probe import PROBE_TEXT
from lorry.verbs.exports import mixture as export_mixture
from tests.support.llamacpp import LlamaCpp
from tests.support.mixtures import MLP, NAMES, deltas_of, mixture_run
from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import PEOPLE, lorry, model_directory

IDS = torch.tensor([[5, 9, 3, 7, 60, 61, 200, 12, 33, 40]])
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"tie_word_embeddings": True},
    "qwen2_moe": {"model_type": "qwen2"},
    "qwen3_moe": {"model_type": "qwen3", "head_dim": 16},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("base") / "base")


def opened(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def expected_logits(
    base: Path, run: Path, top_k: int, temperature: float = 1.0, attention: float = 0.0
) -> Tensor:
    """The dense model of transformers whose MLPs are mixtures of whole MLPs, from the run's files;
    ``attention``: times the mean of the experts' attention deltas."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    routers = load_file(run / "router" / "router.safetensors")
    deltas = [deltas_of(run / name) for name in NAMES]

    def mixed(mlp: Any, layer: int) -> Any:
        def forward(n: Tensor) -> Tensor:
            p = (n @ routers[f"layers.{layer}.mlp.weight"].T / temperature).softmax(-1)
            kept, chosen = p.topk(top_k)
            kept = kept / kept.sum(-1, keepdim=True)
            out = torch.zeros_like(n)
            for e, delta in enumerate(deltas):
                w = {
                    name: getattr(mlp, name).weight
                    + delta.get(f"model.layers.{layer}.mlp.{name}", torch.zeros(()))
                    for name in MLP
                }
                own = F.linear(
                    F.silu(F.linear(n, w["gate_proj"])) * F.linear(n, w["up_proj"]), w["down_proj"]
                )
                out = out + (kept * (chosen == e)).sum(-1, keepdim=True) * own
            return out

        return forward

    with torch.no_grad():
        for delta in deltas:
            for path, change in delta.items():
                if ".mlp." not in path:
                    model.get_submodule(path).weight += attention / len(deltas) * change
        for number, layer in enumerate(model.model.layers):
            layer.mlp.forward = mixed(layer.mlp, number)
        return model(IDS).logits


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_run_s_router_becomes_the_class_s(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its temperature folded in; and the losses told are those of both models on the experts' rows."""
    base = model_directory(tmp_path / "base", **FAMILIES[kind])
    run = mixture_run(tmp_path / "mix", base, top_k=2, temperature=0.5)
    assert lorry("export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'moe'}\n"
    model, expected = opened(tmp_path / "moe"), expected_logits(base, run, 2, 0.5)
    assert model.config.model_type == kind
    difference = (logits(model) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    assert "level=delta" in err
    told = re.findall(r"loss of (\w+) on 2 training rows: the run ([\d.]+), exported ([\d.]+)", err)
    assert [name for name, _, _ in told] == list(NAMES)
    # the class adds whole MLPs, the run adapters inside each
    assert any(ours != theirs for _, ours, theirs in told)
    words = AutoTokenizer.from_pretrained(tmp_path / "moe")
    for at, (_, _, exported) in enumerate(told):
        assert float(exported) == pytest.approx(answer_loss(model, words, at), abs=1e-4)


def answer_loss(model: Any, words: Any, at: int) -> float:
    """Mean over the tokens of the answers of two rows, with the end of their turn."""
    losses = []
    for row in PEOPLE[at : at + 2]:
        asked = words.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt = words(asked, add_special_tokens=False).input_ids
        answer = words(f"{row['answer']}<|im_end|>", add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            scores = model(ids).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(scores, ids[0, len(prompt) :], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_at_level_expert_the_class_is_the_run(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its logits, and the losses on every domain."""
    base = model_directory(tmp_path / "base", **FAMILIES[kind])
    run = mixture_run(tmp_path / "mix", base, top_k=2, level="expert")
    assert lorry("export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    told = capsys.readouterr().err
    assert "largest logit difference to the run itself" in told
    assert "level=delta" not in told
    for name in NAMES:
        assert re.search(rf"loss of {name} on 2 training rows: .*\([+-]0.00%\)", told)
    model, _ = library.load(run)
    expected = logits(opened(tmp_path / "moe"))
    with torch.no_grad():
        difference = (model(IDS).logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


def test_another_model_than_the_run_is_not_kept(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A factor on one router, by which the plain mixture and the class agree, and the run does not."""
    run = mixture_run(tmp_path / "mix", base, top_k=2, level="expert")
    right = export_mixture.export_moe

    def wrong(opened: Any, output: Path, experts: Any, routers: list[Tensor], **more: Any) -> None:
        right(opened, output, experts, [1.5 * routers[0], *routers[1:]], **more)

    monkeypatch.setattr(export_mixture, "export_moe", wrong)
    assert lorry("export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 5
    assert "logits" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def chosen_sets(folder: Path, dtype: torch.dtype, ids: Tensor) -> list[set[int]]:
    """Whom each token goes to, layer after layer."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), list[Tensor]()
    for layer in model.model.layers:
        # a router gives logits, weights and the experts' numbers
        layer.mlp.gate.register_forward_hook(lambda module, given, out: seen.append(out[2]))
    with torch.no_grad():
        model(ids)
    return [set(token) for layer in seen for token in layer.tolist()]


def test_fewer_bits_move_tokens_to_other_experts(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many stay is told, as the class's own routers count them on the text that is compared."""
    run = mixture_run(tmp_path / "mix", base, described=False)
    words = ["export", run, "to=hf-moe", "dtype=bf16", f"output_dir={tmp_path / 'moe'}"]
    assert lorry(*words) == 0
    told = re.search(r"computed in bfloat16, ([\d.]+)% of tokens", capsys.readouterr().err)
    assert told
    ids = AutoTokenizer.from_pretrained(run)(PROBE_TEXT, return_tensors="pt").input_ids
    one, other = (
        chosen_sets(tmp_path / "moe", dtype, ids[:, :48])
        for dtype in (torch.float32, torch.bfloat16)
    )
    same = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    assert float(told[1]) == pytest.approx(100 * same, abs=0.06)


@pytest.mark.parametrize(
    ("rule", "top_k"),
    [({"top_k": 1, "straight_through": True}, 1), ({"top_k": 3, "normalize": False}, 3)],
)
def test_gates_that_sum_to_one_by_themselves(
    rule: dict[str, Any], top_k: int, base: Path, tmp_path: Path
) -> None:
    run = mixture_run(tmp_path / "mix", base, described=False, **rule)
    assert lorry("export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    expected = expected_logits(base, run, top_k)
    difference = (logits(opened(tmp_path / "moe")) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("attention", "share"), [("average", 1.0), ("drop", 0.0)])
def test_attention_of_a_router_of_both(
    attention: str, share: float, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mixture_run(tmp_path / "mix", base, targets=("q_proj", *MLP), input="both")
    words = ["export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}"]
    assert lorry(*words) == 2
    assert "its router gates attention too" in capsys.readouterr().err
    assert lorry(*words, f"attention={attention}") == 0
    expected = expected_logits(base, run, 2, attention=share)
    difference = (logits(opened(tmp_path / "moe")) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


def test_gates_from_prompts_of_a_run(base: Path, tmp_path: Path) -> None:
    """Given ones are mergekit's of these texts; without any those of the training rows, whose
    direction at layer 0 is the mean embedding of their last prompt tokens."""
    run = mixture_run(tmp_path / "mix", base, gates=dict.fromkeys(NAMES, 1 / 3))
    texts = {name: [f"12 + {name}"] for name in NAMES}
    given = ["gate=hidden", f"prompts={json.dumps(texts)}", "experts_per_token=1"]
    assert lorry("export", run, "to=hf-moe", *given, f"output_dir={tmp_path / 'a'}") == 0
    assert lorry("export", run, "to=hf-moe", "gate=hidden", f"output_dir={tmp_path / 'b'}") == 0
    words = AutoTokenizer.from_pretrained(run)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    stored = [load_file(tmp_path / one / "model.safetensors") for one in "ab"]
    key = "model.layers.0.block_sparse_moe.gate.weight"
    for e, name in enumerate(NAMES):
        last = embedding[words(texts[name][0], add_special_tokens=False).input_ids[-1]]
        torch.testing.assert_close(stored[0][key][e], last / last.norm(), rtol=1e-4, atol=1e-5)
    # every prompt ends in the template's last token
    last = embedding[words("assistant\n", add_special_tokens=False).input_ids[-1]]
    torch.testing.assert_close(stored[1][key][0], last / last.norm(), rtol=1e-4, atol=1e-5)
    assert [opened(tmp_path / one).config.num_experts_per_tok for one in "ab"] == [1, 2]


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "uniform": ({"gates": dict.fromkeys(NAMES, 1 / 3)}, [], "kind uniform has no matrix"),
    "fixed": ({"gates": {"one": 0.7, "two": 0.1}}, [], "to=dense is the same model"),
    "prototype": ({"prototypes": torch.eye(3, 32)}, [], "kind prototype has no matrix"),
    "attention": ({"targets": ("q_proj",), "input": "attn"}, [], "its router gates attention"),
    "not normalised": ({"normalize": False}, [], "normalize must be true"),
    "another k": ({}, ["experts_per_token=3"], "was trained with top_k=2"),
    "prompts": ({}, ["prompts={one: [a]}"], "the run's router needs none"),
    "prompts of some": ({}, ["gate=hidden", "prompts={one: [a]}"], "prompts has no texts for"),
    "no prompts": (
        {},
        ["gate=hidden"],
        "run.yaml is missing, and with it which rows are whose; give",
    ),
    "one adapter": ({}, ["adapter=one"], "adapter is not for to=hf-moe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_class_can_hold(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, words, message = REFUSED[name]
    run = mixture_run(tmp_path / "mix", base, described=False, **made)
    assert lorry("export", run, "to=hf-moe", *words, f"output_dir={tmp_path / 'moe'}") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("to", ["dense", "gguf"])
def test_a_router_of_sequences_beside_constant_gates(
    to: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the router loses is told: a row's expert is chosen by its prompt, and the run's loss is
    that of this expert alone."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(base)
    # nearest to any prompt is the second: the others are its opposite
    means = torch.stack(
        [
            -prompt_state(dense, words, 0),
            prompt_state(dense, words, 0),
            -prompt_state(dense, words, 1),
        ]
    )
    run = mixture_run(tmp_path / "mix", base, prototypes=means)
    assert lorry("export", run, f"to={to}", f"output_dir={tmp_path / 'out'}") == 0
    told = re.search(
        r"loss of one on 2 training rows: the run ([\d.]+), exported", capsys.readouterr().err
    )
    assert told
    with torch.no_grad():
        for path, delta in deltas_of(run / "two").items():
            dense.get_submodule(path).weight += delta
    assert float(told[1]) == pytest.approx(answer_loss(dense, words, 0), abs=1e-4)


def prompt_state(model: Any, words: Any, at: int) -> Tensor:
    """[D]: the mean of transformers' last hidden state over a row's prompt."""
    text = words.apply_chat_template(
        [{"role": "user", "content": PEOPLE[at]["question"]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)


@pytest.mark.parametrize("weights", [{}, {"one": 0.7, "three": -0.2}])
def test_one_dense_model(
    weights: dict[str, float], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mixture_run(tmp_path / "mix", base, top_k=2)
    words = [f"weights={json.dumps(weights)}"] if weights else []
    assert lorry("export", run, "to=dense", *words, f"output_dir={tmp_path / 'dense'}") == 0
    told = capsys.readouterr().err
    assert re.search(r"loss of three on 2 training rows: the run [\d.]+, exported [\d.]+", told)
    found, dense = (
        load_file(tmp_path / "dense" / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    for name, gate in (weights or dict.fromkeys(NAMES, 1 / 3)).items():
        for path, delta in deltas_of(run / name).items():
            dense[f"{path}.weight"] = dense[f"{path}.weight"] + gate * delta
    for key, expected in dense.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)
    assert lorry("unmerge", tmp_path / "dense", f"output_dir={tmp_path / 'again'}") == 0


def test_experts_that_have_come_and_gone_are_exported_as_they_are_routed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean of those there now, not of those in router.json; `doctor` says who has gone."""
    given, run = mixture_run(tmp_path / "given", base), tmp_path / "mix"
    experts = ", ".join(f"{{name: {n}, adapter: {given / n}}}" for n in ("one", "two"))
    words = [f"model={base}", "dtype=float32", f"experts=[{experts}]", "router.kind=spectr"]
    assert lorry("moe", *words, f"output_dir={run}") == 0
    shutil.copytree(given / "three", run / "three")
    shutil.rmtree(run / "one")
    assert lorry("doctor", run) == 0
    assert "two: intact; one: gone" in " ".join(capsys.readouterr().out.split())
    assert lorry("export", run, "to=dense", f"output_dir={tmp_path / 'dense'}") == 0
    assert "experts added up: 0.5 x two, 0.5 x three" in capsys.readouterr().err
    found = load_file(tmp_path / "dense" / "model.safetensors")
    dense = load_file(base / "model.safetensors")
    for name in ("two", "three"):
        for path, delta in deltas_of(run / name).items():
            dense[f"{path}.weight"] = dense[f"{path}.weight"] + 0.5 * delta
    for key, expected in dense.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)


def test_constant_gates_are_the_dense_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mixture_run(tmp_path / "mix", base, gates={"one": 0.7, "two": 0.1})
    assert lorry("export", run, "to=dense", f"output_dir={tmp_path / 'dense'}") == 0
    told = capsys.readouterr().err
    assert "0.7 x one, 0.1 x two" in told
    for name in NAMES:
        assert re.search(rf"loss of {name} on 2 training rows: .*\([+-]0.00%\)", told)


def test_several_adapters_without_a_router(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of several: its rows make a router of an hf-moe, and weights one dense model."""
    run = mixture_run(tmp_path / "several", base)
    shutil.rmtree(run / "router")
    words = ["export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}"]
    assert lorry(*words) == 2
    assert "has no router (router/router.json)" in " ".join(capsys.readouterr().err.split())
    assert lorry(*words, "gate=hidden_avg") == 0
    told = capsys.readouterr().err
    # in the order of their folders
    assert "MixtralForCausalLM of 3 experts (one, three, two), 2 per token" in told
    assert "not trained" in told
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    dense = load_file(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    found = tensors["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    change = deltas_of(run / "three")["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(found, dense + change)
    assert lorry("export", run, "to=dense", "weights={three: 1}", f"output_dir={tmp_path}/d") == 0
    found = load_file(tmp_path / "d" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(found, dense + change)
    assert lorry("export", run / "one", "to=dense") == 2
    assert "is no run of several experts" in capsys.readouterr().err


def test_adapters_for_a_server(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT reads each, and what routing.json says of the base's states is what transformers has."""
    run = mixture_run(tmp_path / "mix", base, top_k=2)
    assert lorry("export", run, "to=peft", f"output_dir={tmp_path / 'peft'}") == 0
    told = capsys.readouterr().err
    assert re.search(r"two: \d of 2 training prompts are nearest to its own", told)
    said = json.loads((tmp_path / "peft" / "routing.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "peft" / "one")
    for at, expert in enumerate(said["experts"]):
        states = [prompt_state(dense, words, row) for row in (at, at + 1)]
        prototype = torch.tensor(expert["prototype"])
        torch.testing.assert_close(prototype, torch.stack(states).mean(0), rtol=1e-4, atol=1e-5)
        folder = tmp_path / "peft" / expert["adapter"]
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)
        )
        with torch.no_grad():
            for path, delta in deltas_of(run / expert["name"]).items():
                own = theirs.base_model.model.get_submodule(path).get_delta_weight("default")
                torch.testing.assert_close(own, delta, rtol=1e-5, atol=1e-6)


def test_prototypes_of_a_run_are_those_of_the_server(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand in its router, with what they read; no row is needed."""
    means = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    rule = {"layer": 0, "pooling": "last"}
    run = mixture_run(tmp_path / "mix", base, prototypes=means, described=False, **rule)
    assert lorry("export", run, "to=peft", f"output_dir={tmp_path / 'peft'}") == 0
    told = capsys.readouterr().err
    assert "the rule was not tried" in told
    assert "more than one adapter per request" not in told
    said = json.loads((tmp_path / "peft" / "routing.json").read_text())
    assert {key: said["rule"][key] for key in rule} == rule
    assert torch.equal(torch.tensor([e["prototype"] for e in said["experts"]]), means)


def test_the_class_has_the_base_s_tokens(base: Path, tmp_path: Path) -> None:
    """Also none: left out, Mixtral's own would be in their place."""
    run = mixture_run(tmp_path / "mix", base, described=False)
    assert lorry("export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    theirs = AutoModelForCausalLM.from_pretrained(base).config
    config = opened(tmp_path / "moe").config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(theirs, name)
    assert config.bos_token_id is None


@pytest.mark.parametrize("way", ["lora", "all weights"])
def test_training_on_what_was_exported(
    way: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA on top of the stock class, merged; or all of its weights, experts and router among them.
    Both are Mixtral directories again, which llama.cpp's format takes."""
    run = mixture_run(tmp_path / "mix", base, top_k=2)
    moe, rows, out = tmp_path / "moe", tmp_path / "one.jsonl", tmp_path / "trained"
    assert lorry("export", run, "to=hf-moe", f"output_dir={moe}") == 0
    settings = [f"data={rows}", f"output_dir={out}", "dtype=float32", "max_steps=2", "threads=1"]
    settings += ["learning_rate=1e-2", "save_strategy=no"]
    assert lorry("sft", f"model={moe}", *settings, *(["lora=null"] if way != "lora" else [])) == 0
    if way == "lora":
        assert lorry("export", out, "to=gguf") == 4
        assert "fold the adapter into it (lorry merge)" in " ".join(capsys.readouterr().err.split())
        assert lorry("merge", out, f"output_dir={tmp_path / 'merged'}") == 0
        out = tmp_path / "merged"
    before, after = opened(moe).state_dict(), opened(out).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert "model.layers.0.mlp.experts.down_proj" in moved
    # an adapter reaches the router where it is named alone
    assert ("model.layers.1.mlp.gate.weight" in moved) == (way != "lora")
    assert lorry("export", out, "to=gguf", f"output_dir={tmp_path / 'gguf'}") == 0


@pytest.mark.parametrize(
    "words",
    [["sft"], ["sft", "lora=null"], ["unlearn", "forget={rows}", "retain={rows}"]],
    ids=["lora", "all weights", "frozen start"],
)
def test_no_run_begins_with_a_mixture(
    words: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = mixture_run(tmp_path / "mix", base), tmp_path / "trained"
    rows = tmp_path / "one.jsonl"
    verb, *more = (word.format(rows=rows) for word in words)
    more += [f"data={rows}"] if verb == "sft" else []
    code = lorry(verb, f"model={run}", *more, f"output_dir={out}")
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2, said
    assert (
        "is a mixture of experts, whose router is no part of a base that other runs train" in said
    )
    assert "to=hf-moe" in said


def test_llama_cpp_computes_what_was_exported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hf-moe, the experts added up, and one expert beside the base."""
    run = mixture_run(tmp_path / "mix", base, top_k=2, described=False)
    assert lorry("export", run, "to=hf-moe", f"output_dir={tmp_path / 'moe'}") == 0
    assert lorry("export", run, "to=dense", f"output_dir={tmp_path / 'dense'}") == 0
    capsys.readouterr()
    for asked, made in (
        ([tmp_path / "moe", "to=gguf"], "moe"),
        ([run, "to=gguf", "outtype=f32"], "dense"),
        ([run, "to=gguf", "weights={two: 1}", f"output_dir={tmp_path / 'two'}"], "two"),
    ):
        assert lorry("export", *asked) == 0
        file = Path(capsys.readouterr().out.strip())
        if made == "two":
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            with torch.no_grad():
                for path, delta in deltas_of(run / "two").items():
                    model.get_submodule(path).weight += delta
        else:
            model = opened(tmp_path / made)
        agree(LlamaCpp(file), model, base)
    # of the loop's last
    assert lorry("export", base, "to=gguf") == 0
    plain = Path(capsys.readouterr().out.strip())
    assert lorry("export", run, "to=gguf-lora", "adapter=two") == 0
    lora = Path(capsys.readouterr().out.strip())
    agree(LlamaCpp(plain, lora=[lora]), model, base)


def agree(llama: LlamaCpp, model: Any, base: Path) -> None:
    """On a prompt whose likeliest next token is text: of half a character llama.cpp says nothing."""
    words = AutoTokenizer.from_pretrained(base)
    for row in PEOPLE:
        ids = words(f"{row['question']} {row['answer']}").input_ids
        with torch.no_grad():
            every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for at, expected in enumerate(every):
            said = words.decode([int(expected.argmax())], skip_special_tokens=True)
            if at > 3 and said.strip() and said.isascii():
                found = llama.log_probabilities(ids[: at + 1])
                assert len(found) > 100
                assert max(abs(float(expected[i]) - value) for i, value in found.items()) < 5e-4
                return
    pytest.fail("no such prompt")
