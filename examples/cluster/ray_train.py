"""One run on the workers of a Ray cluster, started by Ray Train.

    python examples/cluster/ray_train.py --workers 16 --gpu run.yaml output_dir=/shared/runs/people

Ray Train gives each worker its rank and keeps the store by which they find each other; the worker runs
`lorry sft` beside it, in a process of its own. Every node sees the same output_dir. After a failure
Ray starts the workers again, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(settings: dict[str, Any]) -> None:
    """One worker: RANK, WORLD_SIZE, MASTER_ADDR and the like are set by Ray."""
    # the store at MASTER_PORT is Ray's own and stays
    environment = {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-m", "lorry", "sft", *settings["words"]]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="A GPU for each worker")
    parser.add_argument("--storage", help="Where Ray keeps its own records")
    parser.add_argument("words", nargs="+", help="What follows `lorry sft`")
    args = parser.parse_args()
    words = ["backend=fsdp", "resume_from_checkpoint=auto", *args.words]
    trainer = TorchTrainer(
        work,
        train_loop_config={"words": words},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(
            name="lorry",
            storage_path=args.storage,
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
