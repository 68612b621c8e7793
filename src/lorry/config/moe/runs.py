"""The description of a mixture of LoRA experts: adapters trained in one run or brought along, and a
router over them. No torch here.

Try: lorry moe examples/experts.yaml output_dir=runs/mixture
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator as validate_model

from lorry.config.base import (
    DtypeName,
    PathText,
    SettingsGroup,
    config_field,
)
from lorry.config.data import DataConfig
from lorry.config.moe.project import MARKS, translate_project
from lorry.config.moe.router import RouterConfig, check_router
from lorry.config.moe.stages import EXPORTS, ExportStage, Layout, StageFolders
from lorry.config.parsing.files import DescriptionFile
from lorry.config.schema.job import JobConfig
from lorry.config.schema.run import RunConfig
from lorry.config.suite import first_changed
from lorry.notes import NoteCallback

EXPERTS = (
    "a list of maps, such as [{name: a, data: a.jsonl}, {name: b, adapter: runs/b, data: b.jsonl}]"
)
# what `trainable` trains of which a stock class routes nothing, or not all
OUTSIDE_MLPS = ("all", "all-but-router", "attention")


class ExpertConfig(SettingsGroup):
    """where an expert comes from that is not trained here"""

    main: ClassVar[str] = "adapter"
    adapter: PathText | list[PathText] | None = config_field(
        None,
        "an existing PEFT adapter, or several, added up; its data then trains the router alone",
    )
    adapter_weights: list[float] | None = config_field(
        None, "of several adapters: one for each, in their order; null: 1 each"
    )

    @validate_model(mode="after")
    def _a_weight_for_each(self) -> ExpertConfig:
        adapters = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        if adapters == []:
            raise ValueError("expert.adapter names no directory")
        if self.adapter_weights is not None and (
            len(self.adapter_weights) != len(adapters) or len(adapters) < 2
        ):
            raise ValueError(
                f"expert.adapter_weights has {len(self.adapter_weights)} numbers for {len(adapters)} adapters; they are for several "
                "(adapter: [A, B])"
            )
        return self


class ExpertJobConfig(JobConfig):
    """One expert: a job of the run, or an adapter that is there."""

    expert: dict[str, Any] = config_field({}, "the settings that differ from the run's")


class MoeDataConfig(DataConfig):
    """the experts' rows; an adapter of a uniform or fixed mixture needs none"""

    needs_rows: ClassVar[bool] = False


