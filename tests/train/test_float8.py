"""Training in float8: its products, gradients and losses, what it leaves alone, and errors.

The CPU has the float8 products of torchao's recipes too, slowly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from meshes import run_on
from ranks import on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attamba
from attamba.config import ConfigError, ModelConfig, RunConfig
from attamba.data import Batch, MissingPackageError
from attamba.models import Decoder, build_model
from attamba.train import TrainingInterrupted, train
from attamba.train.distributed import open_ranks
from attamba.train.float8 import check_float8, use_float8
from attamba.train.parallelize import parallelize

RECIPES = ["tensorwise", "rowwise"]
ATTAMBA = {"type": "attamba", "n_heads": 2, "chunk_size": 4, "leading_tokens": 5, "state_dim": 8}


@pytest.fixture(scope="module")
def torchao() -> None:
    pytest.importorskip("torchao.float8")


@pytest.fixture
def on_any_device(torchao, monkeypatch) -> None:
    """Lets a run use the float8 products of the CPU."""
    monkeypatch.setattr("attamba.train.loop.check_float8", lambda config, device: None)


def model_of(**fields: Any) -> Decoder:
    torch.manual_seed(0)
    base = {"vocab_size": 48, "dim": 32, "n_layers": 1, "mixer": {**ATTAMBA, "ssm_heads": 2}}
    return build_model(ModelConfig(**{**base, **fields}))


class Float8Products(TorchDispatchMode):
    """Shapes of the factors of float8 products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__module__.startswith("torchao") for kind in types):
            return NotImplemented  # they know how to be multiplied, and come back as their parts
        if func is torch.ops.aten._scaled_mm.default:
            self.shapes.append((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None, power: bool) -> Tensor:
    """x in float8, back in float64; one scale for all of x, or for each row along `dim`."""
    x = x.double()
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest
    scale = 2.0 ** scale.log2().floor() if power else scale
    return (x * scale).float().to(dtype).double() / scale


def expected(x: Tensor, w: Tensor, g: Tensor, recipe: str) -> tuple[Tensor, Tensor, Tensor]:
    """x W^T and, with the output's gradient g, the gradients of x and W."""
    by_row = recipe == "rowwise"
    e4m3 = torch.float8_e4m3fn
    of_g = e4m3 if by_row else torch.float8_e5m2

    def q(t: Tensor, summed: int, dtype: torch.dtype = e4m3) -> Tensor:
        return rounded(t, dtype, summed if by_row else None, by_row)

    out = q(x, 1) @ q(w, 1).t()
    dx = q(g, 1, of_g) @ q(w, 0)
    dw = q(g, 0, of_g).t() @ q(x, 0)
    return out, dx, dw


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_float8(torchao, recipe):
    model = model_of()
    use_float8(model, recipe)
    linear = model.layers[0].get_submodule("ffn.w13")
    torch.manual_seed(1)
    x = (torch.randn(21, 32) * torch.rand(21, 1) * 4).requires_grad_()
    g = torch.randn(21, 192).bfloat16().float()
    out = linear(x)
    out.backward(g)
    assert linear.weight.grad.dtype == torch.float32
    w = linear.weight.detach()
    exact = (x @ w.t(), g @ w, g.t() @ x)
    for got, want, plain in zip(
        (out, x.grad, linear.weight.grad), expected(x.detach(), w, g, recipe), exact
    ):
        error = (got.double() - want).norm() / want.norm()
        assert error < 4e-3, "more than bfloat16 sums"
        assert 0.01 < (got - plain).norm() / plain.norm() < 0.08


def test_what_is_in_float8(torchao):
    """Linear maps of layers whose widths 16 divides; parameters are the same objects."""
    model = model_of(dim=48, ffn_dim=72, mixer={**ATTAMBA, "ssm_heads": 2})
    before = dict(model.named_parameters())
    names = use_float8(model, "rowwise")
    # Not the compressors' 132 outputs and w2's 72 inputs.
    assert names == ["layers.0.mixer.wq", "layers.0.mixer.wo", "layers.0.ffn.w13"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    with Float8Products() as products:
        model(torch.randint(0, 48, (2, 9))).sum().backward()
    assert len(products.shapes) == 3 * 3


def test_half_of_a_layer_may_not_fit(torchao):
    assert "layers.0.ffn.w2" in use_float8(model_of(), "tensorwise", tensor=2)
    names = use_float8(model_of(), "tensorwise", tensor=4)
    assert "layers.0.mixer.wq" not in names  # 8 of its rows on each of 4 ranks


@pytest.mark.parametrize(
    "mixer", [{**ATTAMBA, "ssm_heads": 8}, {"type": "mingru"}, {"type": "hawk"}]
)
def test_any_number_of_tokens_fits_the_card(torchao, mixer):
    """CUDA takes no other second factors than those of widths that 16 divides."""
    model = model_of(mixer={**mixer, "n_blocks": 4} if mixer["type"] == "hawk" else mixer)
    use_float8(model, "tensorwise")
    with Float8Products() as products:
        model(torch.randint(0, 48, (3, 7))).sum().backward()
    assert products.shapes
    for _, (inner, outer) in products.shapes:
        assert inner % 16 == outer % 16 == 0


@pytest.mark.parametrize(
    "mixer", [{**ATTAMBA, "ssm_heads": 2}, {"type": "transformer", "n_heads": 2}]
)
def test_only_training_is_in_float8(torchao, mixer):
    """Validation and decoding are, bit for bit, those of the weights that a checkpoint has."""
    model, plain = model_of(mixer=mixer), model_of(mixer=mixer)
    use_float8(model, "tensorwise")
    ids = torch.randint(0, 48, (2, 12))
    assert not torch.equal(model(ids), plain(ids))
    model.eval()
    assert torch.equal(model(ids), plain(ids))
    with Float8Products() as products:
        got = attamba.generate(model.train(), ids, max_new_tokens=8, temperature=0.0)
    assert torch.equal(got, attamba.generate(plain, ids, max_new_tokens=8, temperature=0.0))
    assert not products.shapes


def test_selective_does_not_multiply_again(torchao, make_config):
    counts = []
    for kind in ("none", "selective", "full"):
        change = {"parallel.activation_checkpointing": kind, "train.float8": "tensorwise"}
        model = model_of()
        forward = parallelize(model, None, make_config(change))
        loss = forward(torch.randint(0, 48, (2, 12))).sum()
        with Float8Products() as products:
            loss.backward()
        counts.append(len(products.shapes))
    none, selective, full = counts
    assert none == selective < full


def test_a_map_compiles_in_one_graph(torchao):
    model = model_of()
    use_float8(model, "rowwise")
    linear = model.layers[0].get_submodule("mixer.wq")
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 32)
    assert torch.equal(compiled(x), linear(x))
    linear.eval()
    assert torch.allclose(compiled(x), x @ linear.weight.t(), atol=1e-5)


def losses(config: RunConfig) -> dict[int, float]:
    records = train(config).metrics
    return {r["step"]: r.get("loss", r.get("valid_loss")) for r in records if r["kind"] == "train"}


FOLLOWED = {"train.steps": 24, "train.dtype": "bfloat16", "train.eval_every": 0}
FOLLOWED |= {"data.seq_len": 32}


@pytest.fixture(scope="module")
def followed(config_in, tmp_path_factory) -> dict[int, float]:
    """Losses in bfloat16."""
    return losses(config_in(tmp_path_factory.mktemp("followed"), FOLLOWED))


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_follows_bfloat16(on_any_device, make_config, followed, recipe):
    want = followed
    config = make_config({**FOLLOWED, "train.float8": recipe}, out=recipe)
    got = losses(config)
    assert got != want and got[24] < 0.8 * got[1]
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=0.03), step


