"""`lorry moe` in stages: a workspace, experts in turn, experts of several adapters, merged experts,
what is skipped; and what is told before anything trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

import lorry
from lorry.config import MoeRunConfig, build_settings
from lorry.errors import ConfigError
from lorry.notes import ignore_note
from lorry.verbs.checks.domain_loss import expert_data_settings
from lorry.verbs.mixture.outputs import finetune_run
from tests.support.verbworld import PEOPLE, model_directory, write_rows
from tests.support.verbworld import lorry as run_lorry

MLP = "[gate_proj, up_proj, down_proj]"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of two experts in turn, merged as well; not to be changed."""
    folder = tmp_path_factory.mktemp("workspace")
    model_directory(folder / "base")
    for name, at in (("a", 0), ("b", 2)):
        write_rows(folder / f"{name}.jsonl", PEOPLE[at : at + 2])
    (folder / "experts.yaml").write_text(f"""
model: {{name: {folder / "base"}, dtype: float32}}
lora: {{target_modules: {MLP}, r: 2}}
data: {{max_length: 96}}
train: {{max_steps: 2, learning_rate: 1e-2, save_strategy: "no", seed: 3}}
backend: {{threads: 1}}
experts: [{{name: one, data: {folder / "a.jsonl"}}}, {{name: two, data: {folder / "b.jsonl"}, r: 4}}]
router: {{train: {{max_steps: 2}}}}
together: false
merge_experts: true
layout: workspace
output_dir: {folder / "work"}
""")
    assert run_lorry("moe", folder / "experts.yaml") == 0
    return folder


def test_a_workspace_is_laid_out_as_the_project_does(workspace: Path) -> None:
    work = workspace / "work"
    for name, rank in (("one", 2), ("two", 4)):
        expert = work / "experts" / name
        assert json.loads((expert / "adapter_config.json").read_text())["r"] == rank
        assert (expert / "adapter_model.safetensors").is_file()
        # a whole model for stock software, and not the base
        merged, base = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            for path in (expert / "merged", workspace / "base")
        )
        ids = torch.tensor([[5, 9, 3, 7]])
        model, _ = lorry.load(expert, dtype="float32")
        with torch.no_grad():
            ours, theirs, plain = (m(ids).logits for m in (model, merged, base))
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        assert (plain - theirs).abs().max() > 1e-3
    lorry.load(work / "gating_network")
    assert (work / "report.html").is_file()
    log = (work / "train.log").read_text()
    assert log.count("step 2/2") == 3


def test_a_stage_that_is_skipped_takes_what_is_there(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router = workspace / "work" / "gating_network" / "router" / "router.safetensors"
    before = router.stat().st_mtime_ns
    skips = ("--skip-experts", "--skip-gating", "--skip-merge", "--skip-finetune", "--skip-convert")
    capsys.readouterr()
    assert run_lorry("moe", workspace / "experts.yaml", *skips, "learning_rate=1e-3") == 0
    assert capsys.readouterr().out == f"{workspace / 'work' / 'gating_network'}\n"
    assert router.stat().st_mtime_ns == before
    words = (f"output_dir={tmp_path / 'new'}", "--skip-experts")
    assert run_lorry("moe", workspace / "experts.yaml", *words) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "skip_experts: expert 'one' is not in" in told
    # no mixture is there: none is told of, and a router of another program's is not passed over
    shutil.copytree(workspace / "work" / "experts", tmp_path / "new" / "experts")
    words = (f"output_dir={tmp_path / 'new'}", "merge_experts=false")
    assert run_lorry("moe", workspace / "experts.yaml", *words, *skips) == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'new' / 'experts'}\n"
    assert "lorry chat" not in told.err
    pickled = tmp_path / "new" / "gating_network" / "best_model.pt"
    pickled.parent.mkdir()
    pickled.write_bytes(b"\x80\x04")
    assert run_lorry("moe", workspace / "experts.yaml", *words, *skips) == 2
    assert f"skip_gating: {pickled} is a pickle" in capsys.readouterr().err.replace("\n", "")


