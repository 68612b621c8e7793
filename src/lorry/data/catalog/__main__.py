"""`python -m lorry.data.catalog`: every named set in a Markdown table, as docs/sets.md shows it."""

from __future__ import annotations

from lorry.data.catalog import shipped_catalog


def render_sets_table() -> str:
    """The sets, one a line, then the suites."""
    catalog = shipped_catalog()
    lines = [
        "| set | what | hub | splits | metrics | templates | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in catalog.sets.values():
        where = (
            f"{entry.hub}{f' ({entry.config})' if entry.config else ''}"
            if entry.hub
            else "files only"
        )
        splits = ", ".join(
            f"{ours}: {theirs}" if ours != theirs else ours
            for ours, theirs in (entry.splits or {}).items()
        )
        metrics = ", ".join(entry.metrics)
        lines.append(
            f"| `{entry.name}` | {entry.about} | {where} | {splits} | "
            f"{metrics} | {len(entry.templates)} | {entry.licence} |"
        )
    suites = "\n".join(f"- `{name}`: {', '.join(sets)}" for name, sets in catalog.suites.items())
    return "\n".join(lines) + f"\n\nSuites, usable wherever a set is:\n\n{suites}\n"


if __name__ == "__main__":
    print(render_sets_table(), end="")
