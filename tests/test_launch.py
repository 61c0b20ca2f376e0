"""attamba launch: the script and command that it makes, and a job from queue to requeue.

SLURM's commands are stood in for by small scripts on the path.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import needs_proc, wait_for

from attamba import cli
from attamba.launch.job import Job, TrainingFailed, meeting, torchrun

pytest.importorskip("submitit")

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs/tiny.yaml")
KEYS = ["data.train=books.txt", "data.batch_size=32"]
RUN = ["launch", TINY, *KEYS]


def test_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--nodes", "2", "--gpus", "8", "--time", "1-12:00:00", "--partition", "gpu"]
    asked += ["--account", "lab", "--qos", "high", "--constraint", "h100", "--cpus", "96"]
    asked += ["--mem", "512G", "--grace", "120", "--setup", "module load cuda"]
    assert cli.main([*RUN, f"out={tmp_path}/big", *asked, "--dry-run"]) == 0
    script = capsys.readouterr().out
    for flag in (
        "nodes=2",
        "gpus-per-node=8",
        "ntasks-per-node=1",
        "time=1-12:00:00",
        "partition=gpu",
        "account=lab",
        "qos=high",
        "constraint=h100",
        "cpus-per-task=96",
        "mem=512G",
        "signal=USR1@120",
        "requeue",
        "job-name=attamba-big",
        f"output={tmp_path}/big/slurm/%j_0_log.out",
    ):
        assert f"\n#SBATCH --{flag}\n" in script
    assert "\nmodule load cuda\n" in script
    assert f"submitit.core._submit {tmp_path}/big/slurm\n" in script
    (command,) = [line for line in script.splitlines() if "attamba.launch.agent" in line]
    assert "--nnodes=2 --node-rank=$SLURM_NODEID --rdzv-backend=c10d" in command
    assert command.endswith(
        f"--nproc-per-node=8 -m attamba train {TINY} {' '.join(KEYS)} out={tmp_path}/big"
    )
    assert not (tmp_path / "big").exists()


def test_the_command_that_is_shown_keeps_words_together() -> None:
    train = ["my run.yaml", "out=runs/a b", "data.train=$HOME/*.txt"]
    shown = Job(nodes=2, gpus=8, train=train).shown()
    assert shlex.split(shown)[-3:] == train
    assert shown.endswith(" train 'my run.yaml' 'out=runs/a b' 'data.train=$HOME/*.txt'")
    assert " --node-rank=$SLURM_NODEID " in shown and " --rdzv-id=$SLURM_JOB_ID " in shown


def test_what_is_not_asked_for_is_left_to_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, "--gpus", "2", "--dry-run", "--folder", "logs"]) == 0
    script = capsys.readouterr().out
    assert f"output={Path.cwd()}/logs/%j_0_log.out" in script
    for name in ("time", "partition", "mem", "account", "wckey", "cpus-per-task"):
        assert f"--{name}" not in script


def test_the_command_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, "--gpus", "4", "--local", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words == torchrun(4, [TINY, *KEYS])
    assert words[:4] == [sys.executable, "-m", "attamba.launch.agent", "--standalone"]
    assert words[4:] == ["--nproc-per-node=4", "-m", "attamba", "train", TINY, *KEYS]


def test_torchrun_understands_both_commands() -> None:
    from torch.distributed.run import parse_args

    met = meeting(3, 2, "node-a", 20_007, "7")
    for command, nodes in ((torchrun(4, ["x.yaml"]), "1:1"), (torchrun(4, ["x.yaml"], met), "3")):
        args = parse_args(command[3:])
        assert (args.nnodes, args.nproc_per_node, args.module) == (nodes, "4", True)
        assert [args.training_script, *args.training_script_args] == ["attamba", "train", "x.yaml"]
    assert (args.node_rank, args.rdzv_endpoint, args.rdzv_id) == (2, "node-a:20007", "7")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--gpus", "1", "--nodes", "-1"], "--nodes=-1 must be at least 1"),
        (["--gpus", "5"], "data.batch_size=32 cannot be divided among 5 ranks"),
        (["--gpus", "4", "parallel.replicate=3"], "parallel.replicate=3"),
        (["--gpus", "4", "--time", "tomorrow"], "--time=tomorrow is no limit"),
        (["--gpus", "4", "--mem", "lots"], "--mem=lots is no size"),
        (["--gpus", "4", "--local", "--nodes", "2"], "--nodes=2 with --local"),
        (["--gpus", "4", "--local", "--qos", "x"], "--qos is for SLURM and has no effect"),
        (["--gpus", "4", "--restarts", "-1"], "--restarts=-1 must be at least 0"),
        (["--gpus", "4", "mixer.boundary=cyclik"], "boundary='cyclik' is not a policy"),
        (["--gpus", "4", "data.train="], "data.train is not set"),
        (["--gpus", "4", "optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, *options]) == 2
    assert message in capsys.readouterr().err


def test_no_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main([*RUN, "--gpus", "4"]) == 2
    assert "there is no sbatch and srun here" in capsys.readouterr().err


def test_no_submitit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([*RUN, "--gpus", "4", "--dry-run"]) == 2
    assert "pip install 'attamba[slurm]'" in capsys.readouterr().err
    assert cli.main([*RUN, "--gpus", "4", "--dry-run", "--local"]) == 0


SBATCH = """#!/bin/sh
# The script's first run, in the background, as job 41 on one machine.
echo "Submitted batch job 41"
mkdir -p {folder}
SLURM_JOB_ID=41 SLURM_JOBID=41 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 \
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=localhost \
    setsid sh "$1" > {folder}/batch.log 2>&1 < /dev/null &
