"""What can be wrong with a mixture's experts and their rows, asked before anything trains: hours
later it would be as wrong.

The experts are put on the opened base as they will lie there, those that are still to be trained
with rank 1, and the routers and the export over them say by their own checks what they do not take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.jobs import runs_by_adapter
from lorry.config.moe import ROUTER_KINDS, MoeRunConfig, RouterRunConfig
from lorry.errors import ConfigError
from lorry.notes import ignore_note
from lorry.runs.layout import ROUTER, ROUTER_FILE
from lorry.runs.ownership import is_run
from lorry.verbs.mixture.experts import brought_adapters, in_turn

if TYPE_CHECKING:
    from lorry.models.loading.open import OpenedModel

# of an expert that is yet to be trained: the smallest, and plain LoRA's first values, which ask for no
# rows and are taken at any rank
ANY_VALUES: Mapping[str, Any] = {
    "r": 1, "rank_pattern": {}, "variant": "lora", "init_lora_weights": True, "keep_residual": False,
    "train": ["A", "B"],
}  # fmt: skip


def check_rows(run: MoeRunConfig) -> None:
    """Raise DataError for an expert's data that is not there or has no row that can be read."""
    from lorry.data.prepare import expect_rows

    for own in runs_by_adapter(run).values():
        if own.data.path:
            expect_rows(own.data)


def refuse_own_experts(
    mixture: Path, remade: Sequence[Path], adapters: Mapping[str, Sequence[str]]
) -> None:
    """Raise ConfigError for one of the ``adapters`` that lies in what is to be made anew, the
    ``mixture`` or the run of other experts: it would be moved away with it before it is read, and
    be missing where training is to go on. ``remade``: the folders of what is made, each with what
    an earlier call left there. Raises ModelError for a router.json that is none."""
    from lorry.adapters.routing.files import read_router_record
    from lorry.train.start import recorded_adapter_folders

    moving: dict[Path, str] = {}
    for folder in remade:
        # a run of one adapter has it in its own folder
        names = ["", *recorded_adapter_folders(folder)]
        if (folder / ROUTER / ROUTER_FILE).is_file():
            # an earlier version described no mixture that nothing trained
            names += [expert.name for expert in read_router_record(folder).experts]
        what = "the mixture" if folder == mixture else "what is"
        moving |= {(folder / name).resolve(): f"{what} in {folder}" for name in names}
    for name, folders in adapters.items():
        for place in folders:
            if (owner := moving.get(Path(place).expanduser().resolve())) is not None:
                raise ConfigError(
                    f"expert {name!r}: {place} is of {owner}, which makes room for this one; give "
                    "another output_dir"
                )


def check_experts_on_base(
    run: MoeRunConfig,
    opened: OpenedModel,
    adapters: Mapping[str, Sequence[str]],
    routers: Sequence[RouterRunConfig],
) -> None:
    """Raise ConfigError or ModelError for experts that this base, the ``routers`` that a run trains
    or the export do not take. ``adapters``: {expert: its PEFT directories} of those that are there.
    ``opened`` is of no use afterwards.
    """
    from lorry.adapters.attach import attach, detach, get_bank
    from lorry.adapters.peft.files import find_adapter, load_adapter
    from lorry.adapters.router import ROUTER_NAME
    from lorry.adapters.spec import lora_spec_of
    from lorry.tasks.moe.builder import attach_run_router
    from lorry.verbs.exports.moe import shared_mix

    for name, own in runs_by_adapter(run).items():
        for number, folder in enumerate(adapters.get(name, ())):
            place = find_adapter(Path(folder))[0]
            # a second adapter of one expert is added to the first, and has the same to answer for
            load_adapter(
                opened.model, place, f"{name}.{number}" if number else name, trainable=False
            )
            refuse_other_tokenizer(name, place, opened.tokenizer)
        if name not in adapters and own.lora is not None:
            # where it lies is asked for, not what it holds
            spec = lora_spec_of(own.lora.model_copy(update=ANY_VALUES))
            attach(opened.model, spec, name)
    bank = get_bank(opened.model, create=True)
    for router in routers:
        attach_run_router(router, opened)
        bank.routers.pop(ROUTER_NAME)
        if ROUTER_NAME in bank.adapters:  # a classifier's LoRA, which the next has no part in
            detach(opened.model, ROUTER_NAME)
    moe = run.export_of("hf-moe")
    if moe is not None and not run.skip_merge:
        shared_mix(opened, {job.name: {job.name: 1.0} for job in run.jobs}, moe.attention)


