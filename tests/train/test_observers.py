"""Speed, utilisation, memory and profile of a run."""

import json
import math
import mmap
import os

import numpy as np
import pytest
import torch
from ranks import on_ranks

from attamba.config import ConfigError, ModelConfig, ProfileConfig, RunConfig, from_dict
from attamba.data import Batch
from attamba.models.accounting import (
    attention_flops_by_length,
    countable,
    flops,
    flops_per_token,
)
from attamba.train import train
from attamba.train.observers import memory
from attamba.train.phases import PHASES, Phases
from attamba.train.utilisation import FlopCounter, document_lengths, known_peak

CPU = torch.device("cpu")

MIXERS = {
    "cyclic": {"type": "attamba", "n_heads": 2, "chunk_size": 4, "leading_tokens": 3},
    "unbounded": {"type": "attamba", "n_heads": 2, "leading_tokens": None},
    "head_cyclic": {
        "type": "attamba",
        "n_heads": 2,
        "leading_tokens": 5,
        "boundary": "head_cyclic",
        "ssm_scope": "sequence",
    },
    "budget": {
        "type": "attamba",
        "n_heads": 2,
        "leading_tokens": 0,
        "boundary": {"type": "budget", "max_chunks": 4},
    },
    "full": {"type": "transformer", "n_heads": 2},
    "window": {"type": "transformer", "n_heads": 2, "window": 6, "head_dim": 8},
    "hybrid": [{"type": "mamba2"}, {"type": "transformer", "n_heads": 2}],
}


def model(mixer):
    return ModelConfig(dim=32, n_layers=2, mixer=mixer)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_attention_by_length_is_that_of_each_length_alone(mixer):
    table = attention_flops_by_length(model(mixer), 40)
    assert table.shape == (41,) and table[0] == 0
    for length in (1, 4, 6, 7, 23, 40):
        assert table[length] == pytest.approx(flops(model(mixer), length).attention * length)


def rows(*lengths):
    """A batch of one row for each list of document lengths."""
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    return Batch(ids, ids, ids)


def test_documents_are_cut_at_a_row_s_ends():
    assert document_lengths(rows([3, 1, 4], [8]).doc_ids).tolist() == [3, 1, 4, 8]


def counter(mixer="cyclic", **data):
    tree = {"model": {"dim": 32, "n_layers": 2, "mixer": MIXERS[mixer]}, "data": {"seq_len": 40}}
    tree["data"] |= data
    return FlopCounter(from_dict(RunConfig, tree))


@pytest.mark.parametrize("mixer", MIXERS)
def test_flops_of_whole_rows_are_those_of_accounting(mixer):
    want = flops_per_token(model(MIXERS[mixer]), 40) * 80
    assert counter(mixer).of(rows([40], [40])) == pytest.approx(want)
    packed = rows([40], [20, 20])
    assert counter(mixer, doc_mask=False).of(packed) == pytest.approx(want)
    assert (counter(mixer).of(packed) < want) == (mixer != "mamba2")


def test_flops_follow_the_documents_and_the_drawn_chunk_size():
    own = model(MIXERS["cyclic"])
    parts = flops(own, 40)
    attention = sum(flops(own, n).attention * n for n in (7, 33, 40))
    want = 3 * (80 * (parts.projections + parts.scan) + attention)
    assert counter().of(rows([7, 33], [40])) == pytest.approx(want)
    other = model(MIXERS["cyclic"] | {"chunk_size": 2})
    found = counter().of(rows([40]), chunk_size=2)
    assert found == pytest.approx(flops_per_token(other, 40) * 40)
    assert found > counter().of(rows([40]))


def test_chunks_that_follow_the_text_count_as_their_mean():
    separator = {"type": "separator", "tokens": [32], "max_chunk": 8}
    text = model(MIXERS["cyclic"] | {"boundary": separator})
    assert countable(text) == model(MIXERS["cyclic"])


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_found_by_the_device_s_name(name, tflops):
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_a_record_says_how_fast_and_by_what(make_config):
    change = {"metrics.peak_tflops": 0.5, "data.doc_mask": False, "train.log_every": 4}
    config = make_config(change)
    records = [r for r in train(config).metrics if r["kind"] == "train"]
    seconds = 0.0
    for record in records:
        rate = record["tokens_per_second"]
        assert record["tokens_per_second_per_device"] == rate
        assert rate == pytest.approx(4 * 4 * 64 / (record["seconds"] - seconds))
        seconds = record["seconds"]
        want = flops_per_token(config.model, 64) * rate / 0.5e12
        assert record["mfu"] == pytest.approx(want)
        shares = [record[f"{name}_share"] for name in PHASES]
        assert all(share > 0 for share in shares) and 0.5 < sum(shares) <= 1
        assert record["memory_peak_bytes"] >= record["memory_bytes"] > 10**7


