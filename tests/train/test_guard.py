"""Steps that are left out: not finite, or a loss that jumps."""

import math
import statistics

import pytest
import torch
from ranks import on_ranks

from attamba.config import ConfigError, SpikesConfig, from_dict
from attamba.train import TrainingDiverged, TrainingInterrupted, losses, train
from attamba.train.distributed import Ranks, open_ranks
from attamba.train.guard import Guard, n_skipped, step_unless
from attamba.train.run import Run
from attamba.train.sources import open_sources
from attamba.train.watchdog import Watchdog

INF, NAN = math.inf, math.nan


def judged(config, steps):
    """Which of (loss, norm) a guard leaves out, and the guard."""
    guard = Guard(config, torch.device("cpu"))
    out = [guard.judge(torch.tensor(loss), torch.tensor(norm)).item() for loss, norm in steps]
    return out, guard


def expected(losses, config):
    """The same for finite losses and no limits, by Python's own medians."""
    taken, out = [], []
    for loss in losses:
        last = taken[-config.window :]
        out.append(False)
        if len(last) == config.window:
            median = statistics.median_low(last)
            mad = statistics.median_low([abs(x - median) for x in last])
            out[-1] = loss > median + config.threshold * 1.4826 * mad
        if not out[-1]:
            taken.append(loss)
    return out


@pytest.mark.parametrize("window", [3, 8, 15])
def test_spikes_are_those_of_the_definition(window):
    torch.manual_seed(window)
    losses = [round(3 + x, 3) for x in torch.randn(60).tolist()]
    losses[20] = losses[21] = losses[40] = 30.0
    config = SpikesConfig(threshold=2.5, window=window, max_in_a_row=99, max_skipped=99)
    out, guard = judged(config, [(loss, 1.0) for loss in losses])
    assert out == expected(losses, config)
    assert out[20] and out[21] and out[40]
    assert n_skipped(guard.counts.tolist()) == sum(out) < 30


def test_without_a_threshold_no_finite_loss_is_a_spike():
    steps = [(1.0, 1.0)] * 300 + [(1e9, 1e9)]
    assert not any(judged(SpikesConfig(), steps)[0])


def test_what_is_not_finite_is_left_out_and_counted():
    steps = [(1.0, 1.0), (NAN, 1.0), (1.0, INF), (2.0, 1.0), (-INF, NAN)]
    out, guard = judged(SpikesConfig(), steps)
    assert out == [0, 1, 1, 0, 1]
    assert guard.counts.tolist() == [3, 0, 1, 2, 2]
    assert guard.state()["losses"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_in_a_row": 2}, "2 steps in a row were left out (spikes.max_in_a_row=2)"),
        ({"max_skipped": 3}, "3 steps in all were left out (spikes.max_skipped=3)"),
        ({"max_skipped": 1}, "a step was left out (spikes.max_skipped=1)"),
    ],
)
def test_once_a_limit_is_reached_nothing_more_is_taken(limits, text):
    config = SpikesConfig(**limits)
    bad, good = (NAN, 1.0), (1.0, 1.0)
    steps = [good, bad, good, bad, bad, good, good]
    out, guard = judged(config, steps)
    assert out[-2:] == [1, 1]
    assert guard.counts[4] == out[:-2].count(0)  # what came after the limit is not counted
    assert guard.reached(guard.counts.tolist()) == text


def test_its_state_goes_on_exactly():
    config = SpikesConfig(threshold=3.0, window=4, max_in_a_row=9)
    torch.manual_seed(0)
    steps = [(x, 1.0) for x in torch.randn(30).tolist()] + [(NAN, 1.0), (50.0, 1.0)]
    for cut in (2, 17, 31):
        whole, guard = judged(config, steps)
        first, before = judged(config, steps[:cut])
        after = Guard(config, torch.device("cpu"))
        after.restore(before.state())
        rest = [after.judge(torch.tensor(a), torch.tensor(b)).item() for a, b in steps[cut:]]
        assert first + rest == whole
        assert after.state() == guard.state()


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_left_out_changes_nothing(fused):
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    for out, changes in ((0.0, True), (1.0, False), (0.0, True)):
        layer(torch.randn(2, 3)).sum().backward()
        state = optimizer.state_dict()["state"]
        kept = [p.clone() for p in layer.parameters()]
        moments = [t.clone() for entry in state.values() for t in entry.values()]
        step_unless(optimizer, torch.tensor(out))
        state = optimizer.state_dict()["state"]
        assert all(torch.equal(p, k) != changes for p, k in zip(layer.parameters(), kept))
        if not changes:
            now = [t for entry in state.values() for t in entry.values()]
            assert all(map(torch.equal, now, moments)) and len(now) == len(moments) > 0


