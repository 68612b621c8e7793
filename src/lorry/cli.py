"""The command line: ``lorry VERB [CONFIG.yaml] [key=value ...]`` becomes checked settings and one
call of the verb's ``main``.

Nothing here, nor anything it imports before the verb runs, imports torch: ``lorry --help`` answers
at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Protocol, TextIO, cast

import typer

from lorry.errors import ConfigError, LorryError, explain_out_of_memory
from lorry.imports import kept_imports
from lorry.ranks import (
    is_main_process,
    launched_process,
    note_of_one_process,
    rank_label,
    workers_to_start,
)
from lorry.streams import abandon_stream, guard_streams, silence_streams
from lorry.train.monitoring.signals import raise_deferred_signals, raise_on_signals
from lorry.visible import escape_document, make_visible, visible_message

OUT_OF_MEMORY_ADVICE = (
    "Close other programs, lower batch_size, per_device_train_batch_size or "
    "max_length, or use a smaller model; `lorry plan` predicts the memory of a run "
    "before anything is loaded"
)
BROKEN_PIPE, INTERRUPTED = 141, 130  # as the shell reports a program that SIGPIPE or SIGINT ended


# the verbs whose work several processes can share; all others refuse `backend.processes`
PARALLEL_VERBS = frozenset({"sft", "unlearn", "distill", "sweep", "moe", "eval", "attack"})
# and one that starts a command of its own, with processes of its own, for each way that it trains
STARTING_VERBS = frozenset({"compare"})
# and those that write nothing that copies of them could spoil; a plan's processes are no processes
LOOKING_VERBS = frozenset({"plan", "runs", "doctor", "report"})


class VerbModule(Protocol):
    """A module of lorry.verbs: takes checked settings, returns the exit code."""

    def main(self, settings: object) -> int: ...


@dataclass(frozen=True)
class CliVerb:
    """One command: its words (``lorry NAME WORDS``), its line in the help, and the schema of its
    settings.
    """

    name: str
    schema: str
    words: str
    line: str
    panel: str


VERBS = (
    CliVerb(
        "demo",
        "DemoSettings",
        "",
        "teach a small real model new facts, and measure it before and after",
        "Start here",
    ),
    CliVerb("sft", "RunConfig", "data=FILE", "fine-tune an adapter on examples", "Train"),
    CliVerb(
        "distill",
        "DistillRunConfig",
        "teacher=MODEL data=FILE",
        "train on a teacher's distributions over the next token",
        "Train",
    ),
    CliVerb(
        "unlearn",
        "UnlearnRunConfig",
        "forget=FILE retain=FILE",
        "make a model forget one set of rows and retain another",
        "Train",
    ),
    CliVerb(
        "unlearn-alternates",
        "AlternatesSettings",
        "RUN forget=FILE alternates=OUT.json",
        "sample alternate answers to the forget set, for AltPO",
        "Train",
    ),
    CliVerb(
        "moe",
        "MoeRunConfig",
        "experts=[...]",
        "train a mixture of LoRA experts, and a router over them",
        "Train",
    ),
    CliVerb(
        "plan",
        "PlanSettings",
        "[MODEL]",
        "predict memory and time before anything is loaded; find the rank that fits a budget",
        "Train",
    ),
    CliVerb(
        "sweep",
        "SweepSettings",
        "data=FILE r=8,16 ...",
        "train a grid of settings in one pass and rank it",
        "Train",
    ),
    CliVerb("chat", "ChatSettings", "RUN", "talk to a model with any of its adapters", "Use"),
    CliVerb(
        "eval",
        "EvalSettings",
        "RUN data=FILE | tasks=[...]",
        "evaluate a model on a file, or on named sets",
        "Use",
    ),
    CliVerb(
        "attack",
        "AttackSettings",
        "RUN relearn|quantize|rephrase",
        "test whether what was unlearned comes back",
        "Use",
    ),
    CliVerb(
        "merge",
        "MergeSettings",
        "RUN [RUN ...]",
        "merge an adapter into its base model, or several adapters into one",
        "Ship",
    ),
    CliVerb(
        "unmerge",
        "UnmergeSettings",
        "RUN",
        "restore the base model of a merged model, bit for bit",
        "Ship",
    ),
    CliVerb(
        "export",
        "ExportSettings",
        "RUN to=FORMAT",
        "write a run for other software: hf, peft, gguf; a mixture as hf-moe or dense",
        "Ship",
    ),
    CliVerb("push", "PushSettings", "RUN", "upload a run, with its model card, to the hub", "Ship"),
    CliVerb(
        "runs", "RunsSettings", "[FOLDER]", "list the runs in a folder with their progress", "Look"
    ),
    CliVerb(
        "report",
        "ReportSettings",
        "RUN [RUN ...]",
        "write one offline HTML page for a run, or for several side by side",
        "Look",
    ),
    CliVerb(
        "compare",
        "CompareSettings",
        "RUN [RUN ...] | data=FILE",
        "compare adapters with full fine-tuning",
        "Look",
    ),
    CliVerb(
        "doctor",
        "DoctorSettings",
        "[RUN]",
        "show what this machine has, or which contracts of a run held",
        "Look",
    ),
)

app = typer.Typer(
    name="lorry",
    help="LoRA post-training for language models. `lorry VERB --help` lists a verb's settings.",
    epilog="Example: lorry sft model=smollm2-135m-instruct data=people.jsonl r=16 output_dir=runs/people",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"lorry {version('lorry')}")
        except PackageNotFoundError:
            print("lorry (run from a source tree that is not installed)")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _add_command(verb: CliVerb) -> None:
    # typer only finds the verb; its words are read by config/parsing, whose errors name the nearest
    # setting
    unchecked = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(
        verb.name,
        help=verb.line,
        rich_help_panel=verb.panel,
        context_settings=unchecked,
        add_help_option=False,
    )
    def command(ctx: typer.Context) -> None:
        raise typer.Exit(_run_verb(verb, ctx.args))


for _verb in VERBS:
    _add_command(_verb)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, an error's own (lorry.errors), 130 on Ctrl-C, 2
    on a wrong command. Of several processes rank 0 alone prints; another one says why it failed,
    where rank 0 does not."""
    if is_main_process():
        return _run_command_line(argv)
    with silence_streams() as messages:
        _failures.append(messages)
        try:
            return _run_command_line(argv)
        finally:
            _failures.pop()