def test_formats_that_are_written_straight_from_the_mixture(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "together=true",
        "merge_experts=false",
        "layout=run",
        "router.kind=uniform",
        "router.train={}",
        "export=[dense, peft]",
        f"output_dir={tmp_path / 'mix'}",
    )
    capsys.readouterr()
    assert run_lorry("moe", workspace / "experts.yaml", *words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mix'}\n"
    assert (tmp_path / "mix" / "peft" / "routing.json").is_file()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "mix" / "dense", dtype=torch.float32)
    model, _ = lorry.load(tmp_path / "mix", dtype="float32")
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        ours, theirs = model(ids).logits, dense(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    lorry.load(tmp_path / "mix" / "peft" / "one", dtype="float32")


def test_an_expert_of_several_adapters_is_their_weighted_sum(
    workspace: Path, tmp_path: Path
) -> None:
    """Its delta is w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2, from the files themselves."""
    one, two = (workspace / "work" / "experts" / name for name in ("one", "two"))
    words = [
        f"model={workspace / 'base'}",
        "dtype=float32",
        f"experts=[{{name: both, adapter: [{one}, {two}], adapter_weights: [1.0, -0.5]}}, {{name: two, adapter: {two}}}]",
        "router.kind=uniform",
        f"output_dir={tmp_path / 'mix'}",
    ]
    assert run_lorry("moe", *words) == 0

    def deltas(folder: Path) -> dict[str, torch.Tensor]:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / config["r"]
        return {
            key: scale * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
            for key in tensors
            if "lora_A" in key
        }

    summed, first, second = deltas(tmp_path / "mix" / "both"), deltas(one), deltas(two)
    assert summed.keys() == first.keys() == second.keys()
    for key, delta in summed.items():
        expected = first[key] - 0.5 * second[key]
        assert (delta - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_report_of_a_workspace_has_its_one_trained_expert(
    workspace: Path, tmp_path: Path
) -> None:
    """It has a run in a folder of its name, also where experts are trained together."""
    one = workspace / "work" / "experts" / "one"
    work = tmp_path / "work"
    experts = f"[{{name: one, adapter: {one}}}, {{name: fresh, data: {workspace / 'b.jsonl'}}}]"
    words = [f"model={workspace / 'base'}", "dtype=float32", f"experts={experts}", "r=2"]
    more = ["max_steps=1", "max_length=96", "layout=workspace", "router.kind=uniform"]
    assert run_lorry("moe", *words, *more, f"output_dir={work}") == 0
    assert (work / "experts" / "fresh" / "run.yaml").is_file()
    assert "fresh" in (work / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"export": ["gguf"]}, "gguf is made of the hf-moe export"),
        ({"export": ["hf-moe", {"to": "hf-moe", "dtype": "float32"}]}, "hf-moe is named twice"),
        ({"export": [{"to": "gguf", "attention": "drop"}]}, "attention is not read by to=gguf"),
        ({"export": [{"to": "peft", "dtype": "float32"}]}, "dtype is not read by to=peft"),
        ({"finetune": {"max_steps": 1}}, "finetune is made of the hf-moe export"),
        ({"metric_for_best_model": "eval_bleurt_max_score"}, "BLEURT is not to be had"),
        (
            {"router": {"train_experts": True, "kind": "sequence"}},
            "router.train_experts is for router.kind=token; kind=sequence",
        ),
        ({"lora": None, "router": {"kind": "arrow"}}, "router.kind is of a router over adapters"),
        ({"lora": None, "router": {"train_experts": True}}, "router.train_experts is of a router"),
        (
            {"lora": None, "export": ["hf-moe"]},
            "gate_mode=router is a router trained over adapters",
        ),
        (
            {
                "lora": None,
                "trainable": "all",
                "export": [{"to": "hf-moe", "gate_mode": "hidden"}],
            },
            "trainable=all trains more than the MLPs",
        ),
        ({"lora": None, "export": ["dense"]}, "to=dense adds up adapters"),
        ({"lora": None, "merge_experts": True}, "each expert is a whole model already"),
        (
            {
                "lora": None,
                "export": [{"to": "hf-moe", "gate_mode": "hidden"}, "gguf"],
                "conversion_mode": "average",
            },
            "conversion_mode=average adds up adapters",
        ),
        (
            {"lora": None, "experts": [{"name": "a", "data": "a"}, {"name": "b", "adapter": "b"}]},
            "lora=null trains experts as whole models, and 'b' is an adapter",
        ),
        (
            {
                "lora": None,
                "experts": [{"name": "a", "data": "a"}, {"name": "b", "data": "b", "r": 4}],
            },
            "leaves no adapters for jobs",
        ),
    ],
)
def test_stages_that_cannot_be(more: dict[str, object], words: str) -> None:
    experts = [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"}]
    with pytest.raises(ConfigError, match=words):
        build_settings(MoeRunConfig, {"experts": experts, **more}, ignore_note)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["export=[{to: hf-moe, architecture: qwen3_moe}]"], "a llama becomes a mixtral"),
        (["export=[hf-moe]", "finetune={rnk: 1}"], "finetune: "),
        (
            ["export=[hf-moe]", "finetune={train_router: 3}"],
            "finetune.train_router: give true or false",
        ),
        (["memory_budget=3GiB", "r=auto", "together=true"], "give together=false"),
        (
            ["export=[{to: hf-moe, experts_per_token: 3}]"],
            "experts_per_token=3: there are 2 experts",
        ),
    ],
)
def test_what_no_export_can_be_is_told_before_anything_trains(
    more: list[str],
    words: str,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new"
    assert run_lorry("moe", workspace / "experts.yaml", *more, f"output_dir={output}") != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_gates_from_prompts_are_of_the_experts_that_the_mixture_has(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three experts the class had the two that were trained together, in silence. One without rows
    is refused at the start; gates at random have it. Trained in turn in the same directory, their
    rows are those of now, and not of the run together that still lies in `experts`."""
    rows = [workspace / f"{name}.jsonl" for name in "ab"]
    there = f"{{name: there, adapter: {workspace / 'work' / 'experts' / 'one'}}}"
    swapped = f"{{name: one, data: {rows[1]}}}, {{name: two, data: {rows[0]}}}"
    words = [f"model={workspace / 'base'}", "dtype=float32", "r=2", f"lora.target_modules={MLP}"]
    words += [
        "max_steps=1",
        "max_length=96",
        "router.kind=uniform",
        f"output_dir={tmp_path / 'mix'}",
    ]
    three = f"experts=[{swapped}, {there}]"
    assert run_lorry("moe", *words, three, "export=[{to: hf-moe, gate_mode: hidden}]") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "export: gate_mode=hidden takes experts and prompts from one run" in told
    assert not (tmp_path / "mix").exists()
    assert run_lorry("moe", *words, three, "export=[{to: hf-moe, gate_mode: random}]") == 0
    config = json.loads((tmp_path / "mix" / "hf-moe" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    assert (tmp_path / "mix" / "experts" / "run.yaml").is_file()

    two = f"experts=[{{name: one, data: {rows[0]}}}, {{name: two, data: {rows[1]}}}]"
    more = ["together=false", "export=[{to: hf-moe, gate_mode: hidden}]"]
    assert run_lorry("moe", *words, two, *more) == 0
    config = json.loads((tmp_path / "mix" / "hf-moe" / "config.json").read_text())
    assert config["num_local_experts"] == 2
    described = expert_data_settings(tmp_path / "mix")
    assert {name: data.path for name, (data, _) in described.items()} == {
        "one": str(rows[0]),
        "two": str(rows[1]),
    }
    # both ways make room for each other; it was refused as if somebody else had written there
    folder = tmp_path / "mix" / "experts"
    assert (folder / "previous" / "1" / "one" / "adapter_config.json").is_file()
    capsys.readouterr()
    assert run_lorry("moe", *words, two) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"{folder} held experts that were trained in turn; they are in {folder}/previous/2" in told
    )
    assert (folder / "previous" / "2" / "one" / "run.yaml").is_file()
    assert (folder / "run.yaml").is_file()


def finetuned(*experts: dict[str, object], **finetune: object) -> MoeRunConfig:
    settings = {"experts": list(experts), "export": ["hf-moe"], "finetune": {"seed": 5, **finetune}}
    return build_settings(MoeRunConfig, settings, ignore_note)


def test_finetuning_reads_the_rows_of_all_experts() -> None:
    """As they are read for the experts, at the length of the longest unless it has its own."""
    first = {"name": "a", "data": "a.jsonl", "n": 7, "max_length": 64, "test_size": 0.5}
    second = {"name": "b", "data": "b.jsonl", "n": 7, "max_length": 96}
    made = finetune_run(finetuned(first, second))
    assert made.data.path == ["a.jsonl", "b.jsonl"]
    assert (made.data.n, made.data.max_length, made.data.test_size) == (7, 96, None)
    assert (made.lora, made.trainable, made.train.seed) == (None, None, 5)
    own = finetune_run(finetuned(first, second, max_length=32, test_size=0.1, train_router=False))
    assert (own.data.max_length, own.data.test_size) == (32, 0.1)
    assert own.trainable == "all-but-router"
    sets = [{"name": n, "data": {"mix": [n]}} for n in ("gsm8k", "svamp")]
    assert finetune_run(finetuned(*sets)).data.mix == ["gsm8k", "svamp"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"n": 3}, "data.n is not the same for all"),
        ({"data": {"mix": ["gsm8k"]}}, "some are named sets, others files"),
        ({"split": "test"}, "data.split is not the same for all"),
    ],
)
def test_rows_that_no_single_run_reads(other: dict[str, object], words: str) -> None:
    run = finetuned({"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl", **other})
    with pytest.raises(ConfigError, match=words):
        finetune_run(run)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"boolq": "a.jsonl"}, {"boolq": "b.jsonl"}),
        ({"boolq.train": "a.jsonl"}, {"boolq": "b.jsonl"}),
        # of the hub, and of a file under another spelling
        ({}, {"google/boolq": "b.jsonl"}),
    ],
)
def test_one_name_of_other_files_is_no_single_run(
    first: dict[str, str], second: dict[str, str]
) -> None:
    """The rows of the first expert were left out in silence."""
    experts = [
        {"name": name, "data": {"mix": ["boolq"], "local": local}}
        for name, local in (("a", first), ("b", second))
    ]
    with pytest.raises(ConfigError, match=r"data\.local is not the same for all"):
        finetune_run(finetuned(*experts))
    assert finetune_run(finetuned(experts[1], {**experts[1], "name": "c"})).data.mix == ["boolq"]
    files = [{"name": name, "data": "a.jsonl"} for name in "ab"]
    assert finetune_run(finetuned(*files)).data.path == ["a.jsonl"]


def test_each_expert_ends_with_the_best_by_its_own_metric(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One by its loss, the other by what is the worst of it: as the values of metrics.jsonl say."""
    rows = workspace / "a.jsonl"
    shared = f"data: {rows}, load_best_model_at_end: true"
    odd = "metric_for_best_model: eval_loss, greater_is_better: true"
    words = [
        f"experts=[{{name: one, {shared}}}, {{name: two, {shared}, {odd}}}]",
        f"data.eval={workspace / 'b.jsonl'}",
        "max_steps=3",
        "eval_steps=1",
        "learning_rate=0.05",
        "together=true",
        "merge_experts=false",
        "router.kind=uniform",
        "router.train={}",
        f"output_dir={tmp_path / 'mix'}",
    ]
    capsys.readouterr()
    assert run_lorry("moe", workspace / "experts.yaml", *words) == 0
    told = capsys.readouterr().err
    log = tmp_path / "mix" / "experts" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name, choose in (("one", min), ("two", max)):
        losses = {
            line["step"]: line["adapters"][name]["eval_loss"]
            for line in lines
            if "eval_loss" in line.get("adapters", {}).get(name, {})
        }
        assert len(losses) == 3
        step = choose(losses, key=losses.__getitem__)
        assert f"loaded the best adapter, of {name}, of step {step}" in told


def test_gates_that_llama_cpp_makes_otherwise_are_told_before_anything_trains(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The project's default base is a Qwen2, its default one expert a token: hours later the GGUF file
    would have been refused."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2).save_pretrained(
        tmp_path / "q"
    )
    rows = str(workspace / "a.jsonl")
    file = tmp_path / "rmoe.json"
    values = {
        "method": "rmoe",
        "base_model": str(tmp_path / "q"),
        "output_dir": str(tmp_path / "out"),
    }
    file.write_text(json.dumps({**values, "datasets": [rows, str(workspace / "b.jsonl")]}))
    assert run_lorry("moe", file) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "norm_topk_prob=true with 1 of 2 experts" in told
    assert "conversion_mode=average makes one dense model" in told
    assert not (tmp_path / "out").exists()


def test_experts_in_turn_have_the_rank_that_fits(workspace: Path, tmp_path: Path) -> None:
    words = (
        *("memory_budget=3GiB", "merge_experts=false", "router.kind=uniform", "router.train={}"),
        f"experts=[{{name: one, data: {workspace / 'a.jsonl'}, r: auto}}, "
        f"{{name: two, adapter: {workspace / 'work' / 'experts' / 'two'}, data: {workspace / 'b.jsonl'}}}]",
        f"output_dir={tmp_path / 'mix'}",
    )
    assert run_lorry("moe", workspace / "experts.yaml", *words) == 0
    ranks = {
        name: json.loads(
            (tmp_path / "mix" / "gating_network" / name / "adapter_config.json").read_text()
        )["r"]
        for name in ("one", "two")
    }
    assert ranks["two"] == 4
    # the largest that the model's narrowest matrix has room for
    assert ranks["one"] > 4
