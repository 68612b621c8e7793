"""Contracts 1 to 4 broken on purpose: the run stops, says what and where, and records it as failed
in contracts.json.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lorry.adapters.attach import get_bank
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings, ParameterSetOptimizer
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.errors import ContractError, LorryError
from lorry.models.decoder import attention, model
from lorry.train import engine
from lorry.train.checks import CONTRACT_NAMES, ContractChecks
from lorry.train.monitoring.events import StepRecord
from lorry.train.setup import adapters
from tests.support import tinyrun
from tests.support.breaking import MODULES, Broken, Start, after, changed_example, silent_attention
from tests.support.seam import Fixed, examples
from tests.support.tinyrun import Heard, engine_for, quick  # noqa: F401 - a fixture


def test_a_sound_run_keeps_all_of_them(start: Start) -> None:
    contracts = start(test_size=2, lora_dropout=0.1, packing=True).contracts
    assert [(c["id"], c["name"], c["status"]) for c in contracts] == [
        (n, CONTRACT_NAMES[n], "held") for n in range(1, 9)
    ]
    details = [c["detail"] for c in contracts]
    assert details[0] == "2 modules: down_proj, q_proj"
    assert details[1].startswith("4 tensors; digest of a sample of the base model ")
    assert details[2] == "2 zero-initialised matrices changed within 3 steps; each had a gradient"
    assert details[5].startswith("step-00000005 verified by SHA-256")
    assert "10 rows, 10 sequences" in details[7]


# --- 1: targets


def test_1_a_target_that_matches_nothing(start: Start, tmp_path: Path) -> None:
    with pytest.raises(LorryError, match=r"q_prj.*did you mean 'q_proj'") as e:
        start(target_modules=["q_prj", "v_proj"])
    assert e.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_1_an_adapter_on_no_module() -> None:
    checks = ContractChecks()
    with pytest.raises(
        ContractError, match=r"contract 1 broken .*adapter 'default' is attached to no module"
    ):
        checks.begin(engine_for(Fixed([[examples(1)]]), Path()).backend, {"default": []})
    assert checks.report()[0]["status"] == "failed"
    assert {c["status"] for c in checks.report()[1:]} == {"not_checked"}


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_1_says_what_of_a_mixture_got_no_adapter(
    start: Start, tmp_path: Path, targets: str
) -> None:
    """Its experts, which are tensors and no linears, have one; its router has none."""
    heard = Heard()
    start("mixtral", [heard], target_modules=targets)
    first = json.loads((tmp_path / "run" / "contracts.json").read_text())[0]
    inner = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["target_modules"]
    assert first["status"] == "held"
    left_out = "not adapted: 1 weights such as model.layers.0.mlp.gate.weight"
    assert first["detail"].endswith(left_out) or f"{left_out}," in first["detail"]
    assert "down_proj, gate_up_proj, k_proj" in first["detail"]
    assert sorted(inner) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert any("model.layers.0.mlp.gate.weight" in note for note in heard.notes)


def test_1_auto_leaves_out_what_text_does_not_reach_and_says_so(
    start: Start, tmp_path: Path
) -> None:
    """Mamba uses the weight of dt_proj past the layer: an adapter there would never train."""
    heard = Heard()
    start("mamba", [heard], target_modules="auto")
    contracts = json.loads((tmp_path / "run" / "contracts.json").read_text())
    assert [c["status"] for c in contracts] == ["held"] * 8
    assert "not adapted: 2 tensors such as" in contracts[0]["detail"]
    assert "1 linear layers such as backbone.layers.0.mixer.dt_proj" in contracts[0]["detail"]
    assert not any("expert" in text for text in heard.notes)
    assert any(
        "since it runs the whole sequence again for every token" in text for text in heard.notes
    )


# --- 2: trainable = optimized = saved, frozen weights unchanged


def tampered_slot(change: Callable[[Any], None]) -> Callable[..., None]:
    return lambda name, run, opened, notes: change(get_bank(opened.model)[name].slots[MODULES[1]])


def test_2_a_frozen_matrix(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    after(
        monkeypatch,
        adapters,
        "attach_adapter",
        tampered_slot(lambda slot: slot.B.requires_grad_(False)),
    )
    broken(
        2,
        r"default/model\.layers\.0\.mlp\.down_proj\.lora_B is optimized but not trainable \(1 tensors\)",
    )


def test_2_a_matrix_that_is_not_the_optimizers(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a copy: the layer computes with one tensor, the optimizer updates another."""

    def copy(slot: Any) -> None:
        slot.B = torch.nn.Parameter(slot.B.detach().clone())

    after(monkeypatch, adapters, "attach_adapter", tampered_slot(copy))
    broken(2, r"down_proj\.lora_B is trainable but no optimizer holds it \(1 tensors\)")


