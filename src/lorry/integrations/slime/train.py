"""slime's training with the flags of LoRA registered, so that none is dropped and `--help` lists them.

    cd slime && PYTHONPATH=MEGATRON_LM python -m lorry.integrations.slime.train --use-lora ...

slime's train.py lies in the root of its repository, which has to be the working directory or on PYTHONPATH; so
has the checkout of Megatron-LM (MEGATRON_LM above), unless it is installed.
"""

from __future__ import annotations

import sys

from lorry.errors import LorryError
from lorry.integrations.slime.arguments import (
    add_lora_arguments,
    check_arguments,
    check_words,
    complete_arguments,
)
from lorry.integrations.slime.provider import import_part


def main() -> None:
    """Parse the command line as slime does, check it, and train."""
    check_words(sys.argv[1:])
    args = import_part("slime.utils.arguments").parse_args(add_custom_arguments=add_lora_arguments)
    check_arguments(args)
    complete_arguments(args)
    import_part("train").train(args)


if __name__ == "__main__":
    try:
        main()
    except LorryError as e:
        print(f"lorry: {e}", file=sys.stderr)
        raise SystemExit(e.exit_code) from None
