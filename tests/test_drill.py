"""The short drill: a real launcher, its ranks, a rank killed, the job told to stop, the same command again. `make drill` is the long one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from distributed import run_distributed
from test_trainer import command, inputs, run  # noqa: F401

from megakd.checkpointing.native import read_latest

sys.path.insert(0, str(Path(__file__).parent / "drills"))

from job import Job, differences


def test_a_rank_is_killed_the_job_is_told_to_stop_and_goes_on_to_the_same_numbers(inputs):  # noqa: F811
    flags = {"tp": 2, "train-iters": 60, "save-interval": 5, "eval-interval": 20}
    run_distributed(run, 2, command(inputs, "whole", "sft", **flags), tp=2)
    words = command(inputs, "broken", "sft", **flags)
    job = Job(inputs / "broken", words, options=("--nproc_per_node", "2", "--max-restarts", "1")).start()
    try:
        job.wait_for(lambda: job.iteration >= 7)
        job.kill("1")
        job.wait_for(lambda: any(line.startswith("continuing") for line in job.said()))
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 0 and "Traceback" not in "".join(job.said("err"))
        saved = read_latest(job.save / "checkpoints")
        assert job.said()[-1] == f"SIGTERM: ended after iteration {saved}/60, which is saved; the same command continues {job.save}"
        assert job.start().end() == 0 and differences(job, Job(inputs / "whole", ()))[0] == 0
    finally:
        job.clean_up()
