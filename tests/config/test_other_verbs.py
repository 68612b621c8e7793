"""Settings of `lorry unlearn` given to another verb: the error names the command that has them."""

from __future__ import annotations

import pytest

from lorry.config import RunConfig, SweepSettings, UnlearnConfig, parse_settings
from lorry.config.parsing.aliases import ALIAS_RENAMES
from lorry.config.parsing.names import schema_names
from lorry.errors import ConfigError

# a word of other tools as well, with a meaning here
OTHERWISE_READ = {"alpha", "beta1", "beta2"}


@pytest.mark.parametrize("schema", [RunConfig, SweepSettings])
@pytest.mark.parametrize("name", sorted(UnlearnConfig.model_fields.keys() - OTHERWISE_READ))
def test_a_setting_of_unlearning_names_its_verb(schema: type[RunConfig], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' is a setting of .*lorry unlearn"):
        parse_settings(schema, ["data=x.jsonl", f"{name}=1"], print)


def test_what_is_read_otherwise_is_a_name_here_or_in_the_table_of_other_names() -> None:
    assert ALIAS_RENAMES.keys() | {*schema_names(RunConfig).leaves} >= OTHERWISE_READ


def test_a_sweep_of_an_unlearning_method_is_told_how() -> None:
    """One error for the whole line, with the command that does it."""
    words = ["method=NPO", "forget=f.jsonl", "retain=r.jsonl", "beta=0.1,0.5"]
    with pytest.raises(ConfigError) as error:
        parse_settings(SweepSettings, words, print)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.endswith(
            "lorry unlearn model=M forget=FILE retain=FILE method=NPO beta=0.1,0.5"
        )