# --------------------------------------------------------------------------------------------
# In a run
# --------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the losses of these steps, counted from 1, are not finite."""

    def apply(steps):
        plain = Run._loss_sum

        def loss_sum(self, batch):
            bad = self.model.training and self.step + 1 in steps
            return plain(self, batch) * (NAN if bad else 1.0)

        monkeypatch.setattr(Run, "_loss_sum", loss_sum)

    return apply


def test_a_skipped_step_is_told_and_training_goes_on(make_config, poison, capsys):
    poison({3, 4})
    result = train(make_config({"train.progress": True}))
    records = [r for r in result.metrics if r["kind"] == "train"]
    assert [r["skipped"] for r in records] == [0, 0, 1] + [2] * 9
    assert [r["loss"] is None for r in records] == [r["step"] in (3, 4) for r in records]
    assert records[2]["grad_norm"] is None
    assert [r["lr"] for r in records][2:4] == [3e-3 * 3 / 4, 3e-3]  # the schedule goes on
    out = capsys.readouterr().out
    assert "step 3/12  loss not finite  lr 2.25e-03  grad norm not finite  1 skipped" in out


def test_a_skipped_step_leaves_the_weights_alone(make_config, poison, tmp_path):
    poison({1})
    config = make_config()
    run = run_of(config, Ranks(torch.device("cpu")), tmp_path)
    before = [p.clone() for p in run.model.parameters()]
    run.take_step()
    assert run.read()["skipped"] == run.step == 1
    assert all(map(torch.equal, run.model.parameters(), before))
    run.take_step()
    assert not any(map(torch.equal, run.model.parameters(), before))


def test_resuming_repeats_what_the_guard_knew(make_config, poison):
    poison({2, 3, 6})
    spikes = {"spikes.threshold": 0.1, "spikes.window": 3, "optim.lr": 1e-6}
    whole = train(make_config(spikes, out="whole"))
    assert whole.metrics[-2]["skipped"] > 3  # spikes, too
    config, asked = make_config(spikes), []
    with pytest.raises(TrainingInterrupted):
        train(config, should_stop=lambda: asked.append(1) or len(asked) == 7)
    result = train(config)
    keys = ("step", "loss", "grad_norm", "skipped")
    assert [[r.get(k) for k in keys] for r in result.metrics] == [
        [r.get(k) for k in keys] for r in whole.metrics
    ]


@pytest.mark.parametrize(
    ("change", "bad", "last"),
    [
        ({"spikes.max_in_a_row": 3}, {2, 3, 6, 7, 8, 9}, 8),
        ({"spikes.max_skipped": 3}, {2, 5, 9, 11}, 9),
    ],
)
def test_training_ends_at_a_limit(make_config, poison, change, bad, last):
    poison(bad)
    with pytest.raises(TrainingDiverged) as caught:
        train(make_config(change))
    (key, limit), *_ = change.items()
    assert caught.value.step == last
    assert f"({key}={limit}). The last good checkpoint is" in str(caught.value)
    assert caught.value.checkpoint.name == "step-00000004" if last < 9 else "step-00000008"


def run_of(config, ranks, folder):
    sources = open_sources(
        config, folder, fresh=ranks.is_main, say=str, share=(ranks.rank, ranks.size)
    )
    return Run(config, sources, ranks, Watchdog(Ranks(ranks.device), 60))


def poisoned_steps(config, folder):
    """Of four steps, in the second of which one rank's loss is not finite: how many were left out
    so far, and whether the weights stayed the same."""
    with open_ranks(config) as ranks:
        run = run_of(config, ranks, folder)
        counts, same = [], []
        for step in range(4):
            before = [p.detach().clone() for p in run.model.parameters()]
            if step == 1 and ranks.rank == 1:
                run.nats = lambda logits, targets: logits.sum() * INF
            run.take_step()
            run.nats = losses.nats
            counts.append(run.read()["skipped"])
            now = [p.detach() for p in run.model.parameters()]
            same.append(all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(now, before)))
        return counts, same


@pytest.mark.parametrize(
    "mesh", [{"shard": 2}, {"replicate": 2, "shard": 1}, {"tensor": 2}, {"context": 2}]
)
def test_all_ranks_leave_out_the_same_steps(make_config, mesh, tmp_path):
    change = {f"parallel.{key}": value for key, value in mesh.items()}
    for counts, same in on_ranks(2, poisoned_steps, make_config(change), tmp_path):
        assert counts == [0, 1, 1, 1]
        assert same == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"threshold": 0}, r"spikes\.threshold=0(\.0)? must be above 0; leave it out"),
        ({"window": 2}, r"spikes\.window=2 must be at least 3"),
        ({"max_in_a_row": 0}, r"spikes\.max_in_a_row=0 must be at least 1"),
        ({"max_skipped": 0}, r"spikes\.max_skipped=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(change, text):
    with pytest.raises(ConfigError, match=text):
        from_dict(SpikesConfig, change).validate()
