"""Submitting a run as a Slurm job through submitit: one process for each GPU.

The job takes itself up again: near its time limit Slurm sends a signal, the run saves and stops,
and the job goes back into the queue to resume.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from greenmim.guards import UserError, exit_code, first_line
from greenmim.launch import SlurmJob
from greenmim.recipe import RunRecipe
from greenmim.training.run_folder import RunFolder
from greenmim.training.train import train

# What submitit has Slurm send this long before the end; see `StopSignal`.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
_WARNING_SECONDS = 180


class Piece:
    """One job's part of a run, as submitit pickles it and calls it in every process."""

    def __init__(
        self,
        recipe: RunRecipe,
        resume: str | None,
        max_steps: int | None = None,
        profile: bool = False,
    ) -> None:
        self.recipe, self.resume = recipe, resume
        self.max_steps, self.profile = max_steps, profile

    def __call__(self) -> int:
        """Ends the process where the run did not go well: only so does Slurm see it."""
        if code := exit_code(self._run):
            sys.exit(code)
        return 0

    def _run(self) -> int:
        result = train(self.recipe, self.where_to_resume(), self.max_steps, self.profile)
        if result.signal not in _WARNINGS:
            return result.exit_code
        if os.environ.get("SLURM_PROCID") == "0":
            job = os.environ["SLURM_JOB_ID"]
            if subprocess.run(["scontrol", "requeue", job]).returncode:
                raise UserError(
                    f"The run is saved, but Slurm does not requeue job {job}: submit it again with"
                    " --resume."
                )
        return 0

    def where_to_resume(self) -> str:
        """From the run's own checkpoints, once it has some; before, from where it was told to."""
        folder = RunFolder(self.recipe.folder)
        if self.resume is None or not folder.by_step():
            return self.resume or "auto"
        # An older one of its own: what is later is set aside by the first piece.
        first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        return self.resume if first and folder.owns(Path(self.resume)) else "auto"

    def checkpoint(self) -> object:
        """Called by submitit when the signal comes before the run listens: just again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    recipe: RunRecipe,
    resume: str | None,
    job: SlurmJob,
    max_steps: int | None = None,
    profile: bool = False,
) -> tuple[str, Path]:
    """Submit a run whose input `dry_run` has checked; the job's number and its logs' folder.

    `work_dir` and `data.root` have to be the same on the nodes. UserError where Slurm is not here
    or refuses the job.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "--launcher slurm: there is no sbatch and srun here; run it on the cluster's login"
            " node, or leave --launcher out."
        )
    import submitit

    folder = recipe.folder / "slurm"
    wanted = {
        "slurm_partition": job.partition,
        "slurm_account": job.account,
        "slurm_qos": job.qos,
        "gpus_per_node": None if recipe.device == "cpu" else job.gpus_per_node,
    }
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    executor.update_parameters(
        name=recipe.folder.name,
        nodes=job.nodes,
        tasks_per_node=job.gpus_per_node,
        cpus_per_task=job.cpus_per_gpu,
        timeout_min=max(round(60 * job.hours), 1),
        slurm_signal_delay_s=_WARNING_SECONDS,
        slurm_additional_parameters={"requeue": True, "open-mode": "append", **job.sbatch},
        slurm_srun_args=["--kill-on-bad-exit=1"],
        **{name: value for name, value in wanted.items() if value is not None},
    )
    try:
        submitted = executor.submit(Piece(recipe, resume, max_steps, profile))
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as error:
        raise UserError(f"Slurm refuses the job: {first_line(error)}") from error
    return submitted.job_id, folder
