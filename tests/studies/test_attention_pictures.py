"""Heat maps show the weights that the model itself used."""

import pytest
import torch

import attamba
from attamba.cli import main
from attamba.plots import NOT_SEEN, key_kinds
from attamba.studies.engine import work_on
from attamba.studies.pictures import layer_attention

ATTAMBA = {"type": "attamba", "n_heads": 4, "ssm_heads": 2, "chunk_size": 4, "leading_tokens": 3}
MIXERS = {
    "cyclic": ATTAMBA,
    "head_cyclic": {**ATTAMBA, "boundary": "head_cyclic", "ssm_scope": "sequence"},
    "grouped": {**ATTAMBA, "kv_proj": True, "n_kv_heads": 2},
    "mean": {**ATTAMBA, "compressor": "mean"},
    "transformer": {"type": "transformer", "n_heads": 4, "n_kv_heads": 2},
    "window": {"type": "transformer", "n_heads": 4, "window": 5},
}


def _model(mixer):
    config = attamba.ModelConfig(vocab_size=20, dim=16, n_layers=2, mixer=mixer)
    return attamba.build_model(config).eval()


@pytest.mark.parametrize("name", MIXERS)
def test_the_weights_make_the_layer_s_own_output(name):
    model = _model(MIXERS[name])
    ids = torch.randint(20, (1, 23))
    io = {}
    for i, layer in enumerate(model.layers):
        layer.mixer.register_forward_hook(
            lambda module, args, y, i=i: io.__setitem__(i, (*args[:2], y))
        )
    maps = layer_attention(model, ids)
    assert [m.layer_idx for m in maps] == [0, 1]
    for found in maps:
        mixer = model.layers[found.layer_idx].mixer
        x, span, y = io[found.layer_idx]
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(4, 23))
        if name in ("transformer", "window"):
            v = mixer.wkv(x).unflatten(-1, (2, mixer.n_kv_heads, mixer.head_dim))[:, :, 1]
        else:
            v = mixer.project(x, mixer.boundary(span)[0], span)[2]
        v = v[0].repeat_interleave(4 // mixer.n_kv_heads, 1)
        out = mixer.wo(torch.einsum("hts,shd->thd", found.weights, v).flatten(1))
        torch.testing.assert_close(out, y[0], atol=1e-5, rtol=1e-4)
        drawn = torch.from_numpy(key_kinds(model.config, found.layer_idx, 23) != NOT_SEEN)
        assert torch.equal(found.seen[0], drawn)
        assert torch.equal(found.weights[0] > 0, drawn)


def test_a_hybrid_shows_the_layers_that_attend():
    model = _model([{"type": "mingru"}, ATTAMBA])
    assert [m.layer_idx for m in layer_attention(model, torch.zeros(1, 5, dtype=torch.long))] == [1]
    with pytest.raises(ValueError, match="no layer of this model has attention"):
        layer_attention(_model({"type": "mingru"}), torch.zeros(1, 5, dtype=torch.long))


def test_the_command_draws_a_checkpoint(make_study, place, tmp_path, capsys):
    run = make_study().runs("full")[0]
    assert work_on(run, place).status == "done"
    text = tmp_path / "text.txt"
    text.write_text("the red tree sees a cat under the river, then " * 3)
    command = ["study", "attention", str(place.run_dir(run)), "--text", str(text)]
    assert main([*command, "--out", str(tmp_path / "pictures"), "--tokens", "40"]) == 0
    (path,) = (tmp_path / "pictures").iterdir()
    assert path.name == "layer-1.png" and path.read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.strip() == str(path)
    text.write_text("")
    assert main([*command, "--out", str(tmp_path / "none")]) == 2
    assert "the text is empty" in capsys.readouterr().err
