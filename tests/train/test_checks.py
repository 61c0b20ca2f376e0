"""What is refused before texts are prepared, and before a job waits in a queue."""

import pytest

from attamba import exit_status
from attamba.cli import main
from attamba.config import ConfigError
from attamba.train import train
from attamba.train.checks import check_run

CASES = [
    ({"model.mixer.boundary": "cyclik"}, 1, "boundary='cyclik' is not a policy"),
    ({"model.mixer.boundary": {"type": ["cyclic"]}}, 1, r"boundary=\['cyclic'\] is not a policy"),
    ({"model.mixer.boundary": "separator"}, 1, r"boundary\.tokens"),
    ({"model.mixer.boundary": "given"}, 1, "mixer.boundary=given takes chunk ends from whoever"),
    ({"model.mixer.boundary": {"type": "given"}}, 1, "mixer.boundary=given takes chunk ends"),
    ({"data.train": ""}, 1, "data.train is not set; give text files or folders"),
    (
        {"data.generate": {"type": ["recall"]}, "data.train": ""},
        1,
        r"data\.generate\.type=\['recall'\] is not a task",
    ),
    (
        {"data.generate": {"type": "recall", "pairs": 40}, "data.train": ""},
        1,
        "data.seq_len=64 is too short for 40 pairs",
    ),
    ({"train.seed": 1 << 63}, 1, r"train\.seed=9223372036854775808 must be below 2\^63"),
    ({"parallel.hang_timeout": 1e9}, 1, "hang_timeout=1000000000.0 must be above 0 and at most"),
    ({"out": ""}, 1, "out is empty; name the folder of the run"),
    ({"eval.tasks": ["hellaswag"]}, 2, "are scored by one process, and there are 2 ranks"),
    ({"train.cuda_graphs": True}, 2, "train.cuda_graphs=true is for one process"),
    ({"train.device": "cuda:0"}, 2, "train.device='cuda:0' names one device for all ranks"),
    ({}, 3, "data.batch_size=4 cannot be divided among 3 ranks"),
]


@pytest.mark.parametrize(("change", "n_ranks", "message"), CASES)
def test_what_is_refused(make_config, change, n_ranks, message):
    config = make_config({key: value for key, value in change.items() if key != "out"})
    config.out = change.get("out", config.out)
    with pytest.raises(ConfigError, match=message):
        check_run(config, n_ranks)
    if n_ranks == 1:
        with pytest.raises(ConfigError, match=message):
            train(config)


def test_what_is_not_refused(make_config):
    check_run(make_config(), 4)
    check_run(make_config({"eval.tasks": ["hellaswag"], "eval.mode": "process"}), 2)
    check_run(make_config({"train.device": "cuda:0"}), 1)


def test_a_mistake_leaves_as_one(make_config, capsys, tmp_path):
    arguments = ["train", "data.generate={type: recall, pairs: 40}", "data.seq_len=32"]
    assert main([*arguments, f"out={tmp_path}/run"]) == exit_status.MISTAKE
    assert "data.seq_len=32 is too short" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for device in ("mps", "meta"):
        with pytest.raises(ConfigError, match=f"train.device='{device}' is not supported; give"):
            train(make_config({"train.device": device}))
