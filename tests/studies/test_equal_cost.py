"""Baselines of the shipped studies hold as many bytes as what they are compared with."""

from pathlib import Path

import pytest

from attamba.models.accounting import cache_bytes
from attamba.studies.recipe import load_study

FOLDER = Path(__file__).parents[2] / "studies"


def _bytes(study: str, variant: str) -> int:
    (run,) = load_study(FOLDER / f"{study}.yaml").runs("full", f"{variant}-s0")
    config = run.config()
    return cache_bytes(config.model, config.data.seq_len, 2)


@pytest.mark.parametrize(
    ("study", "variant", "ours"),
    [
        *(
            (("main", f"{kind}-P{p}", f"chunk-P{p}"))
            for p in (4, 8)
            for kind in ("width", "window")
        ),
        ("main", "width-window-P4", "chunk-P4"),
        ("main", "width-window-P8", "chunk-P8"),
        ("long-context", "window-P8", "attamba-P8"),
        ("recall", "window-bytes", "chunk-P8"),
        ("recall-full", "window-bytes", "chunk-P8"),
        ("recall-distance", "window-bytes", "chunk-P8"),
        ("passkey-gentle", "window-P8", "attamba-P8"),
        ("passkey-gentle", "P2-G2", "attamba-P8"),
        ("passkey-long", "window-P8", "attamba-heads-P8"),
        ("passkey-long", "P2-G2", "attamba-heads-P8"),
    ],
)
def test_equal_bytes_are_equal(study, variant, ours):
    assert _bytes(study, variant) == pytest.approx(_bytes(study, ours), rel=0.025)


@pytest.mark.parametrize("p", [4, 8, 16])
def test_scopes_and_phases_cost_no_byte(p):
    plain = _bytes("main", f"chunk-P{p}")
    assert _bytes("main", f"sequence-P{p}") == plain
    assert _bytes("main", f"heads-cyclic-P{p}") == pytest.approx(plain, rel=0.01)


def test_the_small_window_of_recall_sees_as_many_entries():
    from attamba.models.accounting import attention_entries

    (window,) = load_study(FOLDER / "recall.yaml").runs("full", "window-entries-s0")
    (chunks,) = load_study(FOLDER / "recall.yaml").runs("full", "chunk-P8-s0")
    last = []
    for run in (window, chunks):
        model = run.config().model
        last.append(attention_entries(model, 160) - attention_entries(model, 159))
    heads = 2 * 8
    assert last[0] == 28 * heads and abs(last[1] / heads - 28) <= 1.5


def test_compressors_are_compared_at_equal_parameters():
    from attamba.models.accounting import n_parameters

    runs = load_study(FOLDER / "compressors.yaml").runs("full")
    sizes = [n_parameters(run.config().model) for run in runs]
    assert max(sizes) / min(sizes) < 1.0005


def test_recurrent_models_of_the_long_run_are_as_large_as_its_transformer():
    from attamba.models.accounting import n_parameters

    runs = load_study(FOLDER / "long-run.yaml").runs("full")
    sizes = {run.variant: n_parameters(run.config().model) for run in runs}
    recurrent = {v: n for v, n in sizes.items() if v.startswith(("mamba2", "hawk", "mingru"))}
    assert len(recurrent) == 5
    for size in recurrent.values():
        assert size == pytest.approx(sizes["transformer"], rel=0.005)
