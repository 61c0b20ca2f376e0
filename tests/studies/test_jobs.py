"""Runs of a study at the same time."""

import multiprocessing
import threading

import pytest
import torch

from attamba.studies import jobs
from attamba.studies.engine import Outcome
from attamba.studies.jobs import run_all


def test_several_at_a_time(make_study, place):
    study = make_study(seeds=[0])
    outcomes = run_all(study.runs("full"), place, jobs=2, say=lambda text: None)
    assert {o.name: o.status for o in outcomes} == {"chunks-s0": "done", "full-s0": "done"}


def test_jobs_take_the_gpus_in_turn(monkeypatch):
    taken, threads = [], torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    begun = multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(3):
        jobs._settle(3, begun, None)
    torch.set_num_threads(threads)
    assert taken == [0, 1, 0]


def test_after_ctrl_c_no_job_begins_another_run(make_study, place, monkeypatch):
    run = make_study().runs("full")[0]

    def interrupted(run, place):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_leaving", threading.Event())
    monkeypatch.setattr(jobs, "work_on", lambda run, place: Outcome(run, "done"))
    assert jobs._work_or_leave(run, place).status == "done"
    monkeypatch.setattr(jobs, "work_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs._work_or_leave(run, place)
    assert jobs._work_or_leave(run, place).status == "waiting"