# where a process that is otherwise silent says why it failed
_failures = list[TextIO]()


def _run_command_line(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if any(word.endswith(".py") for word in args):
        # imported only now: it imports pydantic, which `lorry --help` does without
        from lorry.config.parsing.open_unlearning import verb_of_launcher

        args = verb_of_launcher(args)
    args[0] = make_visible(args[0])  # typer prints a verb that it does not know
    # Before torch is imported: OpenMP's threads wait for each other by spinning, which on a busy
    # machine starves the very thread they wait for (the demo fell from 600 to 40 tokens/s beside
    # other work); after a short spin they sleep instead.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    code = 0
    with guard_streams():
        try:
            with raise_on_signals("arrived; all files written so far are complete"):
                app(args=args, prog_name="lorry")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except KeyboardInterrupt:
            _print_error("interrupted")
            code = INTERRUPTED
        # a signal before the verb was called, or behind it; help that cannot be written
        except LorryError as error:
            # standard output failed once; at exit Python would try again and print a traceback
            if isinstance(error, OSError):
                abandon_stream(sys.stdout)
            _print_error(str(error))
            code = error.exit_code
        return _flush_output(code)


def _run_verb(verb: CliVerb, args: list[str]) -> int:
    """Parse, print the notes, call the verb; errors meant for people become one message, with its
    page, and an exit code.
    """
    try:
        with explain_out_of_memory(OUT_OF_MEMORY_ADVICE):
            return _parse_and_call(verb, args)
    except LorryError as error:
        if is_main_process():
            _tell(error)
        _tell_other_processes(verb, error)
        # what every process of a run has, rank 0 has told
        if not is_main_process() and not error.shared:
            _tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return _silence_output()


def _tell(error: LorryError) -> None:
    """An error with its page."""
    _print_error(str(error))
    if error.docs:
        _print_stderr(f"see docs/{error.docs}", dim=True)


def _tell_other_processes(verb: CliVerb, error: LorryError) -> None:
    """A wrong word, or another error before the processes of a command know each other: it is told
    once, and nobody waits for this one."""
    try:
        launched = launched_process()
    except ConfigError:  # who they are is not known: each tells what it has
        return
    if launched is None or launched.world_size == 1 or error.shared:
        return
    if verb.name not in PARALLEL_VERBS:
        error.shared = True  # each was given the same words, and none waits for another
        return
    # imported only now: torch
    from lorry.backends.distributed.communicator import share_early_failure

    share_early_failure(error)


def _parse_and_call(verb: CliVerb, args: list[str]) -> int:
    from lorry import config

    raise_deferred_signals()
    schema = getattr(config, verb.schema)
    if "--help" in args or "-h" in args:
        from lorry.config.guide import format_help

        words = f" {verb.words}" if verb.words else ""
        usage = f"lorry {verb.name} [CONFIG.yaml]{words} [key=value ...]"
        print(format_help(schema, usage, verb.line))
        return 0
    _refuse_backend(verb, args)
    # a switch of every verb, so it is no field of their schemas
    dump_only = "--dump-config" in args
    notes: list[str] = []
    settings = config.parse_settings(
        schema, [arg for arg in args if arg != "--dump-config"], notes.append
    )
    workers = 0 if dump_only else _workers_of(verb, settings)
    if verb.name in PARALLEL_VERBS and (alone := note_of_one_process(settings.backend)):
        notes.append(alone)
    # of workers rank 0 reads the same words, and tells them
    for note in notes if is_main_process() and not workers else ():
        _print_stderr(f"note: {note}", dim=True)
    if dump_only:
        print(escape_document(config.dump_settings(settings)), end="")
        return 0
    if workers:
        # imported only now: torch
        from lorry.backends.distributed.launch import run_workers

        return run_workers([verb.name, *args], workers)
    # imported only now: the modules of some verbs import torch
    name = verb.name.replace("-", "_")
    with kept_imports():
        module = cast(VerbModule, importlib.import_module(f"lorry.verbs.{name}"))
    raise_deferred_signals()
    return module.main(settings)


def _workers_of(verb: CliVerb, settings: Any) -> int:
    """How many processes this command has to start: those of `backend.processes`, unless a launcher
    has started this one, or another process will make the run (`background`). Raises ConfigError
    for a verb that runs in one process."""
    backend = getattr(settings, "backend", None)
    if verb.name in LOOKING_VERBS:
        return 0
    if backend is None or verb.name not in PARALLEL_VERBS:
        _refuse_several(verb, getattr(backend, "name", "single"))
        return 0
    if not getattr(settings, "background", False):
        return workers_to_start(backend)
    if (launched := launched_process()) is not None and launched.world_size > 1:
        raise ConfigError(
            "background=true leaves a process alone, but these were started by a launcher "
            "(WORLD_SIZE), which ends when they do; leave it out and put the launcher in the "
            "background"
        )
    return 0


def _refuse_backend(verb: CliVerb, args: Sequence[str]) -> None:
    """Raise ConfigError for a word that asks a verb of one process for several."""
    if verb.name in PARALLEL_VERBS | STARTING_VERBS or verb.name == "plan":
        return
    from lorry.config.schema.backend import BackendConfig, TrainBackendConfig

    several = TrainBackendConfig.model_fields.keys() - BackendConfig.model_fields.keys()
    for word in args:
        name, _, value = word.partition("=")
        group, _, field = name.partition(".")
        another = name in ("backend", "backend.name") and value != "single"
        if another or (group == "backend" and field in several):
            raise ConfigError(f"{word}: {_one_process(verb)}: leave it out ({_several_are_for()})")


def _one_process(verb: CliVerb) -> str:
    return f"lorry {verb.name} runs in one process"


def _several_are_for() -> str:
    return f"several are for {', '.join(sorted(PARALLEL_VERBS))}"


def _refuse_several(verb: CliVerb, backend: str) -> None:
    """Raise ConfigError where a verb of one process was started in several, or is to start them."""
    launched = launched_process()
    if launched is not None and launched.world_size > 1:
        what = "WORLD_SIZE says that it has more"
        if verb.name in STARTING_VERBS:
            what += "; start it alone, with backend.processes=N for what it trains"
    elif backend != "single" and verb.name not in STARTING_VERBS:
        what = f"leave out backend={backend}"
    else:
        return
    raise ConfigError(f"{_one_process(verb)}: {what} ({_several_are_for()})")


def _print_stderr(text: str, **style: Any) -> None:
    """A line on stderr, styled on a terminal only."""
    stream = _failures[-1] if _failures else sys.stderr
    styled = stream.isatty() and "NO_COLOR" not in os.environ
    line = visible_message(text)
    print(typer.style(line, **style) if styled else line, file=stream)


def _print_error(message: str) -> None:
    """An error's message in red; LORRY_DEBUG=1 puts the traceback before it."""
    if os.environ.get("LORRY_DEBUG") == "1":
        traceback.print_exc()
    _print_stderr(f"error: {rank_label()}{message}", fg="red")


def _flush_output(code: int) -> int:
    """Write what is left now, where a reader that has gone is no error, rather than at exit, where
    Python would complain.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _silence_output()
    except LorryError as error:
        abandon_stream(sys.stdout)
        _print_error(str(error))
        code = error.exit_code
    try:
        if sys.__stderr__ is not None:
            sys.__stderr__.flush()
    except OSError:
        abandon_stream(sys.stderr)
    return code


def _silence_output() -> int:
    abandon_stream(sys.stdout)
    return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