echo $! > {folder}/batch.pid
"""
SRUN = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        --unbuffered|--kill-on-bad-exit=1|--wait=0) shift ;;
        --output) log=$(echo "$2" | sed "s/%j/41/; s/%t/0/"); shift 2 ;;
        *) exec "$@" > "$log" 2>&1 ;;
    esac
done
"""
SCONTROL = """#!/bin/sh
echo "$@" > {folder}/scontrol
"""


@needs_proc
def test_a_job_saves_and_goes_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks train; the time limit nears; they save, and the job is queued again."""
    bin_folder, state, out = tmp_path / "bin", tmp_path / "state", tmp_path / "run"
    bin_folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text.replace("{folder}", str(state)))
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king who had a cat.\n" * 200)
    small = ["model.dim=32", "model.n_layers=1", "mixer.ssm_heads=2", "data.batch_size=2"]
    small += ["data.seq_len=32", "train.device=cpu", "train.progress=false", "train.log_every=1"]
    small += ["train.steps=1000000", "train.eval_every=0", "train.save_every=0"]
    config = [TINY, f"data.train={text}", f"out={out}", *small]
    assert cli.main(["launch", *config, "--gpus", "2"]) == 0
    told = capsys.readouterr().out
    assert "job 41 is in the queue" in told
    batch = int((state / "batch.pid").read_text())
    log = out / "slurm" / "41_0_log.out"
    try:
        # A record of a step: by then all ranks listen. The file alone is there before they do.
        records = out / "metrics.jsonl"
        wait_for(lambda: records.exists() and records.stat().st_size > 0)
        # SLURM signals every process; those of the ranks' own sessions hear it from the agent.
        os.killpg(batch, signal.SIGUSR1)
        wait_for(lambda: (state / "scontrol").exists())
    finally:
        print(log.read_text() if log.exists() else "no log")
        _end(batch)
    assert (state / "scontrol").read_text() == "requeue 41\n"
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name.startswith("step-")


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGTERM)
    except ProcessLookupError:
        return


@pytest.mark.parametrize(
    ("node", "status", "ran"),
    [(0, 0, []), (0, 75, [["scontrol", "requeue", "70041"]]), (1, 75, [])],
)
def test_one_machine_queues_the_job_again(
    node: int, status: int, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _on_a_machine(node, status, monkeypatch)
    assert Job(nodes=2, gpus=4, train=["x.yaml"])() == status
    met = meeting(2, node, "gpu07", 20_041, "70041")
    assert commands == [torchrun(4, ["x.yaml"], met), *ran]


def test_a_job_that_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _on_a_machine(0, 2, monkeypatch)
    with pytest.raises(TrainingFailed, match=r"`attamba train x\.yaml out=y` left with 2"):
        Job(nodes=2, gpus=4, train=["x.yaml", "out=y"])()
    assert len(commands) == 1


def test_a_job_that_failed_may_be_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each time that it ran, whichever machines fail, and as often as was asked."""
    again = ["scontrol", "requeue", "70041"]
    job = Job(nodes=2, gpus=4, train=["x.yaml"], restarts=2, folder=tmp_path)
    for begun, node in (("0", 1), ("3", 0)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", begun)
        commands = _on_a_machine(node, 1, monkeypatch)
        assert job() == 1 and commands[1:] == [again]
        commands = _on_a_machine(1 - node, 1, monkeypatch)
        assert job() == 1 and again not in commands
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    for node in (0, 1):
        commands = _on_a_machine(node, 1, monkeypatch)
        with pytest.raises(TrainingFailed):
            job()
        assert again not in commands


FAILS = """
import os, subprocess, sys, time
from pathlib import Path
from attamba.launch.job import Job

def run(command, **options):
    node, folder = os.environ["SLURM_NODEID"], Path(sys.argv[1])
    if "train" not in command:
        (folder / f"asked-{node}").touch()
        return subprocess.CompletedProcess(command, 0)
    (folder / f"trained-{node}").touch()
    while len(list(folder.glob("trained-*"))) < 2:
        time.sleep(0.001)
    return subprocess.CompletedProcess(command, 1)

job = Job(nodes=2, gpus=4, train=["x.yaml"], restarts=1, folder=Path(sys.argv[1]) / "slurm")
subprocess.run = run
sys.exit(0 if job() == 1 else 5)
"""


def test_machines_that_fail_at_once_ask_once_and_none_fails(tmp_path: Path) -> None:
    """srun would kill the one that asks; another that fails after the last restart it may."""
    (tmp_path / "slurm").mkdir()
    for begun, asked, status in (("0", 1, 0), ("1", 0, 1)):
        machines = []
        for node in ("0", "1"):
            env = os.environ | _machine(node) | {"SLURM_RESTART_COUNT": begun}
            command = [sys.executable, "-c", FAILS, str(tmp_path)]
            machines.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        told = [machine.communicate(timeout=60)[1] for machine in machines]
        assert [machine.returncode for machine in machines] == [status] * 2, told
        assert len(list(tmp_path.glob("asked-*"))) == asked
        for file in tmp_path.glob("*-?"):
            file.unlink()


def test_a_mistake_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _on_a_machine(0, 2, monkeypatch)
    with pytest.raises(TrainingFailed):
        Job(nodes=1, gpus=1, train=["x.yaml"], restarts=5, folder=tmp_path)()
    assert len(commands) == 1 and not list(tmp_path.iterdir())


def _machine(node: str) -> dict[str, str]:
    """What SLURM and submitit set on one of the two machines of job 70041."""
    machine = {"JOB_ID": "70041", "NTASKS": "2", "JOB_NUM_NODES": "2", "NODEID": node}
    machine |= {"PROCID": node, "LOCALID": "0", "JOB_NODELIST": "gpu[07-08]"}
    named = {f"SLURM_{name}": value for name, value in machine.items()}
    return named | {"SUBMITIT_EXECUTOR": "slurm"}


def _on_a_machine(node: int, status: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Make this process one of job 70041's; training leaves with `status`. Returns what is run."""
    for name, value in _machine(str(node)).items():
        monkeypatch.setenv(name, value)
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, status if "train" in command else 0)

    monkeypatch.setattr("attamba.launch.job.subprocess.run", run)
    monkeypatch.setattr("attamba.launch.job.signal.signal", lambda number, handler: None)
    return commands
