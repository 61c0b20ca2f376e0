"""attamba launch where it runs: torchrun started again, and the agent that passes signals on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import needs_proc, wait_for

from attamba.launch.job import meeting

ROOT = Path(__file__).parent.parent


ENDS = """
import os, pathlib, signal, sys
starts = pathlib.Path("starts")
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
ends = [int(word) for word in sys.argv[1].split(",")]
end = ends[min(len(starts.read_text()), len(ends)) - 1]
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""
STARTS_AGAIN = """
import sys
from attamba.launch import job
job.torchrun = lambda gpus, train: [sys.executable, *train]
sys.exit(job.run_here(1, sys.argv[1:], restarts=2))
"""


def _here(folder: Path, script: str, *words: str) -> subprocess.Popen[str]:
    """run_here with two restarts, of a script that stands for torchrun."""
    (folder / "stand_in.py").write_text(script)
    command = [sys.executable, "-c", STARTS_AGAIN, "stand_in.py", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("ends", "starts", "status"),
    [("1,0", 2, 0), ("76,1,0", 3, 0), ("1", 3, 1), ("-9", 3, 137), ("2", 1, 2), ("1,75", 2, 75)],
)
def test_restarts_on_this_machine(ends: str, starts: int, status: int, tmp_path: Path) -> None:
    here = _here(tmp_path, ENDS, ends)
    _, told = here.communicate(timeout=60)
    assert here.returncode == status
    assert len((tmp_path / "starts").read_text()) == starts
    assert told.count("training left with") == starts - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("status", [75, 1])
def test_what_is_told_to_stop_is_not_restarted(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    """Also where it fails while it stops."""
    here = _here(tmp_path, SAVES.replace("sys.exit(75)", f"sys.exit({status})"))
    wait_for(lambda: (tmp_path / "ready-0").exists())
    here.send_signal(number)
    here.communicate(timeout=60)
    assert here.returncode == status
    assert (tmp_path / "saved-0").read_text() == number.name


def _agent(
    folder: Path, module: str, ranks: int = 2, met: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    """torchrun on a module of two lines or so, which every rank runs."""
    (folder / "ranks.py").write_text(module)
    command = [sys.executable, "-m", "attamba.launch.agent", *met]
    command += [f"--nproc-per-node={ranks}", "-m", "ranks"]
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("ranks_leave_with", "status"), [(75, 75), (2, 2), (1, 1)])
def test_the_agent_leaves_as_its_ranks_do(
    ranks_leave_with: int, status: int, tmp_path: Path
) -> None:
    agent = _agent(tmp_path, f"import sys\nsys.exit({ranks_leave_with})\n")
    _, told = agent.communicate(timeout=120)
    assert agent.returncode == status
    assert ("Root Cause" in told) == (status == 1)


SAVES = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    open(f"saved-{os.environ.get('RANK', 0)}", "w").write(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
open(f"ready-{os.environ.get('RANK', 0)}", "w").close()
time.sleep(100)
"""


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_agent_passes_signals_on_and_waits(number: signal.Signals, tmp_path: Path) -> None:
    agent = _agent(tmp_path, SAVES)
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    agent.send_signal(number)
    agent.communicate(timeout=120)
    assert agent.returncode == 75
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


SLEEPS = """
import os, time
open(f"ready-{os.environ['RANK']}", "w").close()
time.sleep(100)
"""
PREPARES = """
import os, time
from attamba.cli import main
from attamba.train import loop

def preparing(*args, **kwargs):
    for rank in (0, 1):
        open(f"ready-{rank}", "w").close()
    time.sleep(100)

loop.open_sources = preparing
raise SystemExit(main(["train", os.environ["CONFIG"], "data.train=text.txt", "out=run"]))
"""


@needs_proc
@pytest.mark.parametrize("module", [SLEEPS, PREPARES], ids=["importing", "preparing"])
def test_ranks_that_are_told_to_leave_before_the_first_step(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they do not heed signals yet, and where one works and the other waits for it."""
    monkeypatch.setenv("CONFIG", str(ROOT / "configs" / "tiny.yaml"))
    agent = _agent(tmp_path, module)
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    agent.send_signal(signal.SIGTERM)
    _, told = agent.communicate(timeout=60)
    assert agent.returncode == 75, told
    assert "Traceback" not in told
    assert told.count("while no step was under way") == (module is PREPARES)


@needs_proc
def test_the_agent_is_told_to_leave_before_it_has_ranks(tmp_path: Path) -> None:
    agent = _agent(tmp_path, SLEEPS)
    wait_for(lambda: _heeds(agent.pid, signal.SIGUSR1))
    agent.send_signal(signal.SIGUSR1)
    _, told = agent.communicate(timeout=60)
    assert agent.returncode == 75, told
    assert not list(tmp_path.glob("ready-*"))


LEAVES = """
import os, signal, sys, time
host = os.getppid() == int(open("host").read())
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(75) if host else None)
open(f"ready-{os.environ['RANK']}", "w").close()
time.sleep(100)
"""


@needs_proc
@pytest.mark.parametrize(("told", "status"), [(2, 75), (1, 1)])
def test_the_machine_where_all_meet_leaves_first(told: int, status: int, tmp_path: Path) -> None:
    """The other leaves for a requeue if it was told to stop as well; else it fails, in one line."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = []
    for node, host in ((0, "true"), (1, "false")):
        met = [*meeting(2, node, "localhost", port, "7"), f"--rdzv-conf=is_host={host}"]
        agents.append(_agent(tmp_path, LEAVES, ranks=1, met=met))
        (tmp_path / "host").write_text(str(agents[0].pid))
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    for agent in agents[:told]:
        agent.send_signal(signal.SIGUSR1)
    said = [agent.communicate(timeout=60)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [75, status], said
    assert not any("Traceback" in text for text in said)
    assert said[1].count("machines of this job did not meet, or lost each other") == (told == 1)


def _heeds(process: int, number: signal.Signals) -> bool:
    """Has the process a handler for the signal?"""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
