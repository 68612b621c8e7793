"""`import lorry`: train, load, generate, and the layer alone on a model of one's own."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lorry
from lorry.errors import ConfigError, ContractError, ModelError
from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import PEOPLE, World, model_directory, world  # noqa: F401 - the fixture

QUESTIONS, ANSWERS = [row["question"] for row in PEOPLE], [row["answer"] for row in PEOPLE]


def test_train_load_generate(world: World, tmp_path: Path) -> None:  # noqa: F811
    run = lorry.sft(
        model=str(world.base),
        data=str(world.rows),
        output_dir=tmp_path / "run",
        r=8,
        learning_rate=1e-2,
        max_steps=40,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        dtype="float32",
        logging_steps=40,
        train={"save_strategy": "no"},
        backend={"threads": 1},
    )
    assert run.path == tmp_path / "run"
    assert {c["status"] for c in run.contracts} == {"held", "not_checked"}
    model, words = lorry.load(run.path, dtype="float32")
    assert lorry.generate(model, words, QUESTIONS, max_new_tokens=16) == ANSWERS
    ids = words(QUESTIONS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        # what was saved is what was trained
        assert torch.equal(model(ids).logits, run.model(ids).logits)


def test_one_prompt_gives_one_answer_and_each_may_have_its_adapter(world: World) -> None:  # noqa: F811
    model, words = lorry.load(world.base, world.run, dtype="float32")
    assert lorry.generate(model, words, QUESTIONS[1], max_new_tokens=16) == ANSWERS[1]
    both = lorry.generate(
        model, words, [QUESTIONS[1]] * 2, max_new_tokens=16, adapters=["people", None]
    )
    base = lorry.generate(model, words, QUESTIONS[1], max_new_tokens=16, adapters=lorry.Mix.none())
    assert both == [ANSWERS[1], base]
    assert base != ANSWERS[1]
    with pytest.raises(ConfigError, match="no adapter named 'animals'"):
        lorry.generate(model, words, "Hello", adapters="animals")
    with pytest.raises(ModelError, match="context is 160"):
        lorry.generate(model, words, "x" * 400)


def test_plain_text_is_continued_as_it_stands(world: World) -> None:  # noqa: F811
    model, words = lorry.load(world.run, dtype="float32")
    prompt = f"<|im_start|>user\n{QUESTIONS[2]}<|im_end|>\n<|im_start|>assistant\n"
    assert lorry.generate(model, words, prompt, chat=False, max_new_tokens=16) == ANSWERS[2]


def test_merge_and_unmerge(world: World) -> None:  # noqa: F811
    model, words = lorry.load(world.run, dtype="float32")
    ids = words(QUESTIONS[0], return_tensors="pt").input_ids
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        beside = model(ids).logits
        report = lorry.merge(model)
        assert (model(ids).logits - beside).abs().max() < 1e-4
        assert len(report.rows) == 14
        assert (
            lorry.generate(model, words, QUESTIONS, max_new_tokens=16, adapters=lorry.Mix.none())
            == ANSWERS
        )
        with pytest.raises(ContractError):
            lorry.generate(model, words, QUESTIONS, adapters="people")
        lorry.unmerge(model)
        assert torch.equal(model(ids).logits, beside)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_save_and_load_an_adapter(world: World, tmp_path: Path) -> None:  # noqa: F811
    model, words = lorry.load(world.run, dtype="float32")
    lorry.save_adapter(model, tmp_path / "copy", "people")
    other, _ = lorry.load(world.base, dtype="float32")
    lorry.load_adapter(other, tmp_path / "copy", "again")
    assert lorry.generate(other, words, QUESTIONS, max_new_tokens=16) == ANSWERS
    lorry.detach(other, "again")
    assert lorry.generate(other, words, QUESTIONS, max_new_tokens=16) != ANSWERS
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        lorry.load_adapter(other, tmp_path / "copy")


def test_the_layer_alone_on_any_torch_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, target = torch.randn(64, 8), torch.randn(64, 4)
    names, before = (
        list(model.state_dict()),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    plain = model(x)
    lorry.attach(model, lorry.LoraSpec(r=4, target_modules="all-linear"))
    # B starts at zero; the kernels' own product may sum in another order
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.AdamW(lorry.lora_parameters(model), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(50):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert list(model.state_dict()) == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    tuned = model(x)
    lorry.merge(model)
    torch.testing.assert_close(model(x), tuned)
    lorry.unmerge(model)
    lorry.detach(model)
    assert torch.equal(model(x), plain)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_what_a_person_should_know_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = model_directory(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    with caplog.at_level(logging.WARNING, logger="lorry"):
        model, words = lorry.load(base)
    assert words is None
    assert "has no tokenizer; only token ids can be used" in caplog.text
    with pytest.raises(ConfigError, match="generate needs a tokenizer"):
        lorry.generate(model, words, "Hello")


def test_errors_are_lorry_s_own(world: World) -> None:  # noqa: F811
    with pytest.raises(lorry.LorryError, match=r"no model at '\./nope'"):
        lorry.load("./nope")
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        lorry.load(world.base, dtyp="float32")
    with pytest.raises(ModelError, match="holds no adapter"):
        lorry.load(world.base, world.base)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        lorry.sft(data="x", learning_rat=1)


def test_every_public_name_is_there() -> None:
    for name in lorry.__all__:
        assert getattr(lorry, name) is not None
    assert dir(lorry) == sorted(lorry.__all__)
    with pytest.raises(AttributeError, match="no attribute 'sfft'"):
        _ = lorry.sfft
