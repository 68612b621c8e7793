"""The configurations of LoRA that PEFT itself is tested with, trained in PEFT and read by Lorry's decoder, by
transformers' classes with the bank in them, and by a plain torch model: logits, the gradients of a step,
merged weights. `pytest -s` prints the table: read, refused with the reason, or wrong (none).

Float32. PEFT's own model is the judge everywhere.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_interop import words
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.merge import merge
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.errors import ConfigError, ModelError
from tests.support.twins import native

TWO = ["{0}", "{1}"]
# What PEFT's test_decoder_models, test_custom_models, test_initialization, test_lora_variants,
# test_trainable_tokens set. {0} and {1}: two linears of the family, {e} its embedding.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": TWO},
    "one linear": {"target_modules": ["{0}"]},
    "alpha 32": {"target_modules": TWO, "lora_alpha": 32},
    "dropout": {"target_modules": TWO, "lora_dropout": 0.1},
    "rslora": {"target_modules": TWO, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(0|2)\..*{0}"},
    "rank pattern": {"target_modules": TWO, "rank_pattern": {"{0}": 2}},
    "alpha pattern": {"target_modules": TWO, "alpha_pattern": {"{1}": 20}},
    "some layers": {"target_modules": TWO, "layers_to_transform": [0, 2]},
    "excluded": {"target_modules": TWO, "exclude_modules": r".*\.1\..*"},
    "embedding": {"target_modules": ["{e}"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding, tied": {"target_modules": ["{e}", "{0}"], "ensure_weight_tying": True},
    "head, tied": {"target_modules": ["lm_head", "{0}"], "ensure_weight_tying": True},
    "both ends": {"target_modules": ["{e}", "lm_head", "{0}"]},
    "gaussian": {"target_modules": TWO, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": TWO, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": TWO, "init_lora_weights": "mica"},
    "dora": {"target_modules": TWO, "use_dora": True},
    "dora, rslora": {"target_modules": TWO, "use_dora": True, "use_rslora": True},
    "dora, embedding": {"target_modules": ["{e}", "{0}"], "use_dora": True},
    "lora bias": {"target_modules": TWO, "lora_bias": True},
    "bias all": {"target_modules": TWO, "bias": "all"},
    "bias lora_only": {"target_modules": TWO, "bias": "lora_only"},
    "head saved": {"target_modules": TWO, "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": TWO, "modules_to_save": ["{e}"]},
    "tokens": {"target_modules": TWO, "trainable_token_indices": [5, 6]},
    "tokens, named": {"target_modules": TWO, "trainable_token_indices": {"{e}": [3, 9, 11]}},
    "invocation": {"target_modules": TWO, "alora_invocation_tokens": [4, 2]},
    "pissa": {"target_modules": TWO, "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["{0}"], "init_lora_weights": "olora"},
    "replication": {"target_modules": TWO, "layer_replication": [[0, 2], [1, 3]]},
    "qalora": {"target_modules": TWO, "use_qalora": True, "qalora_group_size": 8},
}
# with what is read instead, or why nothing can be
REFUSED = {
    "pissa": "changed the base weights",
    "olora": "changed the base weights",
    "replication": "layer_replication",
    "qalora": "use_qalora",
}
FAMILIES = ("llama", "llama-tied", "gpt2", "gpt_neox")
WAYS = ("Lorry's decoder", "transformers")
# of parameters that stand once more in PEFT's names than in ours
PEFT_PARTS = (
    (".lora_A", ".lora_A.default.weight"),
    (".lora_B", ".lora_B.default.weight"),
    (".lora_B.bias", ".lora_B.default.bias"),
    (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"),
    (".token_adapter.trainable_tokens_delta", ".token_adapter.trainable_tokens_delta.default"),
)


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str, str], str]]:
    rows: dict[tuple[str, str, str], str] = {}
    yield rows
    counts = Counter(outcome.partition(":")[0] for outcome in rows.values())
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    for (name, family, way), outcome in rows.items():
        print(f"{name:18s} {family:12s} {way:16s} {outcome}")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT warns of Conv1D's layout, of tied heads and of saved embeddings, all of which are meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(model: nn.Module, case: dict[str, Any], seed: int = 5) -> nn.Module:
    """PEFT's model with values in place of what a new adapter has: near those, and none zero."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **case}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in theirs.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn(param.shape, generator=draw))
    return theirs


def compare_gradients(theirs: nn.Module, ours: Adapter) -> None:
    """The gradients of every A, B and what is beside them, where PEFT has the parameter by that name."""
    found, compared = dict(theirs.named_parameters()), 0
    for name, gradient in ours.split_like(ours.grads).items():
        names = [
            f"base_model.model.{name.removesuffix(end)}{theirs_end}"
            for end, theirs_end in PEFT_PARTS
            if name.endswith(end)
        ]
        # an embedding's A and B are parameters of their own there
        names += [
            f"base_model.model.{name.replace('.lora_', '.lora_embedding_')}.default",
            "base_model.model.{}.modules_to_save.default.{}".format(*name.rsplit(".", 1)),
            f"base_model.model.{name}",
        ]
        mine = next((found[each] for each in names if each in found), None)
        assert mine is not None, f"{name}: PEFT has none of {names}"
        if mine.grad is None:  # a frozen half, which a file does not tell from any other
            assert not mine.requires_grad, name
            continue
        expected = mine.grad
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(
            gradient / scale,
            expected / scale,
            rtol=0,
            atol=1e-5,
            msg=lambda text, n=name: f"{n}: {text}",
        )
        compared += 1
    assert compared == sum(param.requires_grad for param in theirs.parameters())


