"""Every contract of a run broken on purpose: the run stops, says what and where, exits with the right code, records it as failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from safetensors.torch import load_file, save_file
from seam import Fixed, examples
from tinyrun import engine_for, quick  # noqa: F401 - a fixture

from lorry import cli
from lorry.backends.local import Local
from lorry.backends.optim import AdapterOptimizer, OptimSettings
from lorry.bank.attach import bank_of
from lorry.data.batch import Batch, Example
from lorry.data.tokenset import TokenSet
from lorry.errors import ContractError, DataError, LorryError, ModelError, NonFiniteError
from lorry.models import attention, decoder
from lorry.train import artifacts, checkpoint, session
from lorry.train.checks import NAMES, Checks
from lorry.train.events import Record
from lorry.train.session import Result, train_sft

Start = Callable[..., Result]
Broken = Callable[..., None]
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tinyrun.model_directory(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture
def start(models: Callable[[str], Path], tmp_path: Path) -> Start:
    """Five steps in ``tmp_path/run``."""
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(12))

    def go(base: Path | str = "llama", listeners: Any = (), **settings: Any) -> Result:
        model = models(base) if isinstance(base, str) else base
        given = {"max_steps": 5, "save_steps": 2, "target_modules": ["q_proj", "down_proj"], **settings}
        return train_sft(tinyrun.described(model, data, tmp_path / "run", **given), [], listeners)

    return go


@pytest.fixture
def broken(start: Start, tmp_path: Path) -> Broken:
    """The run must end with this contract broken, in words and in contracts.json."""

    def check(number: int, message: str, *, error: type[LorryError] = ContractError, code: int = 5, **settings: Any) -> None:
        with pytest.raises(error, match=message) as raised:
            start(**settings)
        assert type(raised.value) is error
        assert raised.value.exit_code == code
        if error is ContractError:
            assert str(raised.value).startswith(f"contract {number} broken ({NAMES[number]}): ")
        written = json.loads((tmp_path / "run" / "contracts.json").read_text())
        assert [c["id"] for c in written if c["status"] == "failed"] == [number]
        assert written[number - 1]["detail"] in str(raised.value)
        assert not (tmp_path / "run" / "receipt.json").exists()

    return check


def after(patch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[..., object]) -> None:
    """Call ``then(result, *args)`` behind a function."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then(result, *args)
        return result

    patch.setattr(owner, name, wrapped)


def test_a_sound_run_keeps_all_of_them(start: Start) -> None:
    contracts = start(test_size=2, lora_dropout=0.1, packing=True).contracts
    assert [(c["id"], c["name"], c["status"]) for c in contracts] == [(n, NAMES[n], "held") for n in range(1, 9)]
    details = [c["detail"] for c in contracts]
    assert details[0] == "2 modules: down_proj, q_proj"
    assert details[1].startswith("4 tensors; digest of the base's sample ")
    assert details[2] == "2 zero-initialised matrices moved within 3 steps; a gradient at each"
    assert details[5].startswith("step-00000005 verified by SHA-256")
    assert "10 rows, 10 sequences" in details[7]


# --- 1: targets


def test_1_a_target_that_matches_nothing(start: Start, tmp_path: Path) -> None:
    with pytest.raises(LorryError, match=r"q_prj.*did you mean 'q_proj'") as e:
        start(target_modules=["q_prj", "v_proj"])
    assert e.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_1_an_adapter_on_no_module() -> None:
    checks = Checks()
    with pytest.raises(ContractError, match="contract 1 broken .*adapter 'default' sits on no module"):
        checks.begin(engine_for(Fixed([[examples(1)]]), Path()).backend, {"default": []})
    assert checks.report()[0]["status"] == "failed"
    assert {c["status"] for c in checks.report()[1:]} == {"not_checked"}


# --- 2: trainable = optimized = saved, base unchanged


def tampered_slot(change: Callable[[Any], None]) -> Callable[..., None]:
    return lambda name, run, opened, notes: change(bank_of(opened.model)[name].slots[MODULES[1]])


def test_2_a_frozen_matrix(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, session, "attach_adapter", tampered_slot(lambda slot: slot.B.requires_grad_(False)))
    broken(2, r"default/model\.layers\.0\.mlp\.down_proj\.lora_B is optimized but not trainable \(1 tensors\)")


