"""Compilation, checkpointing, gradients of each output, seeds: what happens around the custom ops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ring_core import autograd, join_shards, plan_packed, ring_attention, shard_sequence
from ring_core.layout import LAYOUTS
from ring_core.testing import attention_oracle, compare
from ring_core.testing.plugin import RunRanks


def leaves(length: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, length, heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))  # type: ignore[return-value]


# --- torch.compile


def compiled(layout: Any, schedule: Any) -> dict[str, Any]:
    """Around the attention: something for the compiler to fuse, in both directions."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(dist.get_rank())

    def layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ring_attention(
            torch.tanh(q) * 2, k + 1, v * 3, causal=True, layout=layout, schedule=schedule, return_lse=True
        )
        return torch.sin(out), lse * 2

    fast = torch.compile(layer, fullgraph=True)
    worst = 0.0
    for length in (16, 24, 40, 8):
        q, k, v = leaves(length)
        results = []
        for function in (layer, fast):
            out, lse = function(q, k, v)
            results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))])
        for eager, graph in zip(*results, strict=True):
            worst = max(worst, compare(graph, eager).relative)
    counters = torch._dynamo.utils.counters
    return {
        "worst": worst,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


@pytest.mark.parametrize(("layout", "schedule"), [("zigzag", "ring"), ("contiguous", "gather")])
def test_compile_on_two_ranks(ranks: RunRanks, layout: str, schedule: str) -> None:
    """Inductor, forward and backward, four lengths: one graph for the first, one for all others."""
    for result in ranks(2, compiled, layout, schedule, timeout=240):
        assert result["worst"] < 1e-6, result
        assert result["breaks"] == 0 and result["graphs"] <= 2, result


def test_compile_all_options_at_world_size_1() -> None:
    """Every argument goes through Dynamo."""
    torch._dynamo.reset()

    def layer(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return ring_attention(
            q, k, v,
            window_size=(5, 2), softmax_scale=0.3, softcap=4.0, sinks=sinks, alibi_slopes=slopes, dropout_p=0.2,
            dropout_seed=3, total_length=14, layout="zigzag", return_lse=True, deterministic=True,
        )  # fmt: skip

    tensors = (*leaves(), torch.randn(4, requires_grad=True), torch.rand(4))
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out, lse = function(*tensors)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse[..., :14].sum(), tensors[:4])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- checkpointing


def checkpointed(schedule: Any, reentrant: bool) -> bool:
    torch.manual_seed(5 + dist.get_rank())
    tensors = leaves()
    dout = torch.randn(1, 16, 4, 16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, causal=True, dropout_p=0.3, schedule=schedule)

    results = []
    for function in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
        torch.manual_seed(7 + dist.get_rank())  # each rank another: the first rank's seed is the one that counts
        for x in tensors:
            x.grad = None
        function(*tensors).backward(dout)
        results.append([x.grad for x in tensors])
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_checkpoint(ranks: RunRanks, schedule: str, reentrant: bool) -> None:
    """The recomputed forward draws the same dropout mask."""
    assert ranks(2, checkpointed, schedule, reentrant) == [True, True]


# --- gradients


def test_double_backward_is_refused() -> None:
    q, k, v = leaves()
    (gradient,) = torch.autograd.grad(ring_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once; its gradient is not differentiable again"):
        gradient.sum().backward()


def partial_losses(loss: str, seed: int, schedule: Any) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(1, 12, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    dlse = torch.randn(1, 4, 12, generator=generator, dtype=torch.float64)
    given = {"dout": dout if loss != "lse" else None, "dlse": dlse if loss != "out" else None}
    truth = attention_oracle(q, k, v, causal=True, **given)
    a, b, c = (shard_sequence(x, layout="stripe").requires_grad_() for x in (q, k, v))
    out, lse = ring_attention(a, b, c, causal=True, layout="stripe", schedule=schedule, return_lse=True)
    total = torch.zeros((), dtype=torch.float64)
    if loss != "lse":
        total = total + (out * shard_sequence(dout, layout="stripe")).sum()
    if loss != "out":
        total = total + (lse * shard_sequence(dlse, layout="stripe", dim=2)).sum()
    found = torch.autograd.grad(total, (a, b, c))
    wanted = [shard_sequence(x, layout="stripe") for x in (truth.dq, truth.dk, truth.dv) if x is not None]
    return [compare(x, y).max_abs for x, y in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("loss", ["out", "lse", "both"])
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_gradients_of_each_output(ranks: RunRanks, loss: str, schedule: str, seed: int) -> None:
    for errors in ranks(2, partial_losses, loss, seed, schedule):
        assert max(errors) < 1e-12


def test_gradcheck() -> None:
    """Finite differences: the oracle is not the only witness."""
    q, k, v = (torch.randn(1, 6, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return ring_attention(q, k, v, causal=True, softcap=2.0, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, sinks))


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_gradients_of_some_inputs_only(needed: str) -> None:
    tensors = dict(zip("qkv", leaves(), strict=True))
    every = torch.autograd.grad(ring_attention(**tensors).square().sum(), list(tensors.values()))
    some = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items()}
    ring_attention(**some).square().sum().backward()
    assert all((x.grad is not None) == (name == needed) for name, x in some.items())
    expected, found = every["qkv".index(needed)], some[needed].grad
    assert found is not None and torch.equal(found, expected)


def test_backward_twice_over_a_kept_graph() -> None:
    q, k, v = leaves()
    loss = ring_attention(q, k, v).square().sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    second = torch.autograd.grad(loss, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_an_input_before_backward_is_noticed() -> None:
    q, k, v = leaves()
    x = k * 1
    loss = ring_attention(q, x, v).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- the ops as torch sees them

OP = torch.ops.ring_core.attention.default
BACKWARD_OP = torch.ops.ring_core.attention_backward.default
CALL = autograd.Call(
    scale=0.25,
    softcap=0.0,
    dropout_p=0.0,
    left=-1,
    right=0,
    q_total=-1,
    k_total=-1,
    deterministic=False,
    shared_seed=True,
    heads_at_once=0,
    layout="contiguous",
    schedule="auto",
    backend="reference",
    group_name="",
)
OPTIONS = (None, CALL.numbers, CALL.integers, *CALL.names)


def test_opcheck_forward() -> None:
    q, k, v = leaves()
    torch.library.opcheck(OP, (q, k, v, None, None, None, *OPTIONS))
    sinks, slopes = torch.randn(4, requires_grad=True), torch.rand(4)
    seed = torch.tensor([5])
    everything = CALL._replace(
        softcap=3.0, dropout_p=0.2, left=6, right=2, q_total=13, k_total=14, deterministic=True, layout="zigzag"
    )
    options = (None, everything.numbers, everything.integers, *everything.names)
    torch.library.opcheck(OP, (q, k, v, slopes, sinks, seed, *options))
    plan = plan_packed([0, 3, 3, 16], layout="balanced", causal=True)
    options = (plan.code, *OPTIONS[1:])
    torch.library.opcheck(OP, (*(x.detach()[:1].requires_grad_() for x in (q, k, v)), None, None, None, *options))
    # bf16: lse stays in fp32; strided inputs: contiguous outputs
    bf16 = [x.detach().bfloat16().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(OP, (*bf16, None, None, None, *OPTIONS))


def test_opcheck_backward() -> None:
    q, k, v = (x.detach() for x in leaves())
    out, lse, seed = OP(q, k, v, None, None, None, *OPTIONS)
    sinks = torch.randn(4)
    # Not "test_autograd_registration": that this op refuses to be differentiated is its purpose.
    tests = ("test_schema", "test_faketensor")
    for dlse, sink in ((None, None), (torch.randn_like(lse), sinks)):
        args = (torch.randn_like(out), dlse, q, k, v, out, lse, None, sink, seed, *OPTIONS)
        torch.library.opcheck(BACKWARD_OP, args, test_utils=tests)


def test_outputs_alias_nothing() -> None:
    q, k, v = leaves()
    out, lse = ring_attention(q, k, v, return_lse=True)
    found = [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))]
    storages = {x.untyped_storage().data_ptr() for x in (*found, q, k, v)}
    assert len(storages) == 8


# --- modes


def test_no_grad_and_inference_mode() -> None:
    q, k, v = leaves()
    expected = ring_attention(q, k, v, causal=True)
    with torch.no_grad():
        out = ring_attention(q, k, v, causal=True)
    assert not out.requires_grad and torch.equal(out, expected)
    with torch.inference_mode():
        out = ring_attention(q, k, v, causal=True)
        assert out.is_inference() and torch.equal(out, expected)
        assert torch.equal(ring_attention(q.clone(), k.clone(), v.clone(), causal=True), expected)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(32, 3 * 32)
        self.sinks = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return ring_attention(q, k, v, causal=True, sinks=self.sinks).flatten(-2)


def test_deepcopy() -> None:
    layer, x = Layer(), torch.randn(1, 8, 32)
    twin = copy.deepcopy(layer)
    for module in (layer, twin):
        module(x).sum().backward()
    assert torch.equal(layer(x), twin(x))
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    assert torch.equal(copy.deepcopy(layer(x).detach()), layer(x))


def test_autocast_to_bf16() -> None:
    """What autocast made bf16 stays it; lse stays fp32."""
    layer, x = Layer(), torch.randn(1, 8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.sinks.grad is not None


# --- dropout


def dropped(layout: Any, schedule: Any, seed: int, dropout_seed: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 16, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    q, k, v = (shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v))
    out = ring_attention(q, k, v, layout=layout, schedule=schedule, dropout_p=0.5, dropout_seed=dropout_seed)
    return torch.cat([out, *torch.autograd.grad(out.square().sum(), (q, k, v))], dim=2).detach()


def test_one_dropout_mask_for_any_number_of_ranks(ranks: RunRanks, seed: int) -> None:
    expected = dropped("contiguous", "auto", seed, -77)
    assert compare(dropped("contiguous", "auto", seed, 78), expected).relative > 0.1, "no seed, no test"
    for layout in LAYOUTS:
        for world_size, schedule in ((1, "auto"), (2, "gather"), (4, "ring")):
            shards = ranks(world_size, dropped, layout, schedule, seed, -77)
            whole = join_shards(shards, layout=layout)  # type: ignore[arg-type]
            assert compare(whole, expected).max_abs < 1e-12, (layout, world_size)


def drawn_on_three(seed: int) -> tuple[Tensor, Tensor, int]:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 4, heads, 8, generator=generator) for heads in (4, 2, 2))
    torch.manual_seed(seed + rank)
    drawn = ring_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(seed)
    first = int(torch.randint(0, 2**62, (1,), dtype=torch.int64))
    return drawn, ring_attention(q, k, v, dropout_p=0.5, dropout_seed=first), first


def test_a_drawn_seed_is_the_first_ranks(ranks: RunRanks, seed: int) -> None:
    for drawn, expected, _ in ranks(3, drawn_on_three, seed):
        assert torch.equal(drawn, expected)


def test_dropout_keeps_the_mean_and_the_rate() -> None:
    """Uniform attention to values of 1: each row is the share kept, scaled; over many rows the mean is 1."""
    q, k, v = torch.zeros(1, 256, 2, 8), torch.zeros(1, 256, 2, 8), torch.ones(1, 256, 2, 8)
    out = ring_attention(q, k, v, dropout_p=0.25, dropout_seed=9)
    assert abs(float(out.mean()) - 1) < 0.01  # 131,072 draws: four standard deviations are 0.0064
    assert 0.02 < float(out[..., 0].std()) < 0.06
