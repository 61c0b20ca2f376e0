"""Several ranks that are told to leave, hang, are killed, and are started anew by torchrun."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import Failed, on_ranks, start_ranks, train_until
from torch.distributed.checkpoint import HuggingFaceStorageReader

from attamba import exit_status
from attamba.config import ConfigError, RunConfig, to_dict
from attamba.data import Batches
from attamba.train import TrainingInterrupted, list_checkpoints, loop, read_metrics, train
from attamba.train.distributed import RankLost
from attamba.train.interrupt import StopRequest, TrainingPreempted
from attamba.train.sharded import Saver
from attamba.train.watchdog import suspects


def curve(folder: str) -> list[tuple]:
    records = read_metrics(Path(folder) / "metrics.jsonl")
    return [(r["step"], r.get("loss"), r.get("valid_loss"), r.get("grad_norm")) for r in records]


# --------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------


def told_to_leave(config: RunConfig, number: int) -> tuple[str, int, str]:
    """Rank 1 alone gets the signal, twice, in its sixth step, where it reads the next rows."""
    batch = Batches.batch

    def signalled(self: Batches, step: int):
        if os.environ["RANK"] == "1" and step // 2 == 6:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return batch(self, step)

    Batches.batch = signalled
    with pytest.raises(TrainingInterrupted) as caught:
        train(config)
    return type(caught.value).__name__, caught.value.exit_status, str(caught.value)


@pytest.fixture(scope="module")
def straight(config_in, tmp_path_factory) -> list[tuple]:
    """The curve of a run of two ranks that nobody stops."""
    config = config_in(tmp_path_factory.mktemp("straight"))
    on_ranks(2, train, config)
    return curve(config.out)


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (signal.SIGINT, "TrainingInterrupted", 130),
        (signal.SIGTERM, "TrainingPreempted", exit_status.REQUEUE),
        (signal.SIGUSR1, "TrainingPreempted", exit_status.REQUEUE),
    ],
)
def test_a_signal_to_one_rank_saves_and_ends_all(make_config, straight, number, name, status):
    config = make_config()
    for told in on_ranks(2, told_to_leave, config, number):
        assert told[:2] == (name, status)
        assert "Stopped after step 6 of 12 and saved a checkpoint" in told[2]
    assert list_checkpoints(config.out)[-1].name == "step-00000006"
    on_ranks(2, train, config)
    assert curve(config.out) == straight


def test_a_signal_to_a_process_alone(make_config):
    def preempt(record: dict) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    config = make_config()
    with pytest.raises(TrainingPreempted, match="Stopped after step 3"):
        train(config, on_log=preempt)
    assert list_checkpoints(config.out)[-1].name == "step-00000003"


def test_the_two_signals_of_a_scheduler_to_a_process_alone(make_config):
    def preempt(record: dict) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config()
    with pytest.raises(TrainingPreempted, match="Stopped after step 3"):
        train(config, on_log=preempt)
    assert list_checkpoints(config.out)[-1].name == "step-00000003"


def told_to_leave_while_resuming(config: RunConfig) -> tuple[str, str]:
    """Rank 1 alone gets the signal, where it reads its part of the checkpoint."""
    read_data = HuggingFaceStorageReader.read_data

    def signalled(self: HuggingFaceStorageReader, *args):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return read_data(self, *args)

    HuggingFaceStorageReader.read_data = signalled
    with pytest.raises(TrainingInterrupted) as caught:
        train(config)
    return type(caught.value).__name__, str(caught.value)


def test_a_signal_while_a_checkpoint_is_read(make_config):
    config = make_config()
    on_ranks(2, train_until, config, 5)
    for name, text in on_ranks(2, told_to_leave_while_resuming, config):
        assert name == "TrainingPreempted" and "while no step was under way" in text
    on_ranks(2, train, config)


def test_a_signal_before_the_first_step_to_a_process_alone(make_config, monkeypatch):
    def preparing(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(loop, "open_sources", preparing)
    with pytest.raises(
        TrainingPreempted, match="SIGTERM while no step was under way; the same com"
    ):
        train(make_config())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_changes_nothing_for_the_patient():
    with StopRequest(patient=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.preempted
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --------------------------------------------------------------------------------------------
# Hanging
# --------------------------------------------------------------------------------------------


def tell_in_a_file(config: RunConfig) -> None:
    """This rank's standard error goes into a file, see hung_run."""
    os.dup2(os.open(f"{config.out}.err{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)


@contextmanager
def hung_run(work: Callable[..., None], config: RunConfig, *args: Any) -> Iterator[tuple[str, Any]]:
    """What rank 0 of two said of a run that hangs and ends for it, and the ranks' processes."""
    processes, _ = start_ranks(2, work, config, *args)
    try:
        processes[0].join(30)
        assert processes[0].exitcode == exit_status.HANG
        yield Path(f"{config.out}.err0").read_text(), processes
    finally:
        for process in processes:
            process.kill()


def hang(config: RunConfig, how: str) -> None:
    """Rank 1 never comes to the end of reading its fourth rows."""
    tell_in_a_file(config)
    batch = Batches.batch

    def slow(self: Batches, step: int):
        if os.environ["RANK"] == "1" and step // 2 == 3:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        return batch(self, step)

    Batches.batch = slow
    train(config)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("asleep", "rank 1 does not go on, at reading the rows of step 4"),
        ("stopped", "rank 1 does not answer"),
    ],
)
def test_a_rank_that_hangs_is_named(make_config, how, text):
    config = make_config({"parallel.hang_timeout": 2.0})
    with hung_run(hang, config, how) as (said, processes):
        assert "nothing has moved for 2 seconds (parallel.hang_timeout)" in said
        assert text in said, said
        if how == "asleep":
            processes[1].join(30)
            assert processes[1].exitcode == exit_status.HANG


