"""`lorry push RUN`: upload a finished run to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lorry.config.settings import PushSettings
from lorry.verbs.open_model import print_note


def main(settings: PushSettings) -> int:
    """Upload, tell what a person should know. The last line of standard output is the repository's
    address.
    """
    from lorry.hub.push import push_run

    print(
        push_run(
            Path(settings.run),
            settings.hub_model_id,
            private=settings.hub_private_repo,
            tell=print_note,
        )
    )
    return 0
