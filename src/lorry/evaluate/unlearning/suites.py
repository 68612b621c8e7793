"""Every suite by its name: what `lorry eval suite=NAME` knows."""

from __future__ import annotations

from lorry.evaluate.unlearning.muse import MUSE_SUITE
from lorry.evaluate.unlearning.suite import Suite
from lorry.evaluate.unlearning.tofu import TOFU_SUITE
from lorry.evaluate.unlearning.wmdp import WMDP_SUITE

SUITES: dict[str, Suite] = {suite.name: suite for suite in (TOFU_SUITE, MUSE_SUITE, WMDP_SUITE)}
