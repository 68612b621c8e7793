"""`jobs:` and `sweep:`: what each job resolves to, what stays of it in run.yaml, what is refused
and where it is said.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.config import (
    MoeRunConfig,
    RunConfig,
    SweepSettings,
    UnlearnRunConfig,
    build_settings,
    dump_settings,
    parse_settings,
    runs_by_adapter,
)
from lorry.config.adapter.belongs import hand_down
from lorry.config.jobs import BASE_JOB, SHARED_SETTINGS
from lorry.config.parsing.names import schema_names
from lorry.errors import ConfigError


def run(*argv: str) -> RunConfig:
    return parse_settings(RunConfig, ["data=people.jsonl", *argv], print)


def swept(*argv: str) -> list[str]:
    return [
        job.name for job in parse_settings(SweepSettings, ["data=people.jsonl", *argv], print).jobs
    ]


# --- a job is the run with its own settings


def test_each_job_is_what_the_command_line_would_make_of_it() -> None:
    """Its settings given to `lorry sft` beside the run's give the same description, defaults that
    hang on others included.
    """
    own = {
        "a": ["r=8"],
        "b": ["lora_alpha=7", "lr_scheduler_type=constant"],
        "c": ["data=other.jsonl", "eval=held.jsonl", "seed=4"],
        "d": ["lora.r=4", "train.warmup_steps=5", "max_steps=9", "loraplus_lr_ratio=8"],
        "e": [],
    }
    shared = ["learning_rate=1e-3", "save_steps=7"]
    listed = [
        {"name": name, **{w.split("=")[0]: w.split("=")[1] for w in words}}
        for name, words in own.items()
    ]
    text = ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in job.items()) + "}" for job in listed)
    resolved = runs_by_adapter(run(*shared, f"jobs=[{text}]"))
    assert list(resolved) == list(own)
    for name, words in own.items():
        alone = run(*shared, *words, f"adapter_name={name}")
        for group in ("lora", "data", "train"):
            assert getattr(resolved[name], group) == getattr(alone, group), name
        assert resolved[name].output_dir == run().output_dir / name


def test_a_run_without_jobs_is_its_own_only_job() -> None:
    plain = run("adapter_name=mine")
    assert runs_by_adapter(plain) == {"mine": plain}
    whole = run("lora=null")
    assert runs_by_adapter(whole) == {BASE_JOB: whole}


def test_only_what_differs_is_kept_and_reads_back() -> None:
    described = run(
        "r=16",
        "jobs=[{name: a, r: 8, warmup_steps: 5}, {name: b, lora: {r: 16, lora_dropout: 0.1}, data: b.jsonl}]",
    )
    kept = [job.model_dump() for job in described.jobs]
    assert kept == [
        # a number of steps leaves no share of them
        {
            "name": "a",
            "lora": {"r": 8},
            "data": {},
            "train": {"warmup_steps": 5, "warmup_ratio": 0.0},
        },
        {"name": "b", "lora": {"lora_dropout": 0.1}, "data": {"path": "b.jsonl"}, "train": {}},
    ]
    assert build_settings(RunConfig, described.model_dump(), print) == described


def test_written_and_read_again(tmp_path: Path) -> None:
    described = run(
        "jobs=[{name: a, r: 8, test_size: 0.2}, {name: b, target_modules: [q_proj], warmup_ratio: 0.1}]",
        "lr=1e-3",
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump_settings(described))
    again = parse_settings(RunConfig, [str(file)], print)
    assert again == described
    assert runs_by_adapter(again) == runs_by_adapter(described)


def test_jobs_that_bring_their_own_data_need_no_other() -> None:
    described = parse_settings(
        RunConfig,
        ["jobs=[{name: a, data: {path: a.jsonl, eval: e.jsonl}}, {name: b, data: b.jsonl}]"],
        print,
    )
    assert [(one.data.path, one.data.eval) for one in runs_by_adapter(described).values()] == [
        ("a.jsonl", "e.jsonl"),
        ("b.jsonl", None),  # nothing of a's data but its rows stands for the run's
    ]
    settings = "max_length: 64, system: S, completion_only_loss: false, test_size: 0.1"
    several = [
        f"jobs=[{{name: a, data: {{path: a.jsonl, {settings}}}}}, {{name: b, data: {{path: b.jsonl}}}}]"
    ]
    other = runs_by_adapter(parse_settings(RunConfig, several, print))["b"].data
    assert other == parse_settings(RunConfig, ["data=b.jsonl"], print).data
    with pytest.raises(
        ConfigError,
        match=r"job 'b': data\.path is missing: neither the run nor this job names rows",
    ):
        parse_settings(
            RunConfig, ["jobs=[{name: a, data: a.jsonl}, {name: b, learning_rate: 1e-3}]"], print
        )
    with pytest.raises(ConfigError, match=r"data\.path is missing|data is missing"):
        parse_settings(RunConfig, ["jobs=[{name: a}, {name: b, data: b.jsonl}]"], print)


def test_settings_of_the_run_stand_beside_rows_of_its_jobs() -> None:
    """`data: {max_length: 448}` for all, each job with its own file; also where one mixes named
    sets and one reads a file.
    """
    jobs = "jobs=[{name: a, data: a.jsonl}, {name: b, data: {path: b.jsonl, max_length: 64}}, {name: c, mix: [bool_q]}]"
    described = parse_settings(RunConfig, ["data={max_length: 448}", jobs], print)
    found = [
        (one.data.path, one.data.mix, one.data.max_length)
        for one in runs_by_adapter(described).values()
    ]
    assert found == [("a.jsonl", [], 448), ("b.jsonl", [], 64), (None, ["bool_q"], 448)]
    with pytest.raises(ConfigError, match=r"job 'b': data\.path is missing|data\.path is missing"):
        parse_settings(
            RunConfig,
            ["data={max_length: 448}", "jobs=[{name: a}, {name: b, data: b.jsonl}]"],
            print,
        )


@pytest.mark.parametrize("axes", [["r=" + ",".join(map(str, range(1, 101)))] * 1, []])
def test_a_grid_has_a_bound(axes: list[str]) -> None:
    """A million or 10^9 combinations are refused by count, before any is made."""
    hundred = ",".join(map(str, range(1, 101)))
    grid = [
        *axes,
        *(
            f"{name}={hundred}"
            for name in ("seed", "max_steps", "warmup_steps", "gradient_accumulation_steps")
        ),
    ]
    with pytest.raises(
        ConfigError, match=r"the sweep has [\d,]+ combinations \(.*seed: 100.*\); at most 1,000"
    ):
        parse_settings(SweepSettings, ["data=d", *grid], print)


def test_a_list_of_jobs_has_a_bound() -> None:
    with pytest.raises(ConfigError, match="1,001 jobs are too many"):
        build_settings(
            RunConfig, {"data": "d", "jobs": [{"name": f"j{n}"} for n in range(1001)]}, print
        )


def test_the_command_lines_list_replaces_the_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: d.jsonl\njobs: [{name: a}, {name: b, r: 4}]\n")
    assert [j.name for j in parse_settings(RunConfig, [str(file)], print).jobs] == ["a", "b"]
    assert [
        j.name for j in parse_settings(RunConfig, [str(file), "jobs=[{name: c, r: 8}]"], print).jobs
    ] == ["c"]
    assert parse_settings(RunConfig, [str(file), "jobs=null"], print).jobs == []


def test_python_values() -> None:
    notes: list[str] = []
    made = build_settings(
        RunConfig,
        {"data": "d.jsonl", "jobs": [{"name": "a", "r": 4}, {"name": "b", "train": {"lr": 1e-3}}]},
        notes.append,
    )
    assert [one.lora.r for one in runs_by_adapter(made).values() if one.lora] == [4, 16]
    assert [one.train.learning_rate for one in runs_by_adapter(made).values()] == [2e-4, 1e-3]
    assert notes == ["train.lr is read as train.learning_rate"]


# --- what is refused


FILE = """model: m
data: d.jsonl
r: 16
jobs:
  - name: a
    r: 8
  - name: b
    {line}
    lora:
      {inner}