def prepare_slowly(config: RunConfig, seconds: float, stopped: bool) -> None:
    """Rank 0 takes so long to prepare texts; rank 1 waits for it, or is stopped meanwhile."""
    tell_in_a_file(config)
    open_sources = loop.open_sources

    def slow(*args, **kwargs):
        if os.environ["RANK"] == "0":
            time.sleep(seconds)
        return open_sources(*args, **kwargs)

    loop.open_sources = slow
    if stopped and os.environ["RANK"] == "1":
        threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    train(config)


def test_a_rank_that_is_gone_before_the_first_step_is_named(make_config):
    config = make_config({"parallel.hang_timeout": 2.0})
    with hung_run(prepare_slowly, config, 60.0, True) as (said, _):
        assert "rank 1 does not answer" in said


def test_ranks_may_wait_for_texts_longer_than_a_step_may_take(make_config):
    config = make_config({"parallel.hang_timeout": 1.0})
    on_ranks(2, prepare_slowly, config, 3.0, False)
    assert list_checkpoints(config.out)[-1].name == "step-00000012"


def write_slowly(config: RunConfig, blocks: int, told: bool) -> None:
    """Each rank hashes a block in half a second of what it writes after step 2, then no more.

    told: rank 1 gets a signal that is to save and leave, in its third step.
    """
    tell_in_a_file(config)
    hash_files, batch = Saver._hash, Batches.batch

    def slow(self: Saver, aside: Path):
        for _ in range(blocks):
            self._hashed_block()
            time.sleep(0.5)
        if blocks == 1:
            time.sleep(60)
        return hash_files(self, aside)

    def signalled(self: Batches, step: int):
        if told and os.environ["RANK"] == "1" and step // 2 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    Saver._hash, Batches.batch = slow, signalled
    try:
        train(config)
    except TrainingPreempted as left:
        assert told and "saved a checkpoint" in str(left)


@pytest.mark.parametrize("told", [False, True])
def test_a_checkpoint_may_take_longer_to_write_than_a_step_may(make_config, told):
    change = {"train.steps": 4, "train.save_every": 2, "parallel.hang_timeout": 2.0}
    config = make_config(change)
    on_ranks(2, write_slowly, config, 6, told)
    assert list_checkpoints(config.out)[-1].name == f"step-0000000{3 if told else 4}"


def test_a_checkpoint_whose_writing_does_not_go_on_ends_the_run(make_config):
    change = {"train.steps": 4, "train.save_every": 2, "parallel.hang_timeout": 1.0}
    config = make_config(change)
    with hung_run(write_slowly, config, 1, False) as (said, _):
        assert "all ranks wait at saving" in said


def test_who_is_suspected():
    now = 100.0
    moving = {0: ("9 40 0 step 5", 99.0), 1: ("9 38 7 step 5", 99.5), 2: ("9 40 0 step 5", 99.9)}
    assert suspects(moving, now, 10) == "rank 1 does not go on, at step 5"
    silent = moving | {2: ("4 41 0 step 5", 50.0)}
    assert suspects(silent, now, 10).startswith("rank 2 does not answer")
    same = dict.fromkeys(range(3), ("9 40 0 step 5", 99.0))
    assert suspects(same, now, 10) == "all ranks wait at step 5"
    assert suspects(same | {1: ("", 99.0)}, now, 10) == "rank 1 never began"
    behind = same | {0: ("9 3 0 start", 99.0), 1: ("9 3 0 start", 99.0)}
    assert suspects(behind, now, 10) == "ranks 0, 1 do not go on, at start"


def alone_in_the_end(config: RunConfig) -> None:
    """Rank 1 ends where it reads its fourth rows; rank 0 writes down what that is to it."""
    batch = Batches.batch

    def gone(self: Batches, step: int):
        if os.environ["RANK"] == "1" and step // 2 == 3:
            os._exit(5)
        return batch(self, step)

    Batches.batch = gone
    with pytest.raises(RankLost) as caught:
        train(config)
    assert caught.value.may_pass
    Path(f"{config.out}.told").write_text(str(caught.value))


