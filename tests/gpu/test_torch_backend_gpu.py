"""The vectorised backends on CUDA: against the references, in the model, under torch.compile."""

from __future__ import annotations

import pytest
import torch
from drawing import HEADS, VOCAB, build

import attamba
from attamba.ops import chunk_attention, chunk_scan

# Outputs, and the gradients that come from them, are rounded to the input's dtype.
DTYPES = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / (want.norm() + 1e-6))


def gradients(op, inputs, weight_seed=0):
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = op(*inputs)
    torch.manual_seed(weight_seed)
    weight = torch.randn(out.shape, device=out.device)
    return [out, *torch.autograd.grad((out.float() * weight).sum(), inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("lead", [0, 1, 64, None])
@pytest.mark.parametrize("packed", [False, True])
def test_chunk_attention_is_its_reference(dtype, seq, lead, packed):
    q = torch.randn(2, seq, 4, 32, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, seq, 2, 32, device="cuda", dtype=dtype) for _ in range(2))
    ends = torch.rand(2, 2, seq, device="cuda") < 0.2
    doc_ids = (torch.rand(2, seq, device="cuda") < 0.02).long().cumsum(1) if packed else None
    got = gradients(lambda *t: chunk_attention(*t, ends, lead, doc_ids, backend="torch"), (q, k, v))
    exact = [t.float() for t in (q, k, v)]
    want = gradients(
        lambda *t: chunk_attention(*t, ends, lead, doc_ids, backend="reference"), exact
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        if b.abs().max() > 1e-4:  # one visible key alone has no gradient in q and k
            assert relative(a, b) < DTYPES[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [1, 2, 31, 33, 65, 300])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_chunk_scan_is_its_reference(dtype, seq, rate):
    x = torch.randn(2, seq, 4, 16, device="cuda", dtype=dtype)
    dt = torch.rand(2, seq, 4, device="cuda")
    A = -torch.rand(4, device="cuda") * 2
    B, C = (torch.randn(2, seq, 2, 8, device="cuda", dtype=dtype) for _ in range(2))
    D, h = torch.randn(4, device="cuda"), torch.randn(2, 4, 8, 16, device="cuda")
    starts = torch.rand(2, seq, device="cuda") < rate

    def run(backend):
        def op(x, dt, A, B, C, D, h):
            y, last = chunk_scan(x, dt, A, B, C, starts, D, h, True, backend=backend)
            return torch.cat([y.float().flatten(), last.flatten()])

        return op

    inputs = (x, dt, A, B, C, D, h)
    got = gradients(run("torch"), inputs)
    want = gradients(run("reference"), [t.float() for t in inputs])
    for name, a, b in zip(("out", "x", "dt", "A", "B", "C", "D", "h"), got, want):
        if b.abs().max() > 1e-4:
            # A's gradient is a sum over all tokens in which rounded terms cancel.
            assert relative(a, b) < DTYPES[dtype] * (5 if name == "A" else 1), name


MIXERS = {
    "chunk": {"boundary": "cyclic", "ssm_scope": "chunk"},
    "per head": {"boundary": "head_cyclic", "ssm_scope": "sequence"},
    "unbounded": {"leading_tokens": None},
    "separator": {"boundary": {"type": "separator", "tokens": [1, 2]}},
}


def model_on_cuda(name):
    options = {"leading_tokens": 8, "state_dim": 4, "ssm_heads": 2, **MIXERS[name]}
    return build({"type": "attamba", "n_heads": HEADS, "chunk_size": 4, **options}).cuda()


@pytest.mark.parametrize("name", MIXERS)
def test_decoding_is_the_full_forward(name):
    model = model_on_cuda(name)
    ids = torch.randint(VOCAB, (2, 70), device="cuda")
    full, cache = model(ids), model.new_cache(2)
    parts = [model(ids[:, :33], cache=cache)]
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(33, 70)]
    assert relative(torch.cat(parts, 1), full) < 1e-4
    assert relative(full.cpu(), model.cpu()(ids.cpu())) < 1e-4


@pytest.mark.parametrize("name", ["chunk", "per head"])
def test_compiled_training_step_is_the_eager_one(name):
    model = model_on_cuda(name).requires_grad_(True)
    ids = torch.randint(VOCAB, (2, 130), device="cuda")

    def step(forward):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    loss, grads = step(model)
    compiled_loss, compiled_grads = step(torch.compile(model, fullgraph=True))
    assert relative(compiled_loss, loss) < 1e-5
    for key, grad in grads.items():
        assert relative(compiled_grads[key], grad) < 1e-3, key


def test_bfloat16_autocast_trains():
    config = attamba.ModelConfig(vocab_size=64, dim=64, n_layers=2, mixer={"type": "attamba"})
    model = attamba.build_model(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = (torch.arange(257, device="cuda") * 7 % 64)[None].expand(4, -1)
    losses = []
    for _ in range(40):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