def loss_of(scores: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_what_peft_trains_is_read_or_refused(
    name: str, family: str, tiny: Any, ids: Tensor, logits: Any, tmp_path: Path, table: Any
) -> None:
    case = words(CONFIGURATIONS[name], family)
    if name == "olora" and family == "gpt2":
        pytest.skip(
            "PEFT's own forward pass fails: its OLoRA takes a Conv1D's matrix for a linear's"
        )
    # the invocation stands in the second row alone
    if name == "invocation":
        ids[1, 4:6] = torch.tensor(case["alora_invocation_tokens"])
    try:
        theirs = trained(tiny(family), case)
    except (ValueError, RuntimeError, TypeError) as error:
        pytest.skip(f"PEFT makes no such adapter: {str(error)[:120]}")
    theirs.save_pretrained(tmp_path)
    if name in REFUSED:
        for way in WAYS:
            with pytest.raises((ModelError, ConfigError), match=REFUSED[name]) as refusal:
                load_adapter(opened(tiny(family), way), tmp_path)
            table[name, family, way] = f"refused: {str(refusal.value).partition(': ')[2][:90]}"
        return
    expected = logits(theirs, ids)
    plain = logits(tiny(family), ids)
    assert (expected - plain).abs().max() > 1e-2, "the adapter must matter"
    theirs.zero_grad()
    loss_of(theirs(input_ids=ids).logits, ids).backward()
    merged, nowhere = None, False
    if name != "invocation":
        # of a tied matrix PEFT merges into both sides, so that its merged model is another one
        is_tied = family in ("llama-tied", "gpt2") and any(
            end in str(case["target_modules"]) for end in ("lm_head", "embed_tokens", "wte")
        )
        # and what no bias can take up it refuses, as ours does
        nowhere = name == "lora bias" and family.startswith("llama")
        whole = theirs if is_tied or nowhere else copy.deepcopy(theirs).merge_and_unload()
        merged = logits(whole, ids)
    for way in WAYS:
        model = opened(tiny(family), way)
        adapter = load_adapter(model, tmp_path)
        got = logits(model, ids)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        loss_of(model(input_ids=ids).logits, ids).backward()
        compare_gradients(theirs, adapter)
        if nowhere:
            with pytest.raises(
                ConfigError, match="has no bias, which lora_bias would be merged into"
            ):
                merge(model)
        elif merged is not None:
            merge(model)
            torch.testing.assert_close(logits(model, ids), merged, rtol=0, atol=1e-4)
        table[name, family, way] = f"read: {float((got - expected).abs().max()):.1e}"


def opened(model: nn.Module, way: str) -> nn.Module:
    """The same base for a way of running it."""
    return native(model) if way == WAYS[0] else model


class Plain(nn.Module):
    """No transformer: what PEFT's tests of custom models adapt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb = nn.Embedding(32, 16)
        self.lin0 = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.lin1 = nn.Linear(24, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lin1(self.norm(torch.relu(self.lin0(self.emb(ids)))))
        return out


BOTH = ["lin0", "lin1"]
PLAIN: dict[str, dict[str, Any]] = {
    "one": {"target_modules": ["lin0"]},
    "both": {"target_modules": BOTH, "lora_alpha": 32},
    "embedding": {"target_modules": ["emb", "lin0"]},
    "rslora": {"target_modules": BOTH, "use_rslora": True},
    "one saved": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "norm saved": {"target_modules": ["lin0"], "modules_to_save": ["norm"]},
    "dora": {"target_modules": BOTH, "use_dora": True},
    "dora, embedding": {"target_modules": ["emb", "lin0"], "use_dora": True},
    "lora bias": {"target_modules": ["lin0"], "lora_bias": True},
    "bias all": {"target_modules": BOTH, "bias": "all"},
    "bias lora_only": {"target_modules": BOTH, "bias": "lora_only"},
    "tokens": {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [1, 5]}},
}


@pytest.mark.parametrize("name", list(PLAIN))
def test_of_a_plain_torch_model_too(name: str, tmp_path: Path) -> None:
    theirs = trained(Plain().eval(), {**PLAIN[name], "task_type": None})
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids)
    (expected.square().mean()).backward()
    model = Plain().eval()
    adapter = load_adapter(model, tmp_path)
    got = model(ids)
    assert (got - Plain()(ids)).abs().max() > 1e-2, "the adapter must matter"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    got.square().mean().backward()
    compare_gradients(theirs, adapter)
    save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(Plain().eval(), tmp_path / "again")
    torch.testing.assert_close(again(ids), expected, rtol=0, atol=1e-5)
    whole = copy.deepcopy(theirs).merge_and_unload()
    merge(model)
    torch.testing.assert_close(model(ids), whole(ids), rtol=0, atol=1e-4)


class Stack(nn.Module):
    """Layers in lists inside of one another, at the very top."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"layers": nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(4, 4)}) for _ in range(2))}
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for outer in self.layers:
            for inner in outer["layers"]:
                x = x + torch.tanh(inner["lin"](x))
        return x


def test_the_first_of_several_numbers_is_a_layers_pattern(tmp_path: Path) -> None:
    case = {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}
    theirs = trained(Stack(), {**case, "task_type": None})
    theirs.save_pretrained(tmp_path)
    adapter = load_adapter(model := Stack(), tmp_path)
    assert {path.split(".")[1] for path in adapter.slots} == {"0", "2"}
    assert len(adapter.slots) == 4
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
