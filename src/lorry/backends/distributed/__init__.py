"""One run on several processes: how they speak, how a step's rows are dealt, backends, workers."""