def test_checkpoints_know_nothing_of_it(on_any_device, make_config):
    """Names, shapes and types are those of any run; what goes on from them repeats itself."""
    change = {"train.steps": 4, "train.dtype": "bfloat16"}
    plain, _ = attamba.load(train(make_config(change, out="bfloat16")).run_dir)
    change["train.float8"] = "rowwise"
    straight = losses(make_config(change, out="straight"))
    config = make_config(change, out="stopped")
    with pytest.raises(TrainingInterrupted):
        train(config, should_stop=lambda: True)
    assert losses(config) == straight and len(straight) == 4
    model, _ = attamba.load(config.out)
    tensors = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (model, plain)]
    assert tensors[0] == tensors[1]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def on_card(monkeypatch, capability: tuple[int, int], name: str) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return torch.device("cuda:0")


def test_where_there_is_no_float8(make_config, monkeypatch):
    config = make_config({"train.float8": "rowwise", "train.dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"train\.float8=rowwise needs .* 8\.9 .* on cpu; set"):
        train(config)
    card = on_card(monkeypatch, (8, 0), "A100")
    with pytest.raises(ConfigError, match=r"on A100 \(8\.0\); set train\.float8=none"):
        check_float8(config, card)
    check_float8(make_config(), card)
    card = on_card(monkeypatch, (8, 9), "L4")
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(MissingPackageError, match=r"torchao is not .* 'attamba\[float8\]'"):
        check_float8(config, card)


def test_what_cannot_be_asked_for(torchao, make_config):
    with pytest.raises(
        ConfigError, match=r"float8='fp8' must be one of: none, tensorwise, rowwise"
    ):
        make_config({"train.float8": "fp8"})
    with pytest.raises(ConfigError, match=r"float8=rowwise needs train\.dtype=bfloat16"):
        make_config({"train.float8": "rowwise"}).validate()
    with pytest.raises(ConfigError, match=r"no linear map .* multiple of 16, or"):
        use_float8(model_of(dim=24, ffn_dim=40), "rowwise")
    with pytest.raises(ConfigError, match=r"each of parallel\.tensor=8 ranks .* multiple of 128"):
        use_float8(model_of(mixer={"type": "transformer", "n_heads": 8}, ffn_dim=32), "rowwise", 8)


def gradients_of_all(configs: list[RunConfig]) -> list[dict[str, Tensor]]:
    """Of each run, loss and gradients of one batch, whole; and how many products were in float8."""
    found = []
    for config in configs:
        draw = np.random.default_rng(3)
        inputs = draw.integers(0, 8, (config.data.batch_size, config.data.seq_len))
        targets = inputs * 5 % 8  # what can be learnt has gradients that stand out of the rounding
        batch = Batch(inputs, targets, np.zeros_like(inputs))
        with open_ranks(config) as ranks:
            i, n = ranks.share
            own = slice(i * len(inputs) // n, (i + 1) * len(inputs) // n)
            batch = Batch(inputs[own], targets[own], batch.doc_ids[own])
            run = run_on(config, ranks)
            with Float8Products() as products:
                loss = run.gradients(run.send(batch))
            tensors = {"loss": loss, "n": torch.tensor(len(products.shapes))}
            for name, parameter in run.model.named_parameters():
                grad = parameter.grad
                tensors[name] = grad if ranks.alone else grad.full_tensor()
            found.append({name: tensor.clone() for name, tensor in tensors.items()})
    return found


LINEAR = ("wq.weight", "wo.weight", "in_proj.weight", "w13.weight", "w2.weight")
MESHES: list[dict[str, Any]] = [
    {"parallel.shard": 2},
    {"parallel.shard": 2, "parallel.gather_dtype": "bfloat16"},
    {"parallel.context": 2, "parallel.activation_checkpointing": "full"},
    {"parallel.tensor": 2, "parallel.activation_checkpointing": "selective"},
]


@pytest.fixture(scope="module")
def meshed(torchao, config_in, tmp_path_factory) -> Callable[[str], Any]:
    """meshed(recipe): gradients of one process in float8, in float32, and of each rank in MESHES.

    The same ranks work on both recipes: they begin once.
    """
    folder = tmp_path_factory.mktemp("meshed")
    base = {"train.dtype": "bfloat16", "data.seq_len": 24}
    base |= {"data.batch_size": 16, "model.n_layers": 2, "optim.grad_clip": 0.0}
    same = [{**base, "train.float8": recipe} for recipe in RECIPES]
    configs = [config_in(folder, {**change, **mesh}) for change in same for mesh in MESHES]
    several = on_ranks(2, gradients_of_all, configs, timeout=240)
    alone = gradients_of_all([config_in(folder, change) for change in same])
    (exact,) = gradients_of_all([config_in(folder, {**base, "train.dtype": "float32"})])

    def of(recipe: str) -> tuple[Any, Any, list[Any]]:
        i, n = RECIPES.index(recipe), len(MESHES)
        return alone[i], exact, [rank[i * n : (i + 1) * n] for rank in several]

    return of


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_mesh(torchao, meshed, recipe):
    """Ranks scale their own parts, so gradients agree to the rounding of float8, not of sums."""
    one, plain, several = meshed(recipe)
    one, plain = dict(one), dict(plain)
    assert plain.pop("n") == 0
    assert one.pop("n") > 0
    for mesh, *ranks in zip(MESHES, *several):
        for found in ranks:
            assert found.pop("n") > 0
        for found in (one, *ranks):
            assert found.keys() == plain.keys()
            assert found["loss"] == pytest.approx(float(plain["loss"]), rel=0.02)
            assert all(torch.equal(found[key], ranks[0][key]) for key in plain if found is not one)
        for found in (one, ranks[0]):
            for key, tensor in plain.items():
                error = (found[key] - tensor).norm() / tensor.norm()
                # Gradients of rates and gains are small, and this rounding is much in them.
                assert error < 0.5 or not key.endswith(LINEAR), (mesh, key, error)
            whole = [torch.cat([g[key].flatten() for key in plain]) for g in (plain, found)]
            assert 0.02 < (whole[1] - whole[0]).norm() / whole[0].norm() < 0.2, mesh
