"""The whole-model rows on a tiny model: what they time and what they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from npt_fast.benchmarks import whole_model
from npt_fast.benchmarks.device import DEVICE, DTYPE, ON_GPU
from npt_fast.benchmarks.kernel_timing import Ceilings
from npt_fast.benchmarks.rows import Row
from npt_fast.benchmarks.whole_model import TINY, Measurement, Size, Work, measurements, row_of
from npt_fast.hf.convert import components, decoder_layers
from npt_fast.testing import implementation
from tests.computed import record
from tests.processes import run_python

ALL = range(TINY.layers)
MIDDLE = TINY.layers // 2
F32, BF16 = torch.float32, torch.bfloat16
Open = partial[AbstractContextManager[Work]]


def decode(batch: int, layers: Any, factors: torch.dtype) -> Open:
    return partial(whole_model.decode, batch=batch, layers=layers, factors=factors)


def layer(on: bool, factors: torch.dtype) -> Open:
    return partial(whole_model.layer, tokens=5, on=on, factors=factors)


def training(autocast: bool) -> Open:
    return partial(whole_model.training, autocast=autocast)


WORKS = {
    "decode, base model": decode(3, (), F32),
    "decode, one layer": decode(1, (MIDDLE,), F32),
    "decode, one layer, bfloat16": decode(3, (MIDDLE,), BF16),
    "decode, all layers": decode(3, ALL, F32),
    "decode, all layers, bfloat16": decode(1, ALL, BF16),
    "layer, base MLP": layer(False, F32),
    "layer": layer(True, F32),
    "layer, bfloat16": layer(True, BF16),
    "training": training(False),
    "training, autocast": training(True),
}
every_work = pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)


@pytest.fixture(scope="module")
def model() -> Any:
    return whole_model.build(TINY)


@pytest.fixture
def eager_attention(model: Any) -> Iterator[None]:
    """Attention as matrix products, which torch can count."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


