"""What a job runs on each of its machines, and how it is described to SLURM."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attamba.exit_status import INTERRUPTED, MISTAKE, REQUEUE

FIRST_PORT, PORTS = 20_000, 10_000
"""Where the machines of a job meet: a port of the first one, by the job's number."""


class TrainingFailed(RuntimeError):
    """Training left with a status that no requeue will mend; its log says why."""


def torchrun(
    gpus: int, train: Sequence[str], meeting: Sequence[str] = ("--standalone",)
) -> list[str]:
    """A command that starts `gpus` ranks of `attamba train` on one machine.

    train: arguments of `attamba train`. meeting: how torchrun finds those on other machines.
    """
    agent = [sys.executable, "-m", "attamba.launch.agent"]
    return [*agent, *meeting, f"--nproc-per-node={gpus}", "-m", "attamba", "train", *train]


def meeting(nodes: int, node: int | str, host: str, port: int | str, job: str) -> list[str]:
    """Arguments of torchrun with which the machines of a job find each other."""
    return [
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={job}",
    ]


@dataclass(frozen=True)
class Job:
    """What submitit calls on every machine of a job."""

    nodes: int
    gpus: int
    """Of each machine."""
    train: list[str]
    """Arguments of `attamba train`."""
    restarts: int = 0
    """After failures of training."""
    folder: Path = Path()
    """Where failures are counted, if there may be restarts."""

    def __call__(self) -> int:
        """Train; where SLURM took the machines back, or a restart is left, put the job into its
        queue again.

        Returns the exit status, or raises TrainingFailed where the job is to end with it. One
        machine asks SLURM; on the others submitit takes what returns for success and leaves with 0,
        for srun would kill that one if they failed. It waits for all, so the job cannot end before
        SLURM has answered.
        """
        import submitit

        # SLURM sends it to every process of the job; the ranks are those that heed it.
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        env = submitit.JobEnvironment()
        port = FIRST_PORT + int(env.raw_job_id) % PORTS
        found = meeting(self.nodes, env.node, env.hostnames[0], port, env.raw_job_id)
        status = subprocess.run(torchrun(self.gpus, self.train, found)).returncode
        if status == 0:
            return status
        preempted = status == REQUEUE
        if not preempted and not self._may_restart(status, env.raw_job_id):
            raise TrainingFailed(f"`attamba train {shlex.join(self.train)}` left with {status}")
        if env.node == 0 if preempted else self._is_first(env.raw_job_id):
            subprocess.run(["scontrol", "requeue", env.raw_job_id], check=True)
        return status

    def _may_restart(self, status: int, number: str) -> bool:
        """Is a restart left after this failure?

        A file stands for each start that failed. This one's is left out: another machine may have
        made it, and all are to come to the same answer.
        """
        earlier = set(self.folder.glob(f"{number}_failed_*")) - {self._failed(number)}
        return status != MISTAKE and len(earlier) < self.restarts

    def _is_first(self, number: str) -> bool:
        """Is this the first machine on which this start failed? They fail at once, or one after
        the other."""
        try:
            self._failed(number).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _failed(self, number: str) -> Path:
        return self.folder / f"{number}_failed_{os.environ.get('SLURM_RESTART_COUNT', '0')}"

    def shown(self) -> str:
        """The command of each machine, for people: names of SLURM's variables for their values."""
        port = f"({FIRST_PORT} + $SLURM_JOB_ID % {PORTS})"
        found = meeting(self.nodes, "$SLURM_NODEID", "<first machine>", port, "$SLURM_JOB_ID")
        words = torchrun(self.gpus, self.train, found)
        return " ".join(word if word in found else shlex.quote(word) for word in words)


@dataclass(frozen=True)
class Request:
    """What SLURM is asked for. Defaults are the cluster's own, but for the grace."""

    job: Job
    folder: Path
    """Of scripts and logs; every machine must see it."""
    name: str
    grace: int = 300
    """Seconds before the time limit at which the ranks are told to save."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus: int | None = None
    """Of each machine."""
    mem: str | None = None
    """Of each machine, with its unit."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before training."""

    def parameters(self) -> dict[str, Any]:
        """As submitit's SlurmExecutor takes them; None leaves a choice to the cluster."""
        return {
            "job_name": self.name,
            "nodes": self.job.nodes,
            "ntasks_per_node": 1,
            "gpus_per_node": self.job.gpus,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "cpus_per_task": self.cpus,
            "setup": self.setup or None,
            "stderr_to_stdout": True,
            # the others would wait for a machine that failed; but however a cluster sets WaitTime,
            # none is killed because another has left with 0
            "srun_args": ["--kill-on-bad-exit=1", "--wait=0"],
            "wckey": None,
            # submitit would have its own signal sent, on which it starts a function anew
            "additional_parameters": {"signal": f"USR1@{self.grace}", "requeue": True}
            | ({"mem": self.mem} if self.mem else {}),
        }

    def script(self) -> str:
        """The batch script that submit would hand to sbatch."""
        from submitit.slurm.slurm import _make_sbatch_string

        call = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(self.folder)])
        return _make_sbatch_string(command=call, folder=self.folder, **self.parameters())

    def submit(self) -> str:
        """Put the job into SLURM's queue; returns its number."""
        import submitit

        executor = submitit.SlurmExecutor(self.folder)
        executor.update_parameters(**self.parameters())
        return executor.submit(self.job).job_id


def run_here(gpus: int, train: Sequence[str], restarts: int = 0) -> int:
    """Train on this machine; after a failure again, at most `restarts` times. Returns the exit
    status, or becomes torchrun where there are no restarts.

    Each start goes on from the last checkpoint. SIGTERM and SIGUSR1 go on to torchrun; after one,
    and where training says that it would fail again or asks to be requeued, there is no other.
    """
    command = torchrun(gpus, train)
    if restarts == 0:
        os.execv(command[0], command)
    running: list[subprocess.Popen[bytes]] = []
    told: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        told.add(number)
        if running and number != signal.SIGINT:  # which a terminal sends to all of them
            running[-1].send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    while not told:
        running.append(subprocess.Popen(command))
        if told:  # between the two, so that it was not passed on
            running[-1].terminate()
        status, begun = running[-1].wait(), len(running) - 1
        if status < 0:  # a signal ended it, perhaps before it had come to heed one
            status = REQUEUE if told - {signal.SIGINT} else 128 - status
        if told or status in (0, MISTAKE, REQUEUE, INTERRUPTED) or begun == restarts:
            return status
        print(f"training left with {status}: restart {begun + 1} of {restarts}", file=sys.stderr)
    return INTERRUPTED if signal.SIGINT in told else REQUEUE
