"""Named data sets as benchmarks: questions, options, generation, and the lm-evaluation-harness."""