"""


@pytest.mark.parametrize(
    ("line", "inner", "place", "message"),
    [
        (
            "learning_rat: 1",
            "r: 4",
            8,
            "unknown setting 'learning_rat' (did you mean 'learning_rate'?)",
        ),
        ("seed: 1", "rr: 4", 10, "unknown setting 'lora.rr' (did you mean 'lora.r'?)"),
        ("seed: x", "r: 4", 8, "train.seed: got 'x'; give a whole number of at least 0"),
        ("seed: 1", "r: 0", 10, "lora.r: got 0; give a whole number above 0 or auto"),
        (
            "save_steps: 5",
            "r: 4",
            8,
            "train.save_steps is the same for all jobs of a run; set it beside jobs, not in one of them",
        ),
        (
            "dtype: bf16",
            "r: 4",
            8,
            "model.dtype is the same for all jobs of a run; set it beside jobs, not in one of them",
        ),
        (
            "backend: single",
            "r: 4",
            8,
            "backend.name is the same for all jobs of a run; set it beside jobs, not in one of them",
        ),
        ("seed: 1", "adapter_name: x", 10, "lora.adapter_name is the same for all jobs of a run"),
        ("output_dir: x", "r: 4", 8, "output_dir is the same for all jobs of a run"),
        ("r: 5", "r: 4", 10, "lora.r is given twice for the job 'b'; keep one"),
        ("megatron_config: [x]", "r: 4", 8, "megatron_config=['x'] is not supported yet"),
    ],
)
def test_a_mistake_in_a_job_is_told_with_its_line(
    line: str, inner: str, place: int, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(FILE.format(line=line, inner=inner))
    with pytest.raises(ConfigError) as e:
        parse_settings(RunConfig, [str(file)], print)
    assert f"{file}:{place}: {message}" in str(e.value)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ("7", r"jobs: got \[7\]; give a list of maps, such as \[\{name: a, r: 8\}"),
        ("{name: a, r: 3}", "give a list of maps"),
        ("[{r: 3}]", "job 1 has no name"),
        ("[{name: a}, {name: A}]", "two jobs are called 'A'"),
        ("[{name: a/b}]", "'a/b' is not a name"),
        ("[{name: checkpoints}]", "'checkpoints' cannot be a job's name"),
        ("[{name: run.yaml}]", r"'run\.yaml' cannot be a job's name"),
        ("[{name: a, lora: null}]", "cannot be set for a job, since every job trains an adapter"),
        ("[{name: a, test_size: 0.1, eval: y}]", r"job 'a': data\.test_size and data\.eval"),
        (
            "[{name: a, load_best_model_at_end: true}]",
            "job 'a': train.load_best_model_at_end needs evaluation",
        ),
    ],
)
def test_lists_that_make_no_sense(jobs: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(f"jobs={jobs}")


def test_no_adapter_for_the_jobs() -> None:
    with pytest.raises(ConfigError, match="leaves no adapters for jobs"):
        run("lora=null", "jobs=[{name: a}]")


def test_every_shared_setting_exists() -> None:
    known = {name for kind in (RunConfig, UnlearnRunConfig) for name in schema_names(kind).fields}
    assert known >= SHARED_SETTINGS


# --- jobs of a run with a group of its own


def unlearn(*argv: str) -> UnlearnRunConfig:
    return parse_settings(UnlearnRunConfig, ["retain=r.jsonl", *argv], print)


def test_a_grid_over_a_methods_numbers_is_so_many_runs() -> None:
    made = unlearn("forget=f.jsonl", "beta=0.1,0.5", "learning_rate=1e-4,1e-3")
    assert [job.name for job in made.jobs] == [
        "beta0.1-lr1e-4", "beta0.1-lr1e-3", "beta0.5-lr1e-4", "beta0.5-lr1e-3",
    ]  # fmt: skip
    for name, one in runs_by_adapter(made).items():
        own = name.partition("-")
        alone = unlearn("forget=f.jsonl", f"beta={own[0][4:]}", f"learning_rate={own[2][2:]}",
                        f"adapter_name={name}", f"output_dir={made.output_dir / name}")  # fmt: skip
        assert one == alone
    assert unlearn("forget=f.jsonl", "sweep={beta: [0.1, 0.5]}").jobs[1].unlearn == {"beta": 0.5}
    assert "sweep" not in dump_settings(made)


@pytest.mark.parametrize("word", ["jobs", "subjects"])
def test_subjects_are_jobs_with_rows_of_their_own(word: str, tmp_path: Path) -> None:
    given = f"{word}=[{{name: a, forget: a.jsonl}}, {{name: b, forget: b.jsonl, unlearn: {{gamma: 2}}}}]"
    made = unlearn(given, "output_dir=runs/x")
    alone = runs_by_adapter(made)
    assert [(one.data.path, one.unlearn.forget) for one in alone.values()] == [
        ("a.jsonl", "a.jsonl"), ("b.jsonl", "b.jsonl"),
    ]  # fmt: skip
    assert [one.unlearn.gamma for one in alone.values()] == [1.0, 2.0]
    assert [one.unlearn.retain for one in alone.values()] == ["r.jsonl", "r.jsonl"]
    file = tmp_path / "run.yaml"
    file.write_text(dump_settings(made))
    assert parse_settings(UnlearnRunConfig, [str(file)], print) == made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["forget=f", "jobs=[{name: a, method: KL}]"], "unlearn.method is the same for all jobs"),
        (["forget=f", "layer=3,5"], "unlearn.layer is the same for all jobs"),
        (["forget=f", "delta=1,2"], "job 'delta1'.*delta is not used by NPO"),
        (["jobs=[{name: a, forget: f}, {name: b, r: 2}]"], "job 'b': unlearn.forget is missing"),
        (["forget=f", "jobs=[{name: a, data: g}]"], "job 'a'.*reads forget=FILE|both name the forget set"),
        (["forget=f", "jobs=[{name: a}]", "subjects=[{name: a}]"], "both set jobs"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_forget_together(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unlearn(*argv)


@pytest.mark.parametrize(
    ("schema", "argv", "notes"),
    [
        (MoeRunConfig, ["experts=[{name: a, data: f}, {name: b, data: g}]"], []),
        (UnlearnRunConfig, ["retain=r", "subjects=[{name: a, forget: f}]"], []),
        (RunConfig, ["data=f", "experts=[{name: a}]"], ["experts is read as jobs"]),
    ],
)
def test_our_own_word_for_jobs_is_no_news(
    schema: type[Any], argv: list[str], notes: list[str]
) -> None:
    """`lorry moe` documents `experts`; elsewhere it is a guess, and told."""
    told = list[str]()
    assert parse_settings(schema, argv, told.append).jobs
    assert told == notes


@pytest.mark.parametrize(
    ("schema", "word"),
    [(MoeRunConfig, "experts"), (UnlearnRunConfig, "subjects"), (RunConfig, "jobs")],
)
def test_a_map_of_jobs_is_refused_by_the_word_that_was_written(
    schema: type[Any], word: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\n{word}: {{a: f, b: g}}\n")
    with pytest.raises(ConfigError) as error:
        parse_settings(schema, [str(file)], print)
    assert f"{file}:2: {word}: got {{'a': 'f', 'b': 'g'}}; give a list of maps" in str(error.value)
    file.write_text(f"model: m\n{word}: [{{name: a}}, {{name: A}}]\n")
    with pytest.raises(ConfigError, match=f"two {word} are called 'A'"):
        parse_settings(schema, [str(file)], print)


@settings(max_examples=60)
@given(st.text("[]{}:, ab01'\"-\n", max_size=30), st.sampled_from(["jobs", "sweep"]))
def test_any_text_is_taken_or_refused_in_words(text: str, key: str) -> None:
    for schema in (RunConfig, SweepSettings):
        with contextlib.suppress(ConfigError):
            parse_settings(schema, ["data=x", f"{key}={text}"], print)


# --- grids


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["r=8,16", "learning_rate=1e-4,3e-4"], ["r8-lr1e-4", "r8-lr3e-4", "r16-lr1e-4", "r16-lr3e-4"]),
        (["sweep={r: [8, 16], learning_rate: 2.5e-5}"], ["r8-lr2.5e-5", "r16-lr2.5e-5"]),
        (["sweep={r: [8]}", "seed=[0, 1]"], ["r8-seed0", "r8-seed1"]),
        (["sweep={r: [8]}", "r=4,2"], ["r4", "r2"]),
        (["lr_scheduler_type=linear,cosine", "use_rslora=true,false"],
         ["linear-rslorafalse", "linear-rsloratrue", "cosine-rslorafalse", "cosine-rsloratrue"]),
        (["sweep={target_modules: [[q_proj], [q_proj, v_proj], all-linear], data: [a/x.jsonl, a/y.jsonl]}"],
         ["q_proj-x", "q_proj-y", "q_proj-v_proj-x", "q_proj-v_proj-y", "all-linear-x", "all-linear-y"]),
        (["sweep=[{r: 8, learning_rate: 0.5}, {r: 4, lora: {lora_dropout: 0.1}}]"], ["r8-lr0.5", "r4-dropout0.1"]),
        (["jobs=[{name: a}, {name: b, r: 4}]"], ["a", "b"]),
        ([], []),
    ],
)  # fmt: skip
def test_names_of_a_grid(argv: list[str], names: list[str]) -> None:
    assert sorted(swept(*argv)) == sorted(names)


def test_a_grid_is_every_combination() -> None:
    made = parse_settings(SweepSettings, ["data=d", "r=2,4", "warmup_steps=0,3"], print)
    (alone,) = made.passes()
    found = [
        (one.lora.r, one.train.warmup_steps) for one in runs_by_adapter(alone).values() if one.lora
    ]
    assert found == [(2, 0), (2, 3), (4, 0), (4, 3)]
    assert build_settings(SweepSettings, made.model_dump(), print).jobs == made.jobs


def test_what_is_handed_down_is_written_into_no_argument() -> None:
    run, own = {"lora": {"target_r": 2, "r": 8}}, {"lora": {"variant": "adalora"}}
    kept, (tree, other) = hand_down(run, [("a", own), ("b", {})], [].append)
    assert (kept, tree, other) == (
        {"lora": {"r": 8}},
        {"lora": {"target_r": 2, "variant": "adalora"}},
        {},
    )
    assert run == {"lora": {"target_r": 2, "r": 8}}
    assert own == {"lora": {"variant": "adalora"}}


@pytest.mark.parametrize(
    ("argv", "own", "notes"),
    [
        (["variant=lora,adalora", "target_r=2"], {"lora": None, "adalora": 2},
         ["target_r=2 belongs to variant=adalora: only adalora has it"]),
        (["variant=lora,adalora", "target_r=2,4", "init_r=12"],
         {"lora": None, "adalora-target_r2": 2, "adalora-target_r4": 4},
         ["target_r belongs to variant=adalora: the other combinations are tried without it",
          "init_r=12 belongs to variant=adalora: only adalora-target_r2, adalora-target_r4 have it"]),
        (["jobs=[{name: a, variant: adalora, target_r: 3}, {name: b, variant: adalora}, {name: c}]", "target_r=2"],
         {"a": 3, "b": 2, "c": None}, ["target_r=2 belongs to variant=adalora: only a, b have it"]),
        # the run's own is AdaLoRA: as it was, what is plain leaves its settings out
        (["variant=adalora", "target_r=2", "jobs=[{name: a}, {name: b, variant: lora}]"], {"a": 2, "b": None}, []),
    ],
)  # fmt: skip
def test_what_one_variant_has_goes_to_its_jobs(
    argv: list[str], own: dict[str, int | None], notes: list[str]
) -> None:
    said = list[str]()
    made = parse_settings(SweepSettings, ["data=d", *argv], said.append)
    found = {name: one.lora for name, one in runs_by_adapter(made).items()}
    assert {
        name: lora.target_r if lora and lora.variant == "adalora" else None
        for name, lora in found.items()
    } == own
    assert said == notes
    # resolved, it is read back without a word
    again = build_settings(SweepSettings, made.model_dump(), said.append)
    assert (again.jobs, said) == (made.jobs, notes)


def test_where_no_job_is_of_the_kind_its_settings_are_refused() -> None:
    for words in (["r=2,4", "target_r=2"], ["variant=lora,dora", "target_r=2"]):
        with pytest.raises(ConfigError, match="target_r is AdaLoRA's; add variant=adalora"):
            swept(*words)
    # nor is a start's
    with pytest.raises(ConfigError, match="keep_residual=true"):
        swept("init_lora_weights=true,eva", "keep_residual=true")
    assert swept("init_lora_weights=true,olora", "keep_residual=true") == ["inittrue", "initolora"]
    with pytest.raises(ConfigError, match="rho is EVA's"):
        swept("init_lora_weights=true,corda", "rho=3")
    assert swept("init_lora_weights=true,eva", "rho=3", "init_rows=8") == ["inittrue", "initeva"]
    # the run's own is EVA's: what is not leaves its settings out
    for job in ("{name: b, init_lora_weights: true}", "{name: b, init_lora_weights: corda}"):
        words = ["init_lora_weights=eva", "rho=3", "init_rows=8", f"jobs=[{{name: a}}, {job}]"]
        assert swept(*words) == ["a", "b"]


def test_passes_of_a_few_jobs_each() -> None:
    made = parse_settings(
        SweepSettings, ["data=d", "r=1,2,3,4,5", "jobs_per_pass=2", "output_dir=o"], print
    )
    assert [[job.name for job in one.jobs] for one in made.passes()] == [
        ["r1", "r2"],
        ["r3", "r4"],
        ["r5"],
    ]
    assert [one.output_dir for one in made.passes()] == [
        Path("o/pass-1"),
        Path("o/pass-2"),
        Path("o/pass-3"),
    ]
    assert all(type(one) is RunConfig for one in made.passes())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["r=8,8"], "the same combination twice: r8"),
        (["r=8,x"], r"job 'rx': lora\.r: got 'x'"),
        (["sweep={rr: [8]}"], r"unknown setting 'rr' \(did you mean 'r'\?\)"),
        (["sweep={save_steps: [8, 9]}"], r"train\.save_steps is the same for all jobs"),
        (["sweep=8"], "a sweep is a map of lists"),
        (["sweep=[{r: 8}]", "seed=0,1"], "a list of maps, not both"),
        (["jobs=[{name: a}]", "r=8,16"], "a list of jobs and a sweep are both given"),
    ],
)
def test_grids_that_make_no_sense(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        swept(*argv)


@pytest.mark.parametrize(
    ("argv", "folders", "held"),
    [
        (["quantize=null,nf4", "r=2,4"], ["none", "nf4"], [None, "nf4"]),
        (["sweep={model: [a/one, b/two], r: [2, 4]}"], ["one", "two"], [None, None]),
        (["sweep={model.quantize: [int8, nf4]}", "r=2,4"], ["int8", "nf4"], ["int8", "nf4"]),
        (["dtype=bf16,fp32", "r=2,4"], ["bfloat16", "float32"], [None, None]),
    ],
)
def test_another_base_is_another_pass(
    argv: list[str], folders: list[str], held: list[str | None]
) -> None:
    made = parse_settings(SweepSettings, ["data=d", "output_dir=o", *argv], print)
    passes = made.passes()
    assert [one.output_dir for one in passes] == [Path("o") / name for name in folders]
    assert [one.model.quantize for one in passes] == held
    assert [[job.name for job in one.jobs] for one in passes] == [["r2", "r4"]] * 2
    # written down and read back it is the same sweep
    again = build_settings(SweepSettings, made.model_dump(), print)
    assert again.passes() == passes


def test_seeds_are_jobs_on_the_same_held_out_rows() -> None:
    words = ["data=d", "output_dir=o", "r=2,4", "seeds=2", "seed=7", "test_size=0.1"]
    (alone,) = parse_settings(SweepSettings, words, print).passes()
    assert [job.name for job in alone.jobs] == ["r2-seed7", "r2-seed8", "r4-seed7", "r4-seed8"]
    assert [one.train.seed for one in runs_by_adapter(alone).values()] == [7, 8, 7, 8]
    assert alone.data.test_seed == 7
    (one_setting,) = parse_settings(SweepSettings, ["data=d", "seeds=3"], print).passes()
    assert [job.name for job in one_setting.jobs] == ["seed0", "seed1", "seed2"]


def test_text_with_commas_is_no_grid() -> None:
    made = parse_settings(
        SweepSettings,
        ["data=[a.jsonl, b.jsonl]", "system=Hello, you", "target_modules=q_proj,v_proj", "r=1,2"],
        print,
    )
    assert (made.data.path, made.data.system) == (["a.jsonl", "b.jsonl"], "Hello, you")
    assert made.lora is not None
    assert made.lora.target_modules == ["q_proj", "v_proj"]
    assert len(made.jobs) == 2


def test_a_long_grids_names_fit_a_folder() -> None:
    many: dict[str, Any] = {
        "lora.lora_dropout": [0.0, 0.1],
        "seed": [12345, 54321],
        "weight_decay": [0.01],
        "learning_rate": [1e-3],
    }
    many |= {
        "per_device_train_batch_size": [4],
        "gradient_accumulation_steps": [2],
        "max_grad_norm": [0.5],
    }
    names = [
        job.name for job in build_settings(SweepSettings, {"data": "d", "sweep": many}, print).jobs
    ]
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 56
