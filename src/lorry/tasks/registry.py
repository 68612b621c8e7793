"""Tasks by name: `run.task` chooses the definition. A new task is a module, or a folder, beside this
one and a line here.
"""

from __future__ import annotations

from lorry.tasks.build import TaskDefinition
from lorry.tasks.distill.builder import DISTILL
from lorry.tasks.moe.builder import MOE
from lorry.tasks.sft import SFT
from lorry.tasks.unlearn.builder import UNLEARN

TASKS: dict[str, TaskDefinition] = {"sft": SFT, "distill": DISTILL, "unlearn": UNLEARN, "moe": MOE}
