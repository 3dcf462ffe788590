"""SLURM's requeueing: a job whose time is nearly up saves a checkpoint, returns to the queue, and resumes from it.

``#SBATCH --signal=USR1@300`` sends each rank SIGUSR1 300 seconds before the end. Like any signal, it ends the run after
its step with ``checkpoints/last.ckpt`` saved (:mod:`halos_pl.common.stopping`); then rank 0 requeues it. Lightning's
own handler would write a second kind of checkpoint, in the middle of a step.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from halos_pl.common.files import write
from halos_pl.run_dir import LAST, PREVIOUS

#: The job whose fit wrote the folder's checkpoints.
JOB = ".slurm_job"


def _job() -> str | None:
    """The id of this job, which it keeps when it is requeued; None outside SLURM."""
    return os.environ.get("SLURM_JOB_ID")


def note_job(folder: Path) -> None:
    """Writes the job's id into the folder of its run."""
    if job := _job():
        write(folder / JOB, job)
    else:
        (folder / JOB).unlink(missing_ok=True)


def is_requeued(folder: Path) -> bool:
    """Whether SLURM has restarted this job after its fit had written a checkpoint to the folder."""
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) < 1 or not any((folder / c).exists() for c in (LAST, PREVIOUS)):
        return False
    path = folder / JOB
    return path.is_file() and path.read_text(encoding="utf-8") == _job()


def requeue(trainer: Trainer, signum: int | None) -> None:
    """Returns the job to the queue if the signal that stopped the run asks for it; once its checkpoint is saved."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue or not trainer.is_global_zero:
        return
    if signum != (environment.requeue_signal or signal.SIGUSR1):
        return
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), _job()
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", str(job)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())
        rank_zero_warn(f"halos: job {job} was not requeued ({reason}); run it again to resume: {' '.join(command)}")
    else:
        rank_zero_info(f"halos: job {job} is back in the queue and will resume from {LAST}")
