"""The iso-solver: what it prints costs what it says; the paper's rule gives its widths."""

from pathlib import Path

import pytest

import attamba
from attamba.cli import main
from attamba.config import (
    AttambaMixer,
    ConfigError,
    ModelConfig,
    TransformerMixer,
    load_run_config,
    override_model,
    parse_overrides,
)
from attamba.models.accounting import cache_bytes, flops_per_token, n_parameters
from attamba.studies.solver import MATCHES, paper_width, solve

PAPER = Path(__file__).parents[2] / "configs" / "paper"
COSTS = {
    "kv": lambda config, T: cache_bytes(config, T, 2),
    "flops": lambda config, T: flops_per_token(config, T, training=False),
    "params": lambda config, T: n_parameters(config),
}


def _config(**changes) -> ModelConfig:
    mixer = AttambaMixer(**{"n_heads": 4, "chunk_size": 4, "leading_tokens": 8, **changes})
    return ModelConfig(vocab_size=50, dim=64, n_layers=3, mixer=mixer)


@pytest.mark.parametrize("seq_len", [64, 500])
@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk_size": 16, "leading_tokens": 0},
        {"boundary": "head_cyclic", "ssm_scope": "sequence"},
        {"n_kv_heads": 2, "kv_proj": True, "state_dim": 8},
        {"leading_tokens": None},
    ],
    ids=str,
)
def test_a_match_is_within_half_a_step(changes, match, seq_len):
    config = _config(**changes)
    target = COSTS[match](config, seq_len)
    for rival in solve(config, match, seq_len):
        assert rival.target == target
        assert rival.cost == COSTS[match](rival.config, seq_len)
        inside = rival.by != "heads" and not _at_an_end(rival, seq_len)
        if inside:
            assert abs(rival.cost - target) <= rival.step / 2 * (1 + 1e-9)
        model = attamba.build_model(rival.config)  # it is a model that can be had
        assert sum(p.numel() for p in model.parameters()) == n_parameters(rival.config)


def _at_an_end(rival, seq_len) -> bool:
    """No setting lies on the target's other side."""
    return rival.mixer.window in (1, seq_len) or rival.width in (2, 4 * rival.config.dim)


def test_no_other_width_is_nearer():
    config = _config()
    for match in MATCHES:
        rival = solve(config, match, 100)[0]
        for heads in (2, 4):
            for head_dim in range(2, 65, 2):
                other = ModelConfig(
                    vocab_size=50,
                    dim=64,
                    n_layers=3,
                    mixer=TransformerMixer(n_heads=heads, head_dim=head_dim),
                )
                miss = abs(COSTS[match](other, 100) - rival.target)
                assert abs(rival.cost - rival.target) <= miss * (1 + 1e-9)


def test_equal_bytes_are_those_of_real_caches():
    config = _config()
    for rival in solve(config, "kv", 200):
        cache = attamba.build_model(rival.config).bfloat16().new_cache()
        cache.fill(200)
        assert cache.nbytes(used=True) == rival.cost


@pytest.mark.parametrize(("chunk_size", "kv", "flops"), [(4, 128, 160), (8, 64, 104), (16, 32, 72)])
def test_the_paper_s_rule_gives_the_paper_s_widths(chunk_size, kv, flops):
    config = load_run_config(PAPER / f"attamba-p{chunk_size}.yaml").model
    assert paper_width(config, "kv") == kv
    assert paper_width(config, "flops") == flops
    assert paper_width(config, "params") is None
    for match, width in (("kv", kv), ("flops", flops)):
        shipped = load_run_config(PAPER / f"transformer-{match}-p{chunk_size}.yaml").model.mixer
        assert shipped.n_heads * shipped.head_dim == width


def test_without_window_states_and_sink_the_paper_s_bytes_are_exact():
    """At a length where nothing else counts, width d / P."""
    config = _config(
        leading_tokens=0, sink=False, state_dim=1, ssm_dim=4, conv_width=1, ssm_heads=1
    )
    rival = solve(config, "kv", 40_000)[0]
    assert rival.width == 64 // 4


def test_what_is_printed_can_be_used(capsys):
    path = PAPER / "attamba-p8.yaml"
    assert main(["study", "solve", str(path), "mixer.leading_tokens=64", "--match", "kv"]) == 0
    out = capsys.readouterr().out
    config = load_run_config(path, ["mixer.leading_tokens=64"]).model
    target = cache_bytes(config, 1024, 2)
    lines = [line.partition(": ")[2] for line in out.splitlines() if ": mixer=" in line]
    assert len(lines) == 3
    for line in lines[:2]:  # whole heads are too coarse to meet it
        other = override_model(config, parse_overrides([line]))
        assert cache_bytes(other, 1024, 2) == pytest.approx(target, rel=0.04)


def test_other_mixers_are_refused(capsys):
    assert main(["study", "solve", str(PAPER / "transformer.yaml")]) == 2
    assert "whose mixer is of type attamba; this has transformer" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="this has a list of mixers"):
        solve(ModelConfig(mixer=[AttambaMixer(), TransformerMixer()]), "kv", 10)


@pytest.mark.parametrize("boundary", ["first_attention", "{type: separator, tokens: [1]}"])
def test_chunk_ends_that_are_not_known_beforehand_are_refused(boundary, capsys):
    path = str(PAPER / "attamba-p8.yaml")
    assert main(["study", "solve", path, f"mixer.boundary={boundary}"]) == 2
    assert "solve with mixer.boundary=uniform and mixer.chunk_size set" in capsys.readouterr().err


def test_the_paper_s_rule_says_nothing_about_shared_heads():
    config = load_run_config(PAPER / "attamba-p8.yaml").model
    shared = override_model(config, {"mixer.n_kv_heads": 2, "mixer.kv_proj": True})
    assert paper_width(config, "kv") == 64 and paper_width(shared, "kv") is None
