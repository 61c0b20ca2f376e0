"""kill -9 at random moments of training, in processes of their own."""

import json
import subprocess
import sys

import torch

from attamba.config import to_dict
from attamba.train import list_checkpoints, load, train

# One interpreter imports torch and forks each run; it does no tensor work itself before a fork.
SCRIPT = """
import json, os, random, signal, sys, time
import torch
import torch._dynamo  # which AdamW's first step would import, in each fork anew
torch.set_num_threads(1)
from attamba.config import RunConfig, from_dict
from attamba.train import list_checkpoints, read_metrics, train
from attamba.train.storage import verify

config = from_dict(RunConfig, json.loads(sys.argv[1]))
draw = random.Random(int(sys.argv[2]))

def start():
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(config)
            status = 0
        finally:
            os._exit(status)
    return child

def step_now():
    path = config.out + "/metrics.jsonl"
    records = read_metrics(path) if os.path.exists(path) else []
    return records[-1]["step"] if records else 0

kills = 0
for _ in range(6):
    # Up to three steps after the newest checkpoint, and then at any place within a step.
    until = step_now() + draw.randrange(4)
    child = start()
    while step_now() < until and os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
    kills += 1
    for checkpoint in list_checkpoints(config.out):
        verify(checkpoint)
_, status = os.waitpid(start(), 0)
print(json.dumps({"kills": kills, "status": status}))
"""


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(make_config, texts):
    change = {
        "model.n_layers": 2,
        "train.steps": 24,
        "train.save_every": 1,
        "data.train": str(texts),
    }
    straight = train(make_config(change, out="straight"))
    config = make_config(change, out="killed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(to_dict(config)), "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 3, report
    assert report["status"] == 0, done.stderr

    result = train(config)  # finished: it only reads what is there
    keep = ("kind", "step", "loss", "valid_loss", "grad_norm", "lr")
    a, b = ([{k: r.get(k) for k in keep} for r in run.metrics] for run in (straight, result))
    assert a == b
    models = [load(run.run_dir)[0] for run in (straight, result)]
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)
    names = [path.name for path in (result.run_dir / "checkpoints").iterdir()]
    assert sorted(names) == [c.name for c in list_checkpoints(result.run_dir)]