@pytest.mark.parametrize("tiny", [False, True])
def test_jobs_are_listed_without_a_model(tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(size: Size) -> Any:
        raise AssertionError("built")

    monkeypatch.setattr(whole_model, "build", build)
    names = [job.what for job in measurements(tiny=tiny)]
    count = 4 if tiny else 16
    ways = ["base model"] + [
        f"{layers}, factors in {factors}"
        for layers in ("1 NP layer", f"{count} NP layers")
        for factors in ("float32", "bfloat16")
    ]
    for launch, part in (("graph", names[:10]), ("eager", names[-10:])):
        assert part == [f"decode, {launch}, batch {b}, {way}" for b in (1, 16) for way in ways]
    step = "training step, 2 x 16 tokens" if tiny else "training step, 8 x 1024 tokens"
    implementations = ("gemm", "fused", "factored", "reference")
    assert names[10:18] == [
        f"{step}, {name}{autocast}" for autocast in ("", ", autocast") for name in implementations
    ]
    assert names[18:-10] == [
        f"layer alone, graph, T={tokens}, {way}"
        for tokens in (1, 16, 64)
        for way in (
            "base MLP",
            *(f"{n}, factors in {f}" for n in ("decode", "gemm", "factored")
              for f in ("float32", "bfloat16")),
        )
    ]  # fmt: skip


def test_it_needs_little_beside_torch_and_transformers() -> None:
    """A GPU machine may lack packages that only data, the command line and pictures need."""
    unneeded = {"datasets", "gguf", "cyclopts", "prompt_toolkit", "peft", "matplotlib"}
    code = "import sys, npt_fast.benchmarks.whole_model as m; m.measurements(tiny=False)"
    code += f"; m.measurements(tiny=True)[-1].run(); print({unneeded} & set(sys.modules))"
    result = run_python(code)
    assert result.stdout == "set()\n", result.stderr


def test_the_model_is_llamas() -> None:
    """1,235,814,400 parameters, as the model card of Llama-3.2-1B has them (1.24 billion)."""
    size = whole_model.REAL
    shape = size.shape
    heads = shape.hidden * (2 * size.heads + 2 * size.kv_heads) * (shape.hidden // size.heads)
    layer = heads + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    assert size.vocab * shape.hidden + size.layers * layer + shape.hidden == 1_235_814_400


@pytest.mark.slow
def test_all_of_it_runs_on_a_tiny_model() -> None:
    rows = {job.what: job.run() for job in measurements(tiny=True)}
    for what, row in rows.items():
        if "graph" in what and not ON_GPU:
            assert row == {"status": "skipped", "detail": "a CUDA graph needs a GPU"}
        else:
            assert_measured(row)


def assert_measured(row: Row) -> None:
    claims = {"of ceiling"} if ON_GPU else set()
    numbers = {"ms", "p20", "p80", "tokens/s", "GB/s", "TFLOP/s"} | claims
    assert set(row) - {"peak MB"} == numbers
    assert 0 < row["p20"] <= row["ms"] <= row["p80"]
    assert all(row[name] > 0 for name in numbers)


def find(name: str) -> Measurement:
    (job,) = (job for job in measurements(tiny=True) if job.what == name)
    return job


@pytest.mark.parametrize("name", ["gemm", "fused", "factored", "reference"])
def test_a_training_step_is_computed_as_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = record(monkeypatch)
    assert_measured(find(f"training step, 2 x 16 tokens, {name}").run())
    assert set(taken) == {name}


@pytest.mark.skipif(ON_GPU, reason="without a GPU")
def test_kernels_are_skipped_where_nothing_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "RUNS_TRITON", False)
    row = find("training step, 2 x 16 tokens, fused").run()
    reason = "Triton's kernels need a GPU, or TRITON_INTERPRET=1 from the start"
    assert row == {"status": "skipped", "detail": reason}
    assert_measured(find("training step, 2 x 16 tokens, factored").run())


@every_work
def test_products_are_counted_as_torch_counts_them(work: Open, eager_attention: None) -> None:
    with work(TINY) as (call, _, flops, _), implementation("factored"):
        with FlopCounterMode(display=False) as counter:
            call()
    # older versions of transformers multiply matrices for the angles of positions
    counts = counter.get_flop_counts().items()
    angles = sum(sum(by.values()) for name, by in counts if name.endswith(".rotary_emb"))
    masked = 0
    if work.func is whole_model.training:
        # eager attention also computes what the mask then hides: the upper triangle, by products
        # with keys and with values, in all layers up to the one in the middle
        hidden = TINY.length * (TINY.length - 1) // 2
        masked = (MIDDLE + 1) * TINY.windows * hidden * 2 * 2 * TINY.shape.hidden
    assert counter.get_total_flops() - angles - masked == flops


class Reads(TorchDispatchMode):
    """Bytes of tensors that existed before, each once, and bytes that AdamW reads and writes.

    Attributes:
        seen: address of a storage -> bytes; 0 if an operation made it.
        optimizer: bytes that AdamW moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.optimizer = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._fused_adamw_.default:
            weights, gradients, *moments = (sum(t.nbytes for t in group) for group in args[:4])
            read = weights + gradients + sum(moments)
            self.optimizer += (
                read + weights + sum(moments) + gradients
            )  # gradients were written by backward
            return function(*args, **(kwargs or {}))
        self._note(args, lambda tensor: tensor.untyped_storage().nbytes())
        self._note(kwargs, lambda tensor: tensor.untyped_storage().nbytes())
        result = function(*args, **(kwargs or {}))
        self._note(result, lambda _: 0)
        return result

    def _note(self, values: Any, size: Callable[[torch.Tensor], int]) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.setdefault(value.untyped_storage().data_ptr(), size(value))


@every_work
def test_bytes_are_what_a_call_reads(work: Open, model: Any) -> None:
    inner = model.get_decoder()
    with work(TINY) as (call, tokens, _, moved), implementation("factored"):
        call()  # creates the moments
        with Reads() as reads:
            call()
    left_out = 0
    if work.func is whole_model.layer:  # its x and h share one storage
        left_out += 2 * tokens * TINY.shape.hidden * DTYPE.itemsize
    else:
        left_out += inner.rotary_emb.inv_freq.nbytes
    if work.func is whole_model.training:
        # tokens' embeddings, a norm of which nothing comes, AdamW's six counts of its steps, the
        # usual square of an attention output
        left_out += inner.embed_tokens.weight.nbytes + inner.norm.weight.nbytes + 7 * F32.itemsize
    assert sum(reads.seen.values()) + reads.optimizer - left_out == moved


@pytest.mark.parametrize("factors", [F32, BF16])
@pytest.mark.parametrize("layers", [(), (MIDDLE,), ALL])
def test_decoding_gives_the_last_token_again_and_again(
    layers: Any, factors: torch.dtype, model: Any
) -> None:
    torch.manual_seed(1)
    with decode(2, layers, factors)(TINY) as (call, *_):
        found = [call() for _ in range(3)]
    torch.manual_seed(1)
    ids = torch.randint(TINY.vocab, (2, TINY.context), device=DEVICE)
    with whole_model.arranged(model, layers, factors), torch.no_grad():
        expected = model(ids).logits[:, -1:]
    with whole_model.arranged(model, (), F32), torch.no_grad():
        base = model(ids).logits[:, -1:]
    eps = 32 * torch.finfo(DTYPE).eps
    for logits in found:
        assert (logits - expected).norm() < eps * expected.norm()
    assert torch.equal(expected, base) == (not layers)


def snapshot(model: Any) -> dict[str, Any]:
    tensors = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    enabled = [part.enabled for part in components(model).values()]
    forwards = [layer.forward for layer in decoder_layers(model)]
    return {"tensors": tensors, "enabled": enabled, "forwards": forwards}


@every_work
def test_the_model_is_as_before(work: Open, model: Any) -> None:
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in between"), work(TINY) as (call, *_):
        call()
        raise RuntimeError("in between")
    after = snapshot(model)
    for name, (tensor, wanted) in before.pop("tensors").items():
        now, wants = after["tensors"][name]
        assert now.dtype == tensor.dtype and torch.equal(now, tensor) and wants == wanted, name
    del after["tensors"]
    assert after == before


def test_no_gradients_are_left_of_a_step_that_fails(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    with training(False)(TINY) as (call, *_):
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(torch.OutOfMemoryError):
            call()
        assert any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_training_step_trains() -> None:
    with training(False)(TINY) as (call, *_):
        component = components(whole_model.build(TINY))[MIDDLE]
        first = component.w_b_gate.detach().clone()
        call()
        assert not torch.equal(component.w_b_gate, first)


WORK = Work(lambda: None, tokens=10, flops=6_000_000_000, bytes=3_000_000)


def test_rates_follow_from_the_times() -> None:
    row = row_of(WORK, [4.0, 1.0, 2.0, 3.0, 5.0], None)
    assert (row.pop("p20"), row.pop("ms"), row.pop("p80")) == pytest.approx((1.8, 3.0, 4.2))
    assert row == pytest.approx({"tokens/s": 10 / 3e-3, "GB/s": 1.0, "TFLOP/s": 2.0})


@pytest.mark.parametrize(
    ("limits", "share"), [(Ceilings(4e9, 1e15), 0.25), (Ceilings(1e15, 4e12), 0.5)]
)
def test_share_of_the_ceiling_that_is_reached_first(limits: Ceilings, share: float) -> None:
    assert row_of(WORK, [3.0, 3.0], limits)["of ceiling"] == pytest.approx(share)