@pytest.mark.parametrize(
    ("missing", "named"),
    [("half", ("lora_B", r"\(2 tensors\)")), ("last", (r"down_proj\.lora_B", r"\(1 tensors\)"))],
)
def test_2_an_optimizer_that_misses_some(
    broken: Broken, monkeypatch: pytest.MonkeyPatch, missing: str, named: tuple[str, str]
) -> None:
    def forget(result: None, self: ParameterSetOptimizer, *args: Any) -> None:
        groups = self.stepped_groups
        if missing == "half":
            groups.pop()
        else:
            last = list(self.params.slots.values())[-1].B.numel()
            groups[1].values = groups[1].values[:-last]

    after(monkeypatch, ParameterSetOptimizer, "__init__", forget)
    broken(2, rf"{named[0]} is trainable but no optimizer holds it {named[1]}")


def test_2_a_base_weight_left_trainable(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    after(
        monkeypatch,
        adapters,
        "attach_adapter",
        lambda name, run, opened, notes: opened.model.get_parameter(
            "model.norm.weight"
        ).requires_grad_(True),
    )
    broken(2, r"model\.norm\.weight is trainable but no optimizer holds it")


def test_2_a_tensor_that_would_not_be_saved(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(
        monkeypatch,
        LocalBackend,
        "state",
        lambda state, self: state.pop(f"adapter/default/{MODULES[0]}.lora_A"),
    )
    broken(
        2, r"default/model\.layers\.0\.self_attn\.q_proj\.lora_A is trained but would not be saved"
    )


class Meddler(tinyrun.Heard):
    """Does something to the run after step 2."""

    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__()
        self.deed = deed

    def step(self, record: StepRecord) -> None:
        if record["step"] == 2:
            self.deed()


def test_2_a_base_weight_that_changes(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    after(
        monkeypatch,
        adapters,
        "attach_adapter",
        lambda name, run, opened, notes: seen.append(opened.model),
    )
    nudge = Meddler(
        lambda: seen[0].get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0].mul_(1.001)
    )
    broken(
        2,
        "a weight of the base model or of a frozen adapter changed during training",
        listeners=[nudge],
    )


# --- 3: everything trains


@pytest.mark.parametrize("steps", [5, 2])
def test_3_a_gradient_that_never_arrives(
    broken: Broken, models: Callable[[str], Path], tmp_path: Path, steps: int
) -> None:
    base = silent_attention(models("llama"), tmp_path)
    message = r"no gradient reached model\.layers\.0\.self_attn\.q_proj of adapter 'default' \(1 modules\), so it would never train"
    broken(3, message, base=base, max_steps=steps, lr_scheduler_type="constant")


def test_3_names_the_setting_that_leaves_a_silent_layer_out(broken: Broken, start: Start) -> None:
    remedy = r"so it would never train; leave it out, lora\.exclude_modules=\[dt_proj\]$"
    broken(3, remedy, base="mamba", target_modules="all-linear", lr_scheduler_type="constant")


def test_3_the_setting_that_leaves_it_out_does(start: Start) -> None:
    contracts = start("mamba", target_modules="all-linear", exclude_modules=["dt_proj"]).contracts
    assert {c["status"] for c in contracts} == {"held"}


def test_3_a_name_shared_with_layers_that_train_is_said_longer() -> None:
    checks = ContractChecks()
    modules = [
        f"layers.{i}.{half}.{part}"
        for i in (0, 1)
        for half in ("self_attn", "encoder_attn")
        for part in ("q", "k")
    ]
    checks._start = {
        f"adapter/a/{module}.lora_B": "" for module in [*modules, "layers.0.fc", "layers.1.dead"]
    }
    silent = [module for module in modules if "encoder" in module]
    assert (
        checks._excluding("a", [*silent, "layers.1.dead"])
        == "lora.exclude_modules=[encoder_attn.q,encoder_attn.k,dead]"
    )


def test_3_modules_whose_ranks_are_all_taken_may_stand_still() -> None:
    checks = ContractChecks()
    at = {f"adapter/a/{m}.lora_{half}": "zero" for m in ("q", "k") for half in ("B", "E")}
    checks._start = at
    # one factor moved, the other is 0 again: its module's B stands with it, another's B does not
    unmoved = ["adapter/a/q.lora_E", "adapter/a/q.lora_B", "adapter/a/k.lora_B"]
    assert checks._without_taken_ranks("a", unmoved) == ["adapter/a/k.lora_B"]
    # no factor moved at all: nothing trains
    assert checks._without_taken_ranks("a", [*at]) == [*at]
    # an adapter that has none
    checks._start = {"adapter/a/q.lora_B": "zero"}
    assert checks._without_taken_ranks("a", ["adapter/a/q.lora_B"]) == ["adapter/a/q.lora_B"]


def test_3_a_matrix_that_does_not_move(tmp_path: Path) -> None:
    """B's rate is zero: gradients everywhere, and yet nothing is learnt."""
    stuck = engine_for(
        Fixed([[examples(2, s)] for s in range(5)]),
        tmp_path,
        optim=OptimSettings(loraplus_lr_ratio=0.0),
    )
    stuck.checks.begin(stuck.backend, {"default": list(stuck.backend.bank["default"].slots)})  # type: ignore[attr-defined]
    with pytest.raises(
        ContractError,
        match=r"contract 3 broken .*lora_B did not change in 3 steps \(14 tensors\): not trained",
    ):
        stuck.run()
    # the first has a rate of 0 and proves nothing; the fourth is not counted as done
    assert stuck.progress.step == 3


def test_3_steps_with_a_rate_of_zero_prove_nothing(start: Start) -> None:
    """A warmup's first step moves nothing; a run of such steps alone trained nothing, and says so."""
    assert start(max_steps=1).contracts[2]["status"] == "held"
    with pytest.raises(ContractError, match="no step with a learning rate above 0"):
        start(max_steps=1, warmup_steps=1)


def test_3_the_best_of_a_short_run_may_be_its_unmoved_start(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's rate is 0, and its adapter is what is loaded at the end; the proof is about
    the steps behind it.
    """
    scores = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(engine, "evaluate_task", lambda *_: {"eval_loss": next(scores)})
    result = start(
        max_steps=3, warmup_steps=1, test_size=2, eval_steps=1, load_best_model_at_end=True
    )
    assert result.outcome.best_step == 1
    assert (result.contracts[2]["status"], result.contracts[2]["detail"][:48]) == (
        "held",
        "2 zero-initialised matrices changed within 2 ste",
    )


# --- 4: loss weights and packing


def test_4_a_row_with_nothing_to_learn(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_example(monkeypatch, lambda e: replace(e, weights=[0.0] * len(e.weights)))
    broken(4, r"sequence \d \(key \d+\) has no supervised token")


def test_4_a_row_that_never_learns_to_stop(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(e: TokenizedExample) -> TokenizedExample:
        last = max(i for i, w in enumerate(e.weights) if w)
        return replace(e, weights=[0.0 if i == last else w for i, w in enumerate(e.weights)])

    changed_example(monkeypatch, endless)
    broken(
        4, r"sequence \d \(key \d+\) does not teach the model to stop: no end token is supervised"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_4_attention_that_sees_the_neighbour(
    broken: Broken, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    original = attention.PackedSegments

    def merged(segments: Any, device: Any, places: Any) -> Any:
        return original([(segments[0][0], segments[-1][1])], device)

    monkeypatch.setattr(model, "PackedSegments", merged)
    monkeypatch.setenv("LORRY_PROOFS", "0")  # they would see it when the model is loaded
    broken(
        4,
        r"a sequence's scores change by \d\.\d\de[-+]\d\d with the tokens of other sequences",
        base=family,
        target_modules="auto",
    )


def test_4_rounding_passes_only_where_shapes_follow_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A change of 5e-5 is a leak, unless experts that are whole MLPs allow for rounding."""
    monkeypatch.setattr("lorry.train.checks.packing_leak", lambda *given: 5e-5)
    monkeypatch.setattr("lorry.train.checks.repeat_difference", lambda *given: 0.0)
    monkeypatch.setattr("lorry.train.checks.packed_loss_difference", lambda *given: 0.0)
    checks, batches = ContractChecks(), [collate(examples(4))]
    for limit in (0.0, 4e-5):
        with pytest.raises(ContractError, match=r"change by 5\.00e-05"):
            checks.first_batches(
                cast(Any, None), batches, [()], tolerance=1e-5, leak_tolerance=limit
            )
    checks.first_batches(cast(Any, None), batches, [()], tolerance=1e-5, leak_tolerance=1e-4)
    assert checks.results[4].status == "held"


@pytest.mark.parametrize("sequences", [1, 4])
def test_4_results_that_do_not_repeat(sequences: int) -> None:
    """Not a leak: the same tokens are given other scores the next time."""
    scores = itertools.count()

    class Unsteady:
        def score(self, batches: Any, wants: Any) -> Any:
            return [{"logprob": torch.full((len(batches[0].tokens),), float(next(scores)))}]

    batch = collate(examples(sequences))
    with pytest.raises(ContractError, match=r"scores of one batch change by .* scored again"):
        ContractChecks().first_batches(cast(Any, Unsteady()), [batch], [()], tolerance=1e-5)


def test_4_positions_that_do_not_restart(
    broken: Broken, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned positions tell a sequence where it lies in the batch; rotary ones are relative and do
    not mind.
    """
    monkeypatch.setattr(
        Batch, "positions", property(lambda self: torch.arange(self.tokens.numel()))
    )
    assert start("llama", per_device_train_batch_size=2).contracts[3]["status"] == "held"
    broken(
        4,
        r"the loss of packed and of single sequences differs by .* \(at most 1e-05\)",
        base="gpt2",
        target_modules="auto",
        per_device_train_batch_size=2,
    )
