"""The command line: ``lorry VERB [CONFIG.yaml] [key=value ...]`` becomes checked settings and one call of the verb's ``main``.

Nothing here, nor anything it imports before the verb runs, imports torch: ``lorry --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Protocol, cast

import typer

from lorry.errors import LorryError, explain_out_of_memory
from lorry.streams import abandon, streams
from lorry.train.signals import raising, tell_remembered
from lorry.visible import escaped, message, visible

ADVICE = (
    "Close what else runs here, take less at a time (batch_size, per_device_train_batch_size, max_length), or a smaller model; "
    "`lorry plan` says before anything is loaded what a run needs"
)
BROKEN_PIPE, INTERRUPTED = 141, 130  # as the shell reports a program that SIGPIPE or SIGINT ended


class VerbModule(Protocol):
    """A module of lorry.verbs: takes checked settings and the notes about how they were read, returns the exit code."""

    def main(self, settings: object, notes: list[str]) -> int: ...


@dataclass(frozen=True)
class Verb:
    """One command: its words (``lorry NAME WORDS``), its line in the help, and the schema of its settings."""

    name: str
    schema: str
    words: str
    line: str
    panel: str


VERBS = (
    Verb("demo", "DemoSettings", "", "teach a small real model new facts; before and after", "Start here"),
    Verb("sft", "Run", "data=FILE", "fine-tune an adapter on examples", "Train"),
    Verb("distill", "DistillRun", "teacher=MODEL data=FILE", "learn to speak as a teacher does", "Train"),
    Verb("plan", "PlanSettings", "[MODEL]", "memory and time before anything is loaded; the rank that fits a budget", "Train"),
    Verb("sweep", "Sweep", "data=FILE r=8,16 ...", "train a grid of settings in one pass and rank it", "Train"),
    Verb("chat", "ChatSettings", "RUN", "talk to a model with any of its adapters", "Use"),
    Verb("eval", "EvalSettings", "RUN data=FILE | tasks=[...]", "measure a model on a file, or on named sets", "Use"),
    Verb("merge", "MergeSettings", "RUN", "fold an adapter into its base's weights", "Ship"),
    Verb("unmerge", "UnmergeSettings", "RUN", "give back the base of a merged model, bit for bit", "Ship"),
    Verb("export", "ExportSettings", "RUN to=FORMAT", "write a run in another library's format: hf, peft", "Ship"),
    Verb("push", "PushSettings", "RUN", "upload a run, with its model card, to the hub", "Ship"),
    Verb("runs", "RunsSettings", "[FOLDER]", "the runs in a folder and where each stands", "Look"),
    Verb("report", "ReportSettings", "RUN [RUN ...]", "one offline HTML page for a run, or several side by side", "Look"),
    Verb("compare", "CompareSettings", "RUN [RUN ...] | data=FILE", "adapters against full fine-tuning, measured", "Look"),
    Verb("doctor", "DoctorSettings", "[RUN]", "what this machine has; given a run, which contracts held", "Look"),
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _add(verb: Verb) -> None:
    free = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(verb.name, help=verb.line, rich_help_panel=verb.panel, context_settings=free, add_help_option=False)
    def command(ctx: typer.Context) -> None:
        raise typer.Exit(_run(verb, ctx.args))


for _verb in VERBS:
    _add(_verb)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, an error's own (lorry.errors), 130 on Ctrl-C, 2 on a wrong command."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    args[0] = visible(args[0])  # typer prints a verb that it does not know
    # Before torch is imported: OpenMP's threads wait for each other by spinning, which on a busy machine starves the very thread
    # they wait for (the demo fell from 600 to 40 tokens/s beside other work); after a short spin they sleep instead.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    code = 0
    with streams():
        try:
            with raising("arrived; what was written is whole"):
                app(args=args, prog_name="lorry")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except KeyboardInterrupt:
            _complain("interrupted")
            code = INTERRUPTED
        except LorryError as error:  # a signal before the verb was called, or behind it; help that cannot be written
            if isinstance(error, OSError):
                abandon(sys.stdout)
            _complain(str(error))
            code = error.exit_code
        return _flush(code)


def _run(verb: Verb, args: list[str]) -> int:
    """Parse, print the notes, call the verb; errors meant for people become one message, with its page, and an exit code."""
    try:
        with explain_out_of_memory(ADVICE):
            return _parse_and_call(verb, args)
    except LorryError as error:
        _complain(str(error))
        if error.docs:
            _tell(f"see docs/{error.docs}", dim=True)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return _hush()


def _parse_and_call(verb: Verb, args: list[str]) -> int:
    from lorry import config

    tell_remembered()
    schema = getattr(config, verb.schema)
    if "--help" in args or "-h" in args:
        from lorry.config.guide import guide

        print(guide(schema, f"lorry {verb.name} [CONFIG.yaml] {verb.words} [key=value ...]", verb.line))
        return 0
    dump_only = "--dump-config" in args
    notes: list[str] = []
    settings = config.parse(schema, [arg for arg in args if arg != "--dump-config"], notes)
    for note in notes:
        _tell(f"note: {note}", dim=True)
    if dump_only:
        print(escaped(config.dump(settings)), end="")
        return 0
    module = cast(VerbModule, importlib.import_module(f"lorry.verbs.{verb.name}"))
    tell_remembered()
    return module.main(settings, notes)


def _tell(text: str, **style: Any) -> None:
    """A line on stderr, styled on a terminal only."""
    styled = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    said = message(text)
    print(typer.style(said, **style) if styled else said, file=sys.stderr)


def _complain(message: str) -> None:
    """An error's message in red; LORRY_DEBUG=1 puts the traceback before it."""
    if os.environ.get("LORRY_DEBUG") == "1":
        traceback.print_exc()
    _tell(f"error: {message}", fg="red")


def _flush(code: int) -> int:
    """Write what is left now, where a reader that has gone is no error, rather than at exit, where Python would complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _hush()
    except LorryError as error:
        abandon(sys.stdout)
        _complain(str(error))
        code = error.exit_code
    try:
        if sys.__stderr__ is not None:
            sys.__stderr__.flush()
    except OSError:
        abandon(sys.stderr)
    return code


def _hush() -> int:
    abandon(sys.stdout)
    return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