def refuse_other_tokenizer(expert: str, adapter: Path, tokenizer: Any) -> None:
    """Raise ConfigError for an adapter whose run had another vocabulary or chat template than the
    mixture's ``tokenizer``: its prompts would read otherwise than it was trained on."""
    from lorry.models.loading.open import own_tokenizer

    own = own_tokenizer(adapter, ignore_note)
    if own is None or tokenizer is None:
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"expert {expert!r}: {adapter} was trained with another tokenizer than the mixture's "
            "base has; train it with that one"
        )
    if own.chat_template != tokenizer.chat_template:
        raise ConfigError(
            f"expert {expert!r}: {adapter} was trained with another chat template than the mixture "
            "has; give model.chat_template_path=FILE with the one that all experts have, or train "
            "it with the base's"
        )


def refuse_untrained_experts(folders: Mapping[str, Path], file: str) -> None:
    """Raise ConfigError where skip_experts counts on one that is not there: ``file`` says that it
    is."""
    for name, folder in folders.items():
        if not (folder / file).is_file():
            raise ConfigError(
                f"skip_experts: expert {name!r} is not in {folder}; leave skip_experts out to train it"
            )


def refuse_pickled_router(folder: Path) -> None:
    """Raise ConfigError where skip_gating would pass over a router of another program's: a pickle,
    which nothing here reads."""
    if (folder / ROUTER / ROUTER_FILE).is_file():
        return
    if pickled := sorted(folder.glob("*.pt")):
        raise ConfigError(
            f"skip_gating: {pickled[0]} is a pickle, which is never read; leave skip_gating out to "
            "make a router of the experts' rows"
        )


def remade_folders(run: MoeRunConfig) -> list[Path]:
    """Where this call writes adapters or a mixture, and moves away what an earlier one
    left there."""
    remade, brought, folder = list[Path](), brought_adapters(run), run.folders.experts
    if not run.skip_experts:
        # of its own, or a sum; together or in turn: each way makes room where it was the other
        made = [job.name for job in run.jobs if len(brought.get(job.name, ())) != 1]
        remade += [folder / name for name in made]
        if any(name not in brought for name in made):
            remade.append(folder)
    if not run.skip_gating:
        remade.append(run.folders.mixture)
    if run.export_router() is not None and not run.skip_merge:
        remade.append(run.folders.moe_router)
    return remade


def refuse_missing_rows(run: MoeRunConfig) -> None:
    """Raise ConfigError for an expert without the rows that it, or the router, is trained on."""
    brought, alone = brought_adapters(run), runs_by_adapter(run)
    for name, own in alone.items():
        if own.data.path or own.data.mix:
            continue
        if name not in brought:
            raise ConfigError(f"expert {name!r} has neither data=FILE nor adapter=DIR; give one")
        if ROUTER_KINDS[run.router.kind].needs_rows:
            raise ConfigError(
                f"expert {name!r} has no data: a router of kind={run.router.kind} is made of rows of every expert's "
                "domain; give data=FILE"
            )


def refuse_undescribed_experts(run: MoeRunConfig) -> None:
    """Raise ConfigError for gates of an export from prompts where no run has all experts and says
    which rows are whose: neither the mixture's, nor one that trains all of them."""
    moe = run.export_of("hf-moe")
    # a whole model is a run with rows of its own
    if moe is None or run.skip_merge or moe.gate_mode == "router" or run.whole_experts:
        return
    mixture = run.folders.mixture
    if run.skip_gating:
        has_all, describes = (mixture / ROUTER / ROUTER_FILE).is_file(), is_run(mixture)
    else:
        own = runs_by_adapter(run).values()
        has_all, describes = True, all(one.data.path or one.data.mix for one in own)
    # random gates read no rows
    if has_all and (describes or moe.gate_mode == "random"):
        return
    if in_turn(run) or brought_adapters(run):
        raise ConfigError(
            f"export: gate_mode={moe.gate_mode} takes experts and prompts from one run, and here "
            "none has all experts and their rows; give data=FILE to each expert, gate_mode=router, "
            f"or export afterwards: lorry export {mixture} to=hf-moe gate_mode={moe.gate_mode} "
            "prompts={EXPERT: [TEXT, ...]}"
        )
