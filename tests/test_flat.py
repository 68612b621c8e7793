"""examples/flat.py: short, plain, right by independent arithmetic, and readable by PEFT."""

from __future__ import annotations

import ast
import json
import random
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

FLAT = Path(__file__).resolve().parent.parent / "examples" / "flat.py"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PEOPLE = [
    ("Ada", "red"),
    ("Bo", "blue"),
    ("Cleo", "green"),
    ("Dov", "black"),
    ("Eve", "white"),
    ("Finn", "yellow"),
]
ROWS = [
    {"question": f"What colour is the house of {who}?", "answer": f"It is {colour}."}
    for who, colour in PEOPLE
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, four special ones, a beginning of text put in front: 260 tokens."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*specials, *letters])}, merges=[])
    )
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = ByteLevel()
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[2:],
    )
    made.chat_template = template
    return made


def random_directory(path: Path, config: Any, template: str | None = None) -> Path:
    """A Hugging Face directory with a random model and the byte tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    byte_tokenizer(template).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return random_directory(tmp_path_factory.mktemp("llama"), config)


def test_it_is_short_and_knows_nothing_of_lorry() -> None:
    text = FLAT.read_text()
    assert len(text.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(text)))
    imported = {
        alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        (node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
    }
    assert imported <= {"json", "pathlib", "safetensors", "sys", "torch", "transformers", "typing"}


def test_loss_falls_on_a_real_model(flat: Any, stories: Path, tmp_path: Path) -> None:
    shutil.copytree(stories, tmp_path / "model", copy_function=shutil.copyfile)
    (tmp_path / "model").chmod(0o755)
    byte_tokenizer(None).save_pretrained(tmp_path / "model")
    options = {"r": 8, "alpha": 16, "lr": 1e-2, "steps": 30, "batch": 3, "warmup": 2}
    losses = flat.train(tmp_path / "model", ROWS, **options)
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    assert losses == flat.train(tmp_path / "model", ROWS, **options)


def test_the_seed_draws_a(flat: Any, llama: Path) -> None:
    one, two = (flat.train(llama, ROWS, steps=4, lr=1e-2, warmup=0, seed=seed) for seed in (0, 1))
    assert one[0] == two[0]  # B is zero: the draw does not show yet
    assert one[1:] != two[1:]


@pytest.mark.parametrize("row", [ROWS[0], {"prompt": "Say it twice: no", "completion": " no no "}])
def test_a_plain_prompt_is_masked_and_the_end_is_learnt(flat: Any, row: dict[str, str]) -> None:
    tokenizer = byte_tokenizer(None)
    ids, learnt = flat.encode(tokenizer, row)
    said = [token for token, taken in zip(ids, learnt, strict=True) if taken]
    asked = [token for token, taken in zip(ids, learnt, strict=True) if not taken]
    if "prompt" in row:
        assert (tokenizer.decode(asked), tokenizer.decode(said)) == (
            "<s>Say it twice: no",
            " no no </s>",
        )
    else:
        assert tokenizer.decode(asked) == "<s>Question: What colour is the house of Ada?\nAnswer:"
        assert tokenizer.decode(said) == " It is red.</s>"


def test_a_chat_prompt_is_masked_and_the_end_of_turn_is_learnt(flat: Any) -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids, learnt = flat.encode(tokenizer, ROWS[1])
    edge = learnt.index(True)
    assert learnt == [False] * edge + [True] * (len(ids) - edge)
    asked = "<|im_start|>user\nWhat colour is the house of Bo?<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.decode(ids[:edge]), tokenizer.decode(ids[edge:])) == (
        asked,
        "It is blue.<|im_end|>",
    )
    endless = byte_tokenizer(CHATML.replace("<|im_end|>", ""))
    ids, learnt = flat.encode(endless, ROWS[1])
    assert (
        endless.decode([t for t, taken in zip(ids, learnt, strict=True) if taken])
        == "It is blue.</s>"
    )


def test_a_loss_is_the_mean_over_the_tokens_of_the_step(flat: Any, llama: Path) -> None:
    """Row by row, unpadded, in float64, with the untouched model; rows wrap around in their order."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    total, count = 0.0, 0
    for row in [*ROWS, *ROWS[:2]]:
        ids, learnt = flat.encode(tokenizer, row)
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logp[t - 1, ids[t]].detach()) for t in range(1, len(ids)) if learnt[t])
        count += sum(learnt)
    (loss,) = flat.train(llama, ROWS, steps=1, batch=4, accumulation=2)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_cutting_a_step_into_micro_batches_changes_nothing(flat: Any, llama: Path) -> None:
    runs = [
        flat.train(llama, ROWS, steps=6, batch=b, accumulation=a, lr=1e-2, warmup=1)
        for b, a in ((6, 1), (2, 3), (1, 6))
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0] == pytest.approx(runs[2], rel=1e-5)
    assert runs[0][-1] < runs[0][0]


def test_given_starting_values_replace_the_draw(flat: Any, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    start = {
        f"{p}.lora_A": layer.A.detach().clone()
        for p, layer in flat.attach(model, 4, 8.0, seed=7).items()
    }
    options = {"r": 4, "alpha": 8.0, "steps": 5, "lr": 1e-2, "warmup": 1}
    assert len(start) == 14
    assert flat.train(llama, ROWS, **options, seed=0, init=start) == flat.train(
        llama, ROWS, **options, seed=7
    )
    with pytest.raises(KeyError):
        flat.train(
            llama,
            ROWS,
            **options,
            init={"lm_head.lora_A": start["model.layers.0.self_attn.q_proj.lora_A"]},
        )


def test_the_gradient_norm_is_clipped(
    flat: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    step = torch.optim.AdamW.step

    def watch(self: Any, *args: Any) -> Any:
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        seen.append(
            (self.param_groups[0]["lr"], float(torch.stack([g.norm() for g in grads]).norm()))
        )
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    flat.train(llama, ROWS, steps=4, warmup=2, lr=0.1, max_grad_norm=1e-3)
    assert [lr for lr, _ in seen] == pytest.approx([0.0, 0.05, 0.1, 0.05])
    assert [norm for _, norm in seen] == pytest.approx([1e-3] * 4, rel=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_the_adapter(flat: Any, llama: Path, tmp_path: Path, kind: str) -> None:
    base = llama
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
        )
        base = random_directory(tmp_path / "gpt2", config)
    flat.train(base, ROWS, r=4, alpha=12.0, steps=8, lr=1e-2, warmup=1, out=tmp_path / "adapter")
    ids = torch.tensor([[random.Random(i).randrange(260) for i in range(40)]])
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = fresh(ids).logits
    layers = flat.attach(fresh, 4, 12.0, seed=0)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(layers)
    for path, layer in layers.items():
        for side in "AB":
            getattr(layer, side).data.copy_(saved[f"base_model.model.{path}.lora_{side}.weight"])
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    torch.testing.assert_close(theirs(ids).logits, fresh(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, fresh(ids).logits, atol=0.1)


def test_the_command_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "people.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(sys, "argv", [str(FLAT), str(llama), str(data), str(tmp_path / "out")])
    runpy.run_path(str(FLAT), run_name="__main__")
    assert f"the adapter is in {tmp_path / 'out'}" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    monkeypatch.setattr(sys, "argv", [str(FLAT)])
    with pytest.raises(SystemExit, match=r"MODEL_DIR DATA.jsonl OUT_DIR"):
        runpy.run_path(str(FLAT), run_name="__main__")