class MoeRunConfig(RunConfig):
    """Experts, trained in one run or brought along, and a router over them."""

    job_groups: ClassVar[tuple[str, ...]] = (*RunConfig.job_groups, "expert")
    jobs_need_adapters: ClassVar[bool] = False  # without, each expert is a run of its own
    # of a description, what says that it is one of these and of no other verb
    task_marks: ClassVar[tuple[str, ...]] = ("experts", *MARKS)
    task: Literal["moe"] = config_field("moe", "fixed by the verb")  # type: ignore[assignment]  # the task is the verb's
    data: MoeDataConfig = MoeDataConfig()
    expert: ExpertConfig = ExpertConfig()
    router: RouterConfig = RouterConfig()
    jobs: list[ExpertJobConfig] = config_field(  # type: ignore[assignment]  # its jobs have a group more
        [],
        (
            "the experts: maps of a name, data or adapter, and the settings that "
            "differ; also experts=[...]"
        ),
        json_schema_extra={"allowed": EXPERTS, "own_word": "experts"},
    )
    together: bool = config_field(
        True, "train the experts in one run over one base; false: in turn, a run each"
    )
    merge_experts: bool = config_field(
        False, "write each expert merged into the base as well, to EXPERT/merged"
    )
    merge_dtype: DtypeName = config_field(
        "auto", "of merge_experts: number format to store; auto: that of the base"
    )
    export: list[ExportStage] = config_field(
        [], "formats to write the finished mixture in", json_schema_extra={"allowed": EXPORTS}
    )
    finetune: dict[str, Any] = config_field(
        {},
        "train all weights of the hf-moe export on the experts' rows: settings as of lorry sft, and train_router",
    )
    layout: Layout = config_field(
        "run",
        "run: the mixture is OUTPUT; workspace: OUTPUT/gating_network, with rmoe_model beside it",
    )
    skip_experts: bool = config_field(False, "take the experts that are in OUTPUT/experts")
    skip_gating: bool = config_field(False, "take the mixture that is there, or export without one")
    skip_merge: bool = config_field(False, "write no hf-moe, dense or peft; take what is there")
    skip_finetune: bool = config_field(False, "do not train the hf-moe's weights")
    skip_convert: bool = config_field(False, "write no GGUF file")
    conversion_mode: Literal["preserve_moe", "average"] = config_field(
        "preserve_moe",
        "what the GGUF file is made of: the hf-moe, or one dense model with the mean of the experts",
    )

    @validate_model(mode="after")
    def _router_fits_the_experts(self) -> MoeRunConfig:
        # without jobs this is one expert's own run
        if self.jobs and self.expert.adapter is not None:
            raise ValueError("expert.adapter is a setting of one expert; give it in experts")
        check_router(self.router, [job.name for job in self.jobs])
        return self

    @property
    def whole_experts(self) -> bool:
        """Whether experts are whole models (lora=null), of which there is no mixture of adapters, but
        one in a stock class."""
        return bool(self.jobs) and self.lora is None

    @validate_model(mode="after")
    def _whole_experts_have_no_adapters(self) -> MoeRunConfig:
        if not self.whole_experts:
            return self
        if brought := [job.name for job in self.jobs if job.expert.get("adapter")]:
            raise ValueError(
                f"lora=null trains experts as whole models, and {brought[0]!r} is an adapter; leave out lora=null, or "
                "put both into one class afterwards: lorry export to=hf-moe base_model=BASE experts=[...]"
            )
        nearest = "give export=[{to: hf-moe, gate_mode: hidden}]: its gates are made of prompts"
        if odd := first_changed(self.router, list(RouterConfig.model_fields)):
            raise ValueError(
                f"router.{odd} is of a router over adapters (level delta, or expert over one base), and with lora=null "
                f"experts are whole models; {nearest}"
            )
        for stage in self.export:
            if stage.to in ("dense", "peft"):
                raise ValueError(
                    f"export: to={stage.to} adds up adapters, and with lora=null experts are whole models; {nearest}"
                )
            if stage.to == "hf-moe" and stage.gate_mode == "router":
                raise ValueError(
                    f"export: gate_mode=router is a router trained over adapters; with lora=null {nearest}"
                )
            # of names and regexes the export says what they came to
            if (
                stage.to == "hf-moe"
                and stage.attention == "refuse"
                and self.trainable in OUTSIDE_MLPS
            ):
                raise ValueError(
                    f"trainable={self.trainable} trains more than the MLPs, which is all that a stock class routes; give "
                    "trainable=mlp, or export=[{to: hf-moe, attention: average, ...}] (or drop)"
                )
        if self.export_of("gguf") is not None and self.conversion_mode == "average":
            raise ValueError(
                "conversion_mode=average adds up adapters, and with lora=null experts are whole models; leave it out"
            )
        if self.merge_experts:
            raise ValueError("merge_experts: with lora=null each expert is a whole model already")
        if self.memory_budget is not None:
            raise ValueError(
                "memory_budget is for training adapters only; with lora=null leave it out"
            )
        return self

    @validate_model(mode="after")
    def _exports_follow_from_each_other(self) -> MoeRunConfig:
        formats = [stage.to for stage in self.export]
        if twice := [name for name in formats if formats.count(name) > 1]:
            raise ValueError(f"export: {twice[0]} is named twice")
        needs_moe = "gguf" in formats and self.conversion_mode == "preserve_moe"
        if "hf-moe" not in formats and (needs_moe or self.finetune):
            what = "gguf" if "gguf" in formats else "finetune"
            raise ValueError(f"{what} is made of the hf-moe export: export=[hf-moe, ...]")
        if "bleurt" in self.train.metric_for_best_model.lower():
            raise ValueError(
                "train.metric_for_best_model: BLEURT is not to be had; there are eval_loss, and with eval_tasks "
                "eval_truthfulqa_rouge_l (ROUGE-L) and eval_truthfulqa_mc_accuracy (MC2)"
            )
        return self

    def export_of(self, form: str) -> ExportStage | None:
        """The stage that writes a format, if any."""
        return next((stage for stage in self.export if stage.to == form), None)

    def export_router(self) -> RouterConfig | None:
        """The token router of the export, where the mixture's is of another kind: a stock class holds
        a matrix for each layer and nothing else. It trains at `level: expert`, which is what the
        class computes: the loss of the export is that of this router's run."""
        moe = self.export_of("hf-moe")
        if moe is None or moe.gate_mode != "router" or self.router.kind == "token":
            return None
        top_k = moe.experts_per_token or self.router.top_k
        return RouterConfig(kind="token", level="expert", top_k=top_k, straight_through=top_k == 1)

    @property
    def folders(self) -> StageFolders:
        """Where each stage writes."""
        return StageFolders(self.output_dir, self.layout)

    @classmethod
    def translate_description(
        cls, described: DescriptionFile, path: Path, add_note: NoteCallback
    ) -> DescriptionFile:
        """A file of the project RMoE under our names; any other as it is. Raises ConfigError."""
        return translate_project(described, path, add_note)
