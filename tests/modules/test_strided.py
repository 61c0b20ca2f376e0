"""ssm_scope strided: what the paper's code computed, written out; who reaches whom; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attamba
from attamba.config import ConfigError
from attamba.models.accounting import cache_bytes
from attamba.modules.attamba import ChunkAttention
from attamba.ops.chunking import make_span

DIM, P, E, S, N, VOCAB = 8, 4, 6, 3, 5, 11
CPU = torch.device("cpu")
MIXER = {
    "type": "attamba",
    "n_heads": 2,
    "chunk_size": P,
    "leading_tokens": 2,
    "boundary": "uniform",
    "sink": False,
    "ssm_scope": "strided",
    "ssm_dim": E,
    "ssm_heads": S,
    "state_dim": N,
}


def _model(**mixer: Any) -> attamba.Decoder:
    config = attamba.ModelConfig(
        vocab_size=VOCAB, dim=DIM, n_layers=1, ffn_dim=8, mixer={**MIXER, **mixer}
    )
    model = attamba.build_model(config)
    with torch.no_grad():
        for name in ("dt_bias", "D_skip", "norm_weight"):
            parameter = getattr(model.layers[0].mixer.compressors, name)
            parameter.add_(torch.randn_like(parameter) / 2)
    return model


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _written_out(layer: ChunkAttention, u: Tensor, which: int) -> Tensor:
    """Keys (0) or values (1) before positions, [T, d], with one state for each place."""
    p = dict(layer.compressors.named_parameters())
    widths = [E, E, E, E, N, N, N, N, S, S]
    parts = (u @ p["in_proj.weight"].t()).split(widths, 1)
    z, x, B, C, dt = (parts[2 * i + which] for i in range(5))
    taps = p["conv_weight"][:, -1].split([E, E, N, N, N, N])
    x, B, C = (_silu(t * taps[2 * i + which]) for i, t in enumerate((x, B, C)))
    states, out, width = [torch.zeros(S, N, E // S) for _ in range(P)], [], E // S
    for t in range(len(u)):
        step = torch.log1p(torch.exp(dt[t] + p["dt_bias"][which]))
        decay = torch.exp(-torch.exp(p["A_log"][which]) * step)
        states = [decay[:, None, None] * h for h in states]  # all decay, one is written and read
        own = x[t].view(S, width)
        states[t % P] = states[t % P] + torch.einsum("s,n,sw->snw", step, B[t], own)
        y = torch.einsum("n,snw->sw", C[t], states[t % P]) + p["D_skip"][which][:, None] * own
        gated = y.flatten() * _silu(z[t])
        normed = gated / torch.sqrt(gated.square().mean() + 1e-5) * p["norm_weight"][which]
        out.append(u[t] + p["out_proj"][which] @ normed)
    return torch.stack(out)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_a_state_for_each_place_with_every_gradient(backend):
    layer = _model(backend=backend).layers[0].mixer
    u, span = torch.randn(23, DIM), make_span(23, CPU)
    got = layer._keys_and_values(u[None], layer.boundary(span)[0], span, None)
    leaves = [p for n, p in layer.compressors.named_parameters()]
    for which in (0, 1):
        want = _written_out(layer, u, which)
        assert torch.allclose(got[which][0], want, atol=1e-5)
        cotangent = torch.randn(23, DIM)
        pair = [
            torch.autograd.grad((y * cotangent).sum(), leaves, retain_graph=True)
            for y in (got[which][0], want)
        ]
        for a, b in zip(*pair):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_token_reaches_the_same_place_of_later_chunks_and_no_other():
    """Defect 1: to all other places it matters through its decay alone, which is held here."""
    layer = _model().layers[0].mixer.requires_grad_(False)
    layer.compressors.in_proj.weight[-2 * S :] = 0  # step sizes do not depend on the input
    u, span = torch.randn(1, 24, DIM), make_span(24, CPU)
    other = u.clone()
    other[:, 6] += torch.randn(DIM)
    keys = [
        layer._keys_and_values(t, layer.boundary(span)[0], span, None)[0][0] for t in (u, other)
    ]
    moved = ((keys[0] - keys[1]).abs().amax(1) > 1e-6).nonzero()[:, 0].tolist()
    assert moved == [6, 10, 14, 18, 22]


def test_steps_pieces_and_bytes():
    model = _model(boundary="jitter").requires_grad_(False).eval()
    ids = torch.randint(VOCAB, (2, 30))
    full = model(ids)
    for cuts in ([1] * 30, [7, 1, 12, 10]):
        cache = model.new_cache(2)
        parts = [model(piece, cache=cache) for piece in ids.split(cuts, 1)]
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
        assert cache.nbytes(used=True) == cache_bytes(model.config, 30, batch_size=2)
    longest = P + 2 * ((P - 1) // 2)
    assert cache.layers[0].state.h.shape == (2, 2 * S, longest * N, E // S)


def test_weights_are_those_of_the_other_scopes():
    strided, chunk = _model(), _model(ssm_scope="chunk")
    chunk.load_state_dict(strided.state_dict())
    ids = torch.randint(VOCAB, (1, 20))
    assert not torch.allclose(strided(ids), chunk(ids), atol=1e-3)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model, ids = _model(), torch.randint(VOCAB, (2, 33))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(ids), model(ids), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"backend": "triton"}, r"backend=triton has no kernels for ssm_scope=strided"),
        ({"compressor": "mean"}, r"ssm_scope=strided needs mixer\.compressor=ssm"),
        ({"boundary": "head_cyclic"}, r"boundary=head_cyclic needs mixer\.ssm_scope=sequence"),
        ({"boundary": "random"}, r"boundary='random' may have any length; use mixer\.boundary=cy"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        _model(**options)
    if "boundary" not in options:
        with pytest.raises(ConfigError):
            _model(**options)