def speed_of(config, ballast=0):
    """Records of a run, and this process's memory after it; rank 1 holds `ballast` bytes more, and
    has spent more time at reading than there was.
    """
    held = None
    if os.environ.get("RANK") == "1":
        held, take = b"1" * ballast, Phases.take
        Phases.take = lambda self: take(self) | {"data": 1e6}
    records = [r for r in train(config).metrics if r["kind"] == "train"]
    del held
    return records, memory(CPU)["memory_bytes"]


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"context": 2}, {"tensor": 2, "replicate": 2}])
def test_speed_is_that_of_all_ranks(make_config, documents, mesh):
    """Ranks have rows of other documents, and so other FLOPs; one has more memory and waits."""
    change = {"metrics.peak_tflops": 0.5, "data.train": documents[0], "train.steps": 4}
    several = {f"parallel.{key}": size for key, size in mesh.items()}
    n = math.prod(mesh.values())
    config = make_config(change | several, out="several")
    (records, own), *_ = on_ranks(n, speed_of, config, 200_000_000)
    alone, _ = speed_of(make_config(change, out="alone"))
    for found, expected in zip(records, alone):
        assert found["tokens"] == expected["tokens"]
        rates = [r["tokens_per_second_per_device"] for r in (found, expected)]
        assert found["tokens_per_second"] == pytest.approx(n * rates[0])
        # FLOPs of a token, whatever the time.
        assert found["mfu"] / rates[0] == pytest.approx(expected["mfu"] / rates[1])
        assert found["memory_bytes"] > own + 100_000_000
        assert found["data_share"] > 1
        assert 0 < found["forward_share"] + found["backward_share"] <= 1


def test_without_a_peak_there_is_no_utilisation(make_config):
    record = train(make_config({"train.steps": 1})).metrics[0]
    assert record["mfu"] is None and record["forward_share"] > 0


def test_phases_add_up_and_begin_anew():
    phases = Phases(CPU)
    for _ in range(2):
        with phases("forward"), phases("data", on_host=True):
            pass
    found = phases.take()
    assert found["forward"] > found["data"] > 0 == found["backward"]
    assert phases.take() == dict.fromkeys(PHASES, 0.0)


def test_memory_grows_with_what_is_held():
    before = memory(CPU)["memory_bytes"]
    with mmap.mmap(-1, 40_000_000) as held:  # new pages, where an allocator may have some left
        held.write(b"1" * 40_000_000)
        assert memory(CPU)["memory_bytes"] > before + 30_000_000


# --------------------------------------------------------------------------------------------
# profile
# --------------------------------------------------------------------------------------------


def test_a_profile_has_the_steps_that_were_asked_for(make_config, capfd):
    change = {"profile": {"wait": 2, "steps": 3}, "train.progress": True}
    result = train(make_config(change))
    trace = result.run_dir / "profile" / "trace-step-00000003.json"
    events = json.loads(trace.read_text())["traceEvents"]
    for name in PHASES:
        spans = [e for e in events if e.get("name") == name and e.get("cat") == "user_annotation"]
        assert len(spans) == 3, name
    assert any(e.get("name") == "[memory]" for e in events)
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]
    told = capfd.readouterr().out
    assert f"Steps 3 to 5: a trace in {trace}, the memory in it; there is no snapshot" in told


def test_true_means_the_defaults_and_a_short_run_is_told(make_config, capsys):
    config = make_config({"profile": True, "train.progress": True})
    result = train(config)
    assert "No profile: it takes steps 11 to 13, and training ended after step 12" in (
        capsys.readouterr().out
    )
    assert not (result.run_dir / "profile").exists()
    assert from_dict(RunConfig, {"profile": {"steps": 2}}).profile == ProfileConfig(steps=2)


def test_it_trains_as_without_them(make_config):
    watched = {
        "profile": {"wait": 1},
        "metrics.layers_every": 3,
        "metrics.peak_tflops": 1.0,
        "model.mixer.boundary": "jitter",
        "train.chunk_sizes": [2, 4],
    }
    plain = train(make_config({k: watched[k] for k in list(watched)[3:]}, out="plain"))
    other = train(make_config(watched, out="watched"))
    losses = [[r["loss"] for r in x.metrics if r["kind"] == "train"] for x in (plain, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"profile": {"wait": 0}}, r"profile\.wait=0 must be at least 1"),
        ({"profile": {"steps": 0}}, r"profile\.steps=0 must be at least 1"),
        ({"profile": {"stps": 1}}, r"unknown key 'profile\.stps'; did you mean 'steps'"),
        ({"profile": 3}, r"profile=3 must be true or false or a dictionary"),
        ({"metrics": {"sinks": []}}, r"metrics\.sinks is empty"),
        ({"metrics": {"sinks": ["wandb", "wandb"]}}, r"metrics\.sinks=.* names one twice"),
        ({"metrics": {"sinks": ["nandb"]}}, r"metrics\.sinks\.0='nandb' must be one of: jsonl"),
        ({"metrics": {"project": ""}}, r"metrics\.project is empty"),
        ({"metrics": {"layers_every": -1}}, r"metrics\.layers_every=-1 must be at least 0"),
        ({"metrics": {"layers_queries": 0}}, r"metrics\.layers_queries=0 must be at least 1"),
        ({"metrics": {"peak_tflops": 0}}, r"metrics\.peak_tflops=0(\.0)? must be above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(change, text):
    with pytest.raises(ConfigError, match=text):
        from_dict(RunConfig, change).validate()
