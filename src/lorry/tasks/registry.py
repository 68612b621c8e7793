"""Tasks by name: `run.task` chooses the builder. A new task is a module, or a folder, beside this
one and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from lorry.tasks.build import BuiltTask, TaskInputs
from lorry.tasks.distill.builder import build_distill
from lorry.tasks.sft import build_sft

TASKS: dict[str, Callable[[TaskInputs], BuiltTask]] = {"sft": build_sft, "distill": build_distill}
