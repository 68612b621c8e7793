"""`lorry export RUN to=peft`: adapter directories as PEFT has them, opened again by PEFT where it
is installed. Of a mixture one for each expert, and routing.json beside them for servers that take
one adapter per request (vLLM, LoRAX): whose prompts a request is nearest to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError, DataError
from lorry.runs.layout import ADAPTER_WEIGHTS
from lorry.verbs.checks.domain_loss import batch_prompt, read_domain_rows, row_prompts
from lorry.verbs.checks.logit_check import LogitsBeforeMerge, load_adapted_model
from lorry.verbs.open_model import print_note

if TYPE_CHECKING:
    from lorry.adapters.routing.files import RouterRecord
    from lorry.models.loading.open import OpenedModel

ROUTING_FILE = "routing.json"


def export_peft(opened: OpenedModel, name: str, output: Path, weight: float = 1.0) -> None:
    """The adapter's directory as PEFT writes it, ``weight`` times the adapter and what it was
    trained over in one, opened again before it gets its name. ``opened`` is of no use afterwards.

    Raises ConfigError for a place that is taken, ContractError if the adapter opened again is
    another one.
    """
    from lorry.adapters.attach import get_bank
    from lorry.disk import durable
    from lorry.models.loading.reopen import free_model_memory

    adapter = get_bank(opened.model)[name]
    beside = [key for key, one in adapter.further.items() if not one.low_rank]
    # of the model in memory, which is freed before the export is opened
    before = LogitsBeforeMerge.of(opened, {name: weight})
    with durable.build_directory(output) as folder:
        write_peft(opened, name, folder, weight)
        # two models at once need not fit
        free_model_memory(opened.model)
        model, library = load_adapted_model(folder, opened.source["path"], before.dtype)
        lines = before.compare(model, "float32", library)
    if beside:
        lines.append(
            f"note: vLLM takes no adapter that has more than A and B ({beside[0]}); for it merge the run "
            "(lorry merge) and serve the merged model"
        )
    for line in lines:
        print_note(line)


def write_peft(opened: OpenedModel, name: str, folder: Path, weight: float = 1.0) -> None:
    """The files of the adapter and its tokenizer, into an existing folder."""
    from lorry.adapters.peft.files import plain_adapter_files

    files = plain_adapter_files(opened.model, name, weight=weight, base_name=opened.source["path"])
    for file, content in files.items():
        (folder / file).write_bytes(content)
    opened.tokenizer.save_pretrained(folder)


def export_peft_experts(
    opened: OpenedModel, folder: Path, record: RouterRecord | None, output: Path
) -> None:
    """A PEFT folder for each expert and `ROUTING_FILE`. ``record``: of the run in ``folder``, if it
    is a mixture. ``opened`` is of no use afterwards.

    Raises ConfigError for a place that is taken and where the prompts that make prototypes are not
    described, DataError where they are gone, ContractError if an adapter opened again is another
    one.
    """
    from lorry.disk import durable
    from lorry.models.loading.reopen import free_model_memory

    names, lines = expert_names(opened, record), list[str]()
    routing = describe_routing(opened, folder, record)
    if record is not None and (record.kind != "prototype" or record.top_k > 1):
        own = (
            f"router of kind {record.kind}, top_k={record.top_k}"
            if not record.gates
            else record.kind
        )
        lines.append(
            f"note: the run's own routing ({own}) is more than one adapter per request can be; "
            f"{ROUTING_FILE} gives a request the expert whose prompts are nearest"
        )
    lines += routing_lines(opened, folder, routing)
    before = {name: LogitsBeforeMerge.of(opened, {name: 1.0}) for name in names}
    with durable.build_directory(output) as built:
        for name in names:
            (built / name).mkdir()
            write_peft(opened, name, built / name)
        for expert in routing["experts"]:
            expert["sha256"] = file_digest(built / expert["name"] / ADAPTER_WEIGHTS)
        text = json.dumps(routing, indent=1, allow_nan=False)
        (built / ROUTING_FILE).write_text(text + "\n", encoding="utf-8")
        base = opened.source["path"]
        free_model_memory(opened.model)
        for name in names:
            model, library = load_adapted_model(built / name, base, before[name].dtype)
            lines += [
                f"{name}: {difference}"
                for difference in before[name].compare(model, "float32", library)
            ]
            del model
    for line in lines:
        print_note(line)


def expert_names(opened: OpenedModel, record: RouterRecord | None) -> list[str]:
    """The experts that the run routes among, in the order of the router's columns; of a run without
    a router as it lists them."""
    if record is None:
        return opened.adapters
    names = [expert.name for expert in record.experts]
    # of a spectral router some may have gone or come since; any other kind does not open then
    there = [name for name in names if name in opened.adapters]
    return there + [name for name in opened.adapters if name not in names]


def describe_routing(
    opened: OpenedModel, folder: Path, record: RouterRecord | None
) -> dict[str, Any]:
    """What `ROUTING_FILE` says: the base, the rule in words that need no Lorry, and of each expert
    its prototype [D], the mean state of its prompts: of a `prototype` router its own, of any other
    kind those of a few training rows."""
    from lorry.adapters.attach import get_bank
    from lorry.adapters.router import ROUTER_NAME
    from lorry.models.causal_lm import prompt_states

    layer, pooling, names = None, "mean", expert_names(opened, record)
    if record is not None and record.kind == "prototype":
        # as it stands in the run: more prompts, or other ones, may have made it
        router: Any = get_bank(opened.model).routers[ROUTER_NAME]
        layer, pooling = router.layer, router.pooling
        means = list(router.tensors()["prototypes"])
    else:
        prompts = row_prompts(opened, folder, names)
        means = [prompt_states(opened.model, prompts[name], None, "mean").mean(0) for name in names]
    return {
        "base_model": opened.source["name"],
        "rule": {
            "kind": "prototype",
            "input": "the request's prompt, with the chat template and up to where the answer "
            "begins",
            "state": "after the final norm" if layer is None else f"output of layer {layer}",
            "layer": layer,
            "pooling": pooling,
            "model": "the base, without adapters",
            "score": "cosine(state - c, prototype - c), c the mean of all prototypes",
            "choose": "the expert with the largest score",
        },
        "experts": [
            {"name": name, "adapter": name, "prototype": mean.float().cpu().tolist()}
            for name, mean in zip(names, means, strict=True)
        ],
    }


def routing_lines(opened: OpenedModel, folder: Path, routing: dict[str, Any]) -> list[str]:
    """How many rows of each domain the rule gives to their own expert, on rows that made no
    prototype where the run held some out."""
    import torch

    from lorry.models.causal_lm import prompt_states

    rule, experts = routing["rule"], routing["experts"]
    means = torch.tensor([expert["prototype"] for expert in experts], device=opened.model.device)
    centre, lines = means.mean(0), list[str]()
    try:
        rows, held = read_domain_rows(opened, folder)
    except (ConfigError, DataError) as error:
        return [f"note: the rule was not tried: {error}"]
    for number, expert in enumerate(experts):
        prompts = [batch_prompt(batch) for batch in rows.get(expert["name"], [])]
        if not prompts:
            continue
        states = prompt_states(opened.model, prompts, rule["layer"], rule["pooling"])
        scores = torch.cosine_similarity((states - centre)[:, None], (means - centre)[None], dim=-1)
        right = int((scores.argmax(1) == number).sum())
        what = "held-out" if held else "training"
        lines.append(
            f"{expert['name']}: {right} of {len(prompts)} {what} prompts are nearest to its own"
        )
    return lines
