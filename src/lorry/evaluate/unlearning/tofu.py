"""TOFU (Maini et al. 2024) as open-unlearning asks it: names, rows and shapes of its TOFU_EVAL.json.

forget is forgetNN_perturbed, retain the first 400 rows of the retain set, ra real authors, wf world
facts; holdout rows were never trained on. The bare question is asked through the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lorry.data.reading.suite_splits import TOFU
from lorry.evaluate.metrics.memorization import exact_memorization
from lorry.evaluate.metrics.unlearning import model_utility
from lorry.evaluate.unlearning import measures
from lorry.evaluate.unlearning.measures import (
    ATTACK_SCORES,
    measure_probability,
    measure_rouge,
    role_metric,
)
from lorry.evaluate.unlearning.rows import (
    ANSWER,
    PARAPHRASED,
    WRONG,
    SuiteSet,
    load_tofu_sets,
)
from lorry.evaluate.unlearning.suite import (
    MetricRecord,
    Suite,
    SuiteInputs,
    SuiteMetric,
    SuiteRequest,
)

UTILITY_PARTS = tuple(
    f"{role}_{part}"
    for role in ("retain", "ra", "wf")
    for part in (
        # real authors and world facts are multiple choice, so p is a share among the choices
        "Q_A_Prob" if role == "retain" else "Q_A_Prob_normalised",
        "Q_A_ROUGE",
        "Truth_Ratio",
    )
)


def measure_utility(inputs: SuiteInputs) -> MetricRecord:
    """The harmonic mean of nine, and the nine."""
    parts = {name: inputs.records[name]["agg_value"] for name in UTILITY_PARTS}
    return {"agg_value": model_utility(list(parts.values())), "parts": parts}


def _role_metrics(role: str) -> dict[str, SuiteMetric]:
    """Probability, ROUGE and truth ratio of one set."""
    metrics = {
        f"{role}_Q_A_Prob": role_metric(measure_probability, role, ANSWER),
        f"{role}_Q_A_PERT_Prob": role_metric(measure_probability, role, WRONG),
        f"{role}_Q_A_ROUGE": role_metric(measure_rouge, role, ANSWER, generates=True),
    }
    right = f"{role}_Q_A_Prob"
    # only these two have paraphrases; of the others the right answer itself stands against the wrong
    if role in ("forget", "retain"):
        right = f"{role}_Q_A_PARA_Prob"
        metrics[right] = role_metric(measure_probability, role, PARAPHRASED)
    parents = (right, f"{role}_Q_A_PERT_Prob")
    # forgotten is a model that favours neither; of what is kept, one that favours the truth
    form = "closer_to_1_better" if role == "forget" else "true_better"
    # so spelt in open-unlearning's result files, which are read by these names
    name = "forget_truth_ratio" if role == "forget" else f"{role}_Truth_Ratio"
    metrics[name] = SuiteMetric(
        partial(measures.measure_truth_ratio, form=form, right=parents[0], wrong=parents[1]),
        parents,
    )
    if role in ("ra", "wf"):
        metrics[f"{role}_Q_A_Prob_normalised"] = SuiteMetric(
            partial(measures.measure_normalised_probability, right=parents[0], wrong=parents[1]),
            parents,
        )
    return metrics


FORGET_ANSWERS = {"forget": (ANSWER,)}

TOFU_METRICS: dict[str, SuiteMetric] = {
    "forget_quality": SuiteMetric(
        measures.measure_forget_quality, ("forget_truth_ratio",), needs_logs=True, reads_logs=True
    ),
    **{
        name: metric
        for role in ("forget", "retain", "ra", "wf")
        for name, metric in _role_metrics(role).items()
    },
    "forget_Q_A_PARA_ROUGE": role_metric(measure_rouge, "forget", PARAPHRASED, generates=True),
    "forget_Q_A_PERT_ROUGE": role_metric(measure_rouge, "forget", WRONG, generates=True),
    "forget_Q_A_gibberish": SuiteMetric(
        partial(measures.measure_gibberish, role="forget"), fields={"forget": ()}, generates=True
    ),
    "model_utility": SuiteMetric(measure_utility, UTILITY_PARTS),
    "extraction_strength": SuiteMetric(measures.measure_extraction, fields=FORGET_ANSWERS),
    "exact_memorization": SuiteMetric(
        partial(measures.measure_memorization, metric=exact_memorization), fields=FORGET_ANSWERS
    ),
    **measures.attack_metrics(list(ATTACK_SCORES)),
    "mia_gradnorm": SuiteMetric(measures.measure_gradient_attack, fields=measures.ATTACKED),
}


def load_sets(roles: Mapping[str, tuple[str, ...]], request: SuiteRequest) -> dict[str, SuiteSet]:
    """As `load_tofu_sets`."""
    return load_tofu_sets(
        roles,
        local=request.local,
        forget_split=request.forget_split,
        holdout_split=request.holdout_split,
        question_key=request.question_key,
    )


TOFU_SUITE = Suite(
    name=TOFU,
    title="TOFU",
    metrics=TOFU_METRICS,
    default=(
        "forget_truth_ratio",
        "forget_quality",
        "forget_Q_A_Prob",
        "forget_Q_A_ROUGE",
        "model_utility",
        "privleak",
        "extraction_strength",
        "exact_memorization",
    ),
    load=load_sets,
    main="model_utility",
)