def test_a_rank_that_is_left_says_so_in_a_line(make_config):
    config = make_config()
    processes, _ = start_ranks(2, alone_in_the_end, config)
    try:
        processes[0].join(60)
        told = Path(f"{config.out}.told").read_text()
        assert told.startswith("another rank is gone, which has said why unless it was killed (")
        assert "by peer" in told
        assert told.count("\n") == 0 and config.out in told
    finally:
        for process in processes:
            process.kill()


# --------------------------------------------------------------------------------------------
# kill -9
# --------------------------------------------------------------------------------------------


def steps_done(folder: str) -> int:
    path = Path(folder) / "metrics.jsonl"
    return max((r["step"] for r in read_metrics(path)), default=0) if path.exists() else 0


@pytest.mark.parametrize(("n_ranks", "times"), [(2, 14), (4, 6)])
def test_a_rank_killed_at_any_moment_loses_no_more_than_since_the_last_checkpoint(
    make_config, n_ranks, times
):
    """20 times in all; up to three steps further than before, and a moment more; or at starting.

    Those that have met end by themselves; those that have not wait for the one that is gone, and
    are killed, as torchrun does.
    """
    change = {"train.steps": 7 * times + 10, "train.save_every": 2, "train.eval_every": 10}
    config = make_config(change, out="killed")
    straight = make_config(change | {"train.save_every": 0}, out="straight")
    on_ranks(n_ranks, train, straight, timeout=120)
    wanted = curve(straight.out)
    draw = random.Random(0)
    for _ in range(times):
        ahead = draw.randint(0, 3)
        until = steps_done(config.out) + ahead
        processes, _ = start_ranks(n_ranks, train, config)
        while steps_done(config.out) < until and all(p.is_alive() for p in processes):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05 if ahead else 0.5))
        killed = processes[draw.randrange(n_ranks)]
        assert killed.is_alive()
        killed.kill()
        for process in processes:
            if not ahead:
                process.kill()
            process.join(90)
            assert not process.is_alive()
        saved = [0, *(int(path.name[-8:]) for path in list_checkpoints(config.out))]
        # One may be half written, the one before is then whole; before step 4 none need be.
        assert steps_done(config.out) - saved[-1] <= 4
        # What was lost the last time was repeated, so that it all stands as if nothing had been.
        if steps_done(config.out):
            assert curve(config.out) == wanted[: len(curve(config.out))]
    on_ranks(n_ranks, train, config, timeout=120)
    assert curve(config.out) == wanted


def test_a_second_job_in_the_folder_is_refused_while_the_first_goes_on(make_config):
    config = make_config({"train.steps": 10_000, "train.eval_every": 0})
    processes, _ = start_ranks(2, train, config)
    try:
        while steps_done(config.out) < 2 and all(p.is_alive() for p in processes):
            time.sleep(0.01)
        with pytest.raises(Failed, match="another process is training in this folder"):
            on_ranks(2, train, config)
        with pytest.raises(ConfigError, match="another process is training in this folder"):
            train(config)
        before = steps_done(config.out)
        while steps_done(config.out) < before + 2 and all(p.is_alive() for p in processes):
            time.sleep(0.01)
        assert all(process.is_alive() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.join(30)


# --------------------------------------------------------------------------------------------
# torchrun
# --------------------------------------------------------------------------------------------


def torchrun(config: RunConfig, *options: str, **environment: str) -> subprocess.Popen:
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *options, "-m", "attamba.cli", "train", str(path)]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_starts_anew_from_the_last_checkpoint(make_config):
    """A rank is killed; torchrun ends the others and starts all again."""
    change = {"train.steps": 30, "train.save_every": 2, "train.eval_every": 0}
    config = make_config(change)
    config.train = dataclasses.replace(config.train, progress=True)
    running = torchrun(config, "--max-restarts", "1", "--monitor-interval", "0.1")
    try:
        while steps_done(config.out) < 6 and running.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, err
    assert out.count("Going on from") == 1, out
    assert out.count("30 steps are done") == 1, out
    steps = [step for step, loss, *_ in curve(config.out) if loss is not None]
    assert steps == list(range(1, 31))


def test_torchrun_passes_sigterm_on_and_waits(make_config):
    config = make_config({"train.steps": 10_000, "train.save_every": 0, "train.eval_every": 0})
    running = torchrun(config)
    try:
        while steps_done(config.out) < 2 and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode != 0
    assert err.count("attamba: Stopped after step") == 1, err  # rank 0 alone tells
    (saved,) = list_checkpoints(config.out)
    assert int(saved.name[-8:]) >= 2
