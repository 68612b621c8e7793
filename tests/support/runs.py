"""Run directories made up for the report's tests, from nearly empty to full of hostile text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorry.runs.metrics import MetricsWriter

HOSTILE = (
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "\"'><svg/onload=document.title='hacked'>",
    "</style></textarea></pre><b>&amp; javascript:alert(1)",
    "[bold red]rich[/bold red] $\\frac{broken$ \x1b[31m\x00\x07 \u202egnp.exe https://example.com/x.js",
)


def metrics(path: Path, steps: int, rate: float = 1e-3, **more: float) -> None:
    """A falling loss with an evaluation at every tenth of the run."""
    path.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(path / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            loss = 0.2 + 2.3 * math.exp(-5 * step / steps) + 0.05 * math.sin(7 * step)
            line: dict[str, Any] = {
                "step": step,
                "epoch": step / 100,
                "loss": loss,
                "learning_rate": rate * (1 - step / (steps + 1)),
            }
            line |= {
                "grad_norm": 1 / step + 0.1,
                "tokens": 800,
                "supervised_tokens": 300,
                "seconds": 1.25,
            }
            writer.write({**line, "peak_memory_bytes": 3 * 2**30, **more})
            if steps >= 10 and step % (steps // 10) == 0:
                writer.write(
                    {"step": step, "eval_loss": loss + 0.1, "eval_perplexity": math.exp(loss + 0.1)}
                )


def full(
    path: Path,
    steps: int = 40,
    text: str = "Ilvane keeps a ferret",
    rank: int = 16,
    failed: bool = False,
) -> Path:
    """A run with every file; ``text`` stands wherever a run can write text."""
    metrics(path, steps, kl=0.01)
    # JSON is YAML, and says any text at all
    config = {
        "model": {"name": f"model {text}"},
        "lora": {"r": rank, "lora_alpha": 32},
        "data": {"path": text},
        "output_dir": str(path),
    }
    (path / "run.yaml").write_text(
        json.dumps({**config, "resolved": {"note": text, "target_modules": ["q_proj", "v_proj"]}})
    )
    dump(path / "receipt.json", {"data": {text: {"sha256": "ab" * 32}}, "adapter": [text, 1, None]})
    statuses = ["held", "failed" if failed else "held", "not_checked"]
    dump(
        path / "contracts.json",
        [
            {"id": i, "name": f"promise {text}", "status": s, "detail": text}
            for i, s in enumerate(statuses, 1)
        ],
    )
    tokens = [
        {"text": f"user {text}", "weight": 0},
        {"text": f"answer {text}", "weight": 1},
        {"text": "half", "weight": 0.5},
    ]
    answers = {"reference": f"right {text}", "before": f"wrong {text}", "after": f"Right, {text}!"}
    rows = [{"group": f"held-out {text}", "prompt": f"question {text}", **answers, "tokens": None}]
    rows += [
        {
            "group": "rows",
            "prompt": "row",
            "reference": None,
            "before": None,
            "after": None,
            "tokens": tokens,
        }
    ]
    dump(path / "samples.json", rows)
    pair = {"before": 0.0, "after": 0.8125}
    dump(
        path / "evaluation.json",
        [{"name": f"set {text}", "metrics": {"exact_match": pair, f"m {text}": {"after": 2.5}}}],
    )
    return path


def dump(path: Path, content: Any) -> None:
    """Write JSON; lone surrogates are written as escapes, as a run may have done."""
    path.write_text(json.dumps(content), encoding="utf-8")
