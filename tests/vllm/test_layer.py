"""NP layers of an engine are as defined, in float64: whole, and in parts on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.functional import silu

from npt_fast.functional import modulated_mlp
from npt_fast.hf.families import candidates
from npt_fast.modules import NPComponent
from npt_fast.vllm.factors import ShardedFactors
from npt_fast.vllm.layer import DeferringLayer, NPLayer, np_layer_class
from tests.forked import forkserver

D, F = 16, 24
CASES = [("single", "kept"), ("dual", "removed"), ("triple", "removed"), ("triple", "kept")]


class Norm(nn.Module):
    """An RMS norm that adds to the residual stream if it gets one, as vLLM's do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None:
            x = residual = x + residual
        normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight
        return normed if residual is None else (normed, residual)


class Attention(nn.Module):
    """Any function of the tokens so far."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states.cumsum(-2).tanh() + positions[:, None]


class Projection(nn.Module):
    """Returns its output and a bias that it has not added, as vLLM's do."""

    def __init__(self, weight: Tensor, group: Any = None) -> None:
        super().__init__()
        self.weight, self.group = nn.Parameter(weight), group

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y = x @ self.weight.t()
        if self.group is not None:
            dist.all_reduce(y, group=self.group)
        return y, None


class Layer(nn.Module):
    """The parts of a decoder layer of vLLM, this process's part of the MLP."""

    def __init__(self, shard: int, shards: int) -> None:
        super().__init__()
        weights = torch.randn(3, F, D, dtype=torch.float64, generator=seeded(1)) / 4
        gate, up, down = (weight.chunk(shards)[shard] for weight in weights)
        self.input_layernorm = Norm(torch.rand(D, dtype=torch.float64, generator=seeded(2)))
        self.post_attention_layernorm = Norm(
            torch.rand(D, dtype=torch.float64, generator=seeded(3))
        )
        self.self_attn = Attention()
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = Projection(torch.cat((gate, up)))
        self.mlp.down_proj = Projection(down.t(), dist.group.WORLD if shards > 1 else None)
        self.mlp.act_fn = swiglu  # type: ignore[assignment]


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def component(modulation: str, residual: str) -> NPComponent:
    part = NPComponent(D, F, rank=3, num_ranks=2, modulation=modulation, residual=residual).double()
    for number, parameter in enumerate(part.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=seeded(10 + number))
    return part.requires_grad_(False)


def make_np_layer(layer: Any, own: type[NPLayer] = DeferringLayer) -> None:
    layer.np_block = candidates(layer)[0]
    layer.__class__ = np_layer_class(own, type(layer))


@torch.no_grad()
def check(modulation: str, residual: str, shard: int = 0, shards: int = 1) -> None:
    def reduce(tensor: Tensor) -> Tensor:
        if shards > 1:
            dist.all_reduce(tensor)
        return tensor

    part, layer = component(modulation, residual), Layer(shard, shards)
    layer.np_factors = ShardedFactors(
        part, device="cpu", dtype=torch.float64, shard=shard, shards=shards, reduce=reduce
    )
    make_np_layer(layer)
    positions = torch.arange(5)
    given = torch.randn(2, 5, D, dtype=torch.float64, generator=seeded(4))
    for states, stream in ((given[0], None), (given[0], given[1])):
        h = states if stream is None else states + stream
        whole = Layer(0, 1)
        x = whole.self_attn(positions, whole.input_layernorm(h))
        gate, up = whole.mlp.gate_up_proj.weight.chunk(2)
        change = modulated_mlp(
            x, whole.post_attention_layernorm(h), gate, up, whole.mlp.down_proj.weight,
            part.factors, impl="reference",
        )  # fmt: skip
        expected = h + change + (x if residual == "kept" else 0)
        found, residual_stream = layer(positions, states.clone(), stream)
        torch.testing.assert_close(found + residual_stream, expected, rtol=1e-12, atol=1e-12)
        base = whole.mlp.down_proj(swiglu(whole.mlp.gate_up_proj(
            whole.post_attention_layernorm(h))[0]))[0]  # fmt: skip
        assert not torch.allclose(change, base)


@pytest.mark.parametrize(("modulation", "residual"), CASES)
def test_a_layer_is_as_defined(modulation: str, residual: str) -> None:
    check(modulation, residual)


def work(shard: int, store: str, shards: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=shard, world_size=shards)
    for case in CASES:
        check(*case, shard=shard, shards=shards)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 3])
def test_a_sharded_layer_is_as_defined(shards: int, tmp_path: Path) -> None:
    forkserver()
    mp.start_processes(
        work, (str(tmp_path / "store"), shards), nprocs=shards, start_method="forkserver"
    )


def np_layer(modulation: str, residual: str) -> Any:
    layer = Layer(0, 1)
    part = component(modulation, residual)
    layer.np_factors = ShardedFactors(part, device="cpu", dtype=torch.float64)
    make_np_layer(layer)
    return layer


@torch.no_grad()
def run(layers: Sequence[Any], states: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
    for layer in layers:
        states, stream = layer(torch.arange(5), states, stream)
    assert stream is not None
    return states, stream


def stage(rank: int, store: str) -> None:
    """Half of a pipeline: what a layer returns goes on in another process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    layers = [np_layer(*case) for case in CASES]
    given = torch.randn(5, D, dtype=torch.float64, generator=seeded(4))
    if rank == 0:
        for tensor in run(layers[:2], given, None):
            dist.send(tensor, 1)
    else:
        received = torch.empty_like(given), torch.empty_like(given)
        for tensor in received:
            dist.recv(tensor, 0)
        torch.testing.assert_close(
            run(layers[2:], *received), run(layers, given, None), rtol=0, atol=0
        )
    dist.destroy_process_group()


@pytest.mark.slow
def test_layers_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    forkserver()
    mp.start_processes(stage, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver")


def test_int8_factors_become_floats() -> None:
    whole = component("triple", "removed").float()
    whole.quantize()
    dense = whole.factors.w_down.dense()  # type: ignore[union-attr]
    found = ShardedFactors(whole, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(found.w_down, dense.bfloat16())
    assert not list(found.parameters()) and not found.state_dict()


def test_parts_are_small() -> None:
    """Only what is as wide as the model is on every device."""
    whole = component("triple", "removed")
    options: Any = {"device": "cpu", "dtype": torch.float64, "shards": 3}
    parts = [ShardedFactors(whole, shard=shard, **options) for shard in range(3)]
    shapes = {name: tuple(tensor.shape) for name, tensor in parts[0].named_buffers()}
    assert shapes == {
        "w_down": (D, 18), "w_a_in": (12, D), "w_b_down": (6, D),
        "w_a_mid": (6, 8), "w_b_gate": (6, 8), "w_b_up": (6, 8),
    }  # fmt: skip
    joined = torch.cat([part.w_b_up for part in parts], 1)
    assert whole.w_b_up is not None and torch.equal(joined, whole.w_b_up)
