"""attamba.plots: pictures agree with the rule, and can be drawn."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from attamba import plots
from attamba.config import AttambaMixer, ModelConfig, TransformerMixer
from attamba.models.accounting import attention_entries
from attamba.plots import IN_PAST, IN_WINDOW, IS_SINK, NOT_SEEN, Curve


def config(**mixer: object) -> ModelConfig:
    return ModelConfig(
        dim=32,
        n_layers=4,
        mixer=AttambaMixer(**{"n_heads": 2, "chunk_size": 8, "leading_tokens": 3, **mixer}),  # type: ignore[arg-type]
    )


def test_kinds_are_the_rule_written_out() -> None:
    kinds = plots.key_kinds(config(), layer_idx=2, seq_len=40)
    for t in range(40):
        for s in range(40):
            if s > t:
                expected = NOT_SEEN
            elif s >= t - 3:
                expected = IN_WINDOW
            elif s == 0:
                expected = IS_SINK
            else:
                expected = IN_PAST if s % 8 == 8 - 1 - 4 else NOT_SEEN  # o_2 = 2 * 8 / 4
            assert kinds[t, s] == expected, (t, s)


def test_without_sink_position_0_is_forgotten() -> None:
    kinds = plots.key_kinds(config(sink=False), layer_idx=0, seq_len=40)
    assert (kinds[4:, 0] == NOT_SEEN).all()


def test_kinds_of_heads_with_ends_of_their_own() -> None:
    per_head = config(boundary="head_cyclic", ssm_scope="sequence")
    first, second = (plots.key_kinds(per_head, 0, 40, head=head) for head in range(2))
    assert (first != second).any()
    kinds = [plots.key_kinds(per_head, i, 40, head) for i in range(4) for head in range(2)]
    assert sum((k != NOT_SEEN).sum() for k in kinds) == attention_entries(per_head, 40)


@pytest.mark.parametrize("window", [None, 5])
def test_kinds_of_a_transformer(window: int | None) -> None:
    transformer = ModelConfig(dim=32, n_layers=1, mixer=TransformerMixer(n_heads=2, window=window))
    kinds = plots.key_kinds(transformer, 0, 12)
    t, s = np.indices((12, 12))
    seen = (s <= t) & (s > t - (window or 12))
    assert (kinds == np.where(seen, IN_WINDOW, NOT_SEEN)).all()


def test_a_mask_is_drawn_as_the_rule_has_it() -> None:
    plt = plots.pyplot()
    figure, ax = plt.subplots()
    plots.draw_mask(ax, config(), 0, 40)
    kinds = plots.key_kinds(config(), 0, 40)
    for kind in (NOT_SEEN, IN_WINDOW, IN_PAST, IS_SINK):
        (patch,) = [p for p in ax.patches if _hex(p) == plots.colour(kind)]
        corners = patch.get_path().vertices.reshape(-1, 5, 2)
        # Each bar is a cell wide, so that areas count cells.
        sides = corners[:, 2] - corners[:, 0]
        assert sides.prod(axis=1).sum() == np.tril(kinds == kind).sum()
    plt.close(figure)


def _hex(patch: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(patch.get_facecolor()).upper()


def test_curves_and_dial_are_drawn() -> None:
    plt = plots.pyplot()
    figure, (left, right) = plt.subplots(1, 2)
    plots.draw_curves(left, [Curve("attamba", [1, 2], [3.0, 2.0])], x="step", y="loss", log_x=True)
    assert left.get_xscale() == "log"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["attamba"]
    points = [("P=1", 4096.0, 3.0), ("P=8", 1024.0, 3.5)]
    plots.draw_dial(right, points, ("transformer", 4096.0, 2.9), trained="P=8")
    assert {text.get_text() for text in right.texts} == {"P=1", "P=8, trained", "transformer"}
    plt.close(figure)


def test_missing_matplotlib_names_the_extra() -> None:
    code = "import sys; sys.modules['matplotlib'] = None\nfrom attamba import plots\nplots.pyplot()"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: plots need matplotlib: pip install 'attamba[plot]'" in child.stderr