def test_2_a_matrix_that_is_not_the_optimizers(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a copy: the layer computes with one tensor, the optimizer updates another."""

    def copy(slot: Any) -> None:
        slot.B = torch.nn.Parameter(slot.B.detach().clone())

    after(monkeypatch, session, "attach_adapter", tampered_slot(copy))
    broken(2, r"down_proj\.lora_B is trainable but no optimizer holds it \(1 tensors\)")


@pytest.mark.parametrize(("missing", "named"), [("half", ("lora_B", r"\(2 tensors\)")), ("last", (r"down_proj\.lora_B", r"\(1 tensors\)"))])
def test_2_an_optimizer_that_misses_some(
    broken: Broken, monkeypatch: pytest.MonkeyPatch, missing: str, named: tuple[str, str]
) -> None:
    def forget(result: None, self: AdapterOptimizer, *args: Any) -> None:
        groups = self.adamw.param_groups
        if missing == "half":
            groups.pop()
        else:
            last = list(self.adapter.slots.values())[-1].B.numel()
            groups[1]["params"] = [torch.nn.Parameter(self.halves[1].data[:-last])]

    after(monkeypatch, AdapterOptimizer, "__init__", forget)
    broken(2, rf"{named[0]} is trainable but no optimizer holds it {named[1]}")


def test_2_a_base_weight_left_trainable(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, session, "attach_adapter", lambda name, run, opened, notes: opened.model.get_parameter("model.norm.weight").requires_grad_(True))
    broken(2, r"model\.norm\.weight is trainable but no optimizer holds it")


def test_2_a_tensor_that_would_not_be_saved(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, Local, "state", lambda state, self: state.pop(f"adapter/default/{MODULES[0]}.lora_A"))
    broken(2, r"default/model\.layers\.0\.self_attn\.q_proj\.lora_A is trained but would not be saved")


class Meddler(tinyrun.Heard):
    """Does something to the run after step 2."""

    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__()
        self.deed = deed

    def step(self, record: Record) -> None:
        if record["step"] == 2:
            self.deed()


def test_2_a_base_weight_that_changes(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    after(monkeypatch, session, "attach_adapter", lambda name, run, opened, notes: seen.append(opened.model))
    nudge = Meddler(lambda: seen[0].get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0].mul_(1.001))
    broken(2, "a base weight changed during training", listeners=[nudge])


# --- 3: everything trains


def silent_attention(model: Path, tmp_path: Path) -> Path:
    """The same model with an output projection of zeros: what attention computes is never used."""
    folder = tmp_path / "silent"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("steps", [5, 2])
def test_3_a_gradient_that_never_arrives(broken: Broken, models: Callable[[str], Path], tmp_path: Path, steps: int) -> None:
    base = silent_attention(models("llama"), tmp_path)
    message = r"no gradient reached model\.layers\.0\.self_attn\.q_proj of adapter 'default' \(1 modules\): it would never train"
    broken(3, message, base=base, max_steps=steps, lr_scheduler_type="constant")


def test_3_a_matrix_that_does_not_move(tmp_path: Path) -> None:
    """B's rate is zero: gradients everywhere, and yet nothing is learnt."""
    stuck = engine_for(Fixed([[examples(2, s)] for s in range(5)]), tmp_path, optim=OptimSettings(b_ratio=0.0))
    stuck.checks.begin(stuck.backend, {"default": list(stuck.backend.bank["default"].slots)})  # type: ignore[attr-defined]
    with pytest.raises(ContractError, match=r"contract 3 broken .*lora_B did not move in 3 steps \(14 tensors\): it does not train"):
        stuck.run()
    assert stuck.progress.step == 3  # the first has a rate of 0 and proves nothing; the fourth is not counted as done


def test_3_steps_with_a_rate_of_zero_prove_nothing(start: Start) -> None:
    """A warmup's first step moves nothing; a run of one such step alone has nothing to prove."""
    three = start(max_steps=1, warmup_steps=1).contracts[2]
    assert three["status"] == "not_checked"


def test_3_the_best_of_a_short_run_may_be_its_unmoved_start(start: Start) -> None:
    """What is loaded at the end is not what the proof is about."""
    contracts = start(
        max_steps=3, warmup_steps=1, learning_rate=3.0, test_size=2, eval_steps=1, load_best_model_at_end=True
    ).contracts
    assert contracts[2]["status"] == "held"


# --- 4: loss weights and packing


def changed_example(patch: pytest.MonkeyPatch, change: Callable[[Example], Example]) -> None:
    """Every second row reaches the batches changed."""
    original = TokenSet.example

    def example(self: TokenSet, row: int, *args: Any) -> Example:
        made = original(self, row, *args)
        return change(made) if row % 2 else made

    patch.setattr(TokenSet, "example", example)


def test_4_a_row_with_nothing_to_learn(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_example(monkeypatch, lambda e: replace(e, weights=[0.0] * len(e.weights)))
    broken(4, r"sequence \d \(key \d+\) has no supervised token")


def test_4_a_row_that_never_learns_to_stop(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(e: Example) -> Example:
        last = max(i for i, w in enumerate(e.weights) if w)
        return replace(e, weights=[0.0 if i == last else w for i, w in enumerate(e.weights)])

    changed_example(monkeypatch, endless)
    broken(4, r"sequence \d \(key \d+\) never learns to stop: no end token is supervised")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_4_attention_that_sees_the_neighbour(broken: Broken, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    original = attention.buckets

    def merged(segments: Any, *args: Any, **kwargs: Any) -> Any:
        return original([(segments[0][0], segments[-1][1])], *args, **kwargs)

    for module in (attention, decoder):
        monkeypatch.setattr(module, "buckets", merged)
    broken(4, r"a sequence's scores change by \d\.\d\de[-+]\d\d with the tokens of its neighbours", base=family, target_modules="auto")


def test_4_positions_that_do_not_restart(broken: Broken, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions tell a sequence where it lies in the batch; rotary ones are relative and do not mind."""
    monkeypatch.setattr(Batch, "positions", property(lambda self: torch.arange(self.tokens.numel())))
    assert start("llama", per_device_train_batch_size=2).contracts[3]["status"] == "held"
    broken(4, r"the loss packed and alone differs by .* \(at most 1e-05\)", base="gpt2", target_modules="auto", per_device_train_batch_size=2)


# --- 5 and 6: what is on the disk


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))


def edit_weights(change: Callable[[bytearray], bytes]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(bytearray(path.read_bytes())))

    return edit


def flip_last_value(content: bytearray) -> bytes:
    content[-4] ^= 1  # the lowest bit of an fp32
    return bytes(content)


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a value": (edit_weights(flip_last_value), "the adapter read back is not the one that was trained"),
    "the scale": (edit_config, "the adapter read back gives other logits"),
    "cut short": (edit_weights(lambda content: bytes(content[:-8])), "adapter_model.safetensors"),
    "gone": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
}


@pytest.mark.parametrize("how", TAMPERINGS)
def test_5_an_adapter_that_is_not_what_was_trained(broken: Broken, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    tamper, message = TAMPERINGS[how]
    after(monkeypatch, artifacts, "write_adapters", lambda digests, folder, *rest: tamper(folder))
    broken(5, message)


@pytest.mark.parametrize("file", ["state.safetensors", "meta.json", "manifest.json"])
def test_6_a_newest_checkpoint_that_is_damaged(broken: Broken, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """An older one that is whole does not make up for it."""

    def damage(path: Path, run_dir: Path, step: int, *rest: Any) -> None:
        if step == 5:
            content = bytearray((path / file).read_bytes())
            content[len(content) // 2] ^= 1
            (path / file).write_bytes(content)

    after(monkeypatch, checkpoint, "save", damage)
    broken(6, f"step-00000005/{file} is damaged")


def test_6_without_checkpoints_there_is_nothing_to_claim(start: Start) -> None:
    assert start(save_strategy="no").contracts[5]["status"] == "not_checked"


# --- 7: finite


def test_7_an_infinite_gradient(broken: Broken, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def overflow(stats: Any, self: Local, batches: Any, task: Any, step: int) -> None:
        if step == 3:
            self.bank["default"].split_like(self.bank["default"].grads)[f"{MODULES[0]}.lora_B"][1, 0] = float("inf")

    after(monkeypatch, Local, "forward_backward", overflow)
    message = rf"step 4: the gradient of {MODULES[0]}.lora_B \(adapter 'default'\) is not finite in 1 tensors, with sequences of keys \[\d+, .*nothing was updated"
    broken(7, message, error=NonFiniteError, code=6)
    newest = checkpoint.find_latest(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-00000002"


def test_7_a_base_that_holds_nan(broken: Broken, models: Callable[[str], Path], tmp_path: Path) -> None:
    """From the first step on: it is the loss that is named, not the packing, whose check cannot tell."""
    folder = silent_attention(models("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    broken(7, "step 1: the loss term 'nll' is not finite for 3 of 3 sequences", error=NonFiniteError, code=6, base=folder)


# --- 8: bad input; and the codes a shell sees


def test_8_a_bad_row(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + '{"question": "Who?", "ans\n')
    with pytest.raises(DataError, match=rf"^{data}:13: ") as e:
        start()
    assert e.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_8_rows_left_out_are_accounted_for(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + '{"question": "Who?", "ans\n{"question": "Who?", "answer": ""}\n')
    eight = start(on_bad_row="quarantine").contracts[7]
    assert eight["status"] == "held"
    assert "12 rows, 12 sequences" in eight["detail"]
    assert eight["detail"].count("left out: 1 rows") == 2
    aside = [json.loads(line)["where"] for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert aside == [f"{data}:13", f"{data}:14"]


def test_an_adapter_of_another_base(start: Start, models: Callable[[str], Path], tmp_path: Path) -> None:
    start()
    other = tinyrun.model_directory(tmp_path / "other", spread=0.21)
    with pytest.raises(ModelError, match="trained on other base weights") as e:
        start(other, adapter=str(tmp_path / "run"))
    assert e.value.exit_code == 4


@pytest.mark.parametrize("code", [2, 3, 5, 6])
def test_the_exit_codes_of_the_command(
    code: int, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(6))
    if code == 3:
        data.write_text("{broken\n")
    if code == 5:
        changed_example(monkeypatch, lambda e: replace(e, weights=[0.0] * len(e.weights)))
    if code == 6:
        after(monkeypatch, Local, "forward_backward", lambda stats, self, *rest: self.bank["default"].grads.fill_(float("nan")))
    argv = ["sft", f"model={models('llama')}", f"data={data}", f"output_dir={tmp_path / 'run'}", "max_steps=2", "threads=1", "device=cpu"]
    argv += ["target_modules=q_prj"] if code == 2 else []
    assert cli.main(argv) == code
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
