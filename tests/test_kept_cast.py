"""Casts of float32 parameters to the activations' 16 bits: made once, and never out of date."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from npt_fast.kept_cast import KeptCast, drop_copies
from npt_fast.modules import NPComponent
from npt_fast.testing import ParameterCasts
from tests.hf.test_convert import PROMPT, converted, logits

D, F = 16, 24
BF16 = torch.bfloat16


def component() -> NPComponent:
    torch.manual_seed(0)
    part = NPComponent(D, F, rank=4, num_ranks=2)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    return part


def mlp(dtype: torch.dtype = BF16) -> Any:
    torch.manual_seed(1)
    part = nn.Module()
    part.gate_proj, part.up_proj = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
    part.down_proj = nn.Linear(F, D, bias=False)
    return part.to(dtype).requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(3, D).to(BF16), torch.randn(3, D).to(BF16)


def hooked() -> Any:
    """An MLP that is called as a module: the component adds to its projections' outputs."""
    part = mlp()
    part.gate_proj.register_forward_hook(lambda *_: None)
    return part


WAYS: dict[str, Callable[[], Any]] = {"fused": mlp, "called": hooked}


@torch.no_grad()
def output(part: NPComponent, base: Any) -> Tensor:
    return part(*inputs(), base)


def truth(part: NPComponent, base: Any) -> Tensor:
    """The output of a component that has the parameters in 16 bits: it needs no cast."""
    plain = NPComponent(D, F, rank=4, num_ranks=2, dtype=BF16)
    plain.load_state_dict(part.state_dict())
    return output(plain, base)


def sgd_by_hand(part: NPComponent) -> None:
    for parameter in part.parameters():
        parameter.data -= 0.5


def filled(part: NPComponent) -> None:
    part.w_b_gate.data.copy_(torch.ones(8, F))


def replaced_data(part: NPComponent) -> None:
    part.w_down.data = torch.ones(D, 24)


def one_element(part: NPComponent) -> None:
    with torch.inference_mode():
        part.w_down[0] = 3.0


def halves(part: NPComponent) -> None:
    part.to(torch.float16)


def elsewhere(part: NPComponent) -> None:
    part.double().float()
    nn.init.ones_(part.w_down)


def new_parameter(part: NPComponent) -> None:
    part.w_down = nn.Parameter(torch.ones(D, 24))


def loaded(part: NPComponent, *, assign: bool) -> None:
    part.load_state_dict({n: t + 0.5 for n, t in part.state_dict().items()}, assign=assign)


def stepped(part: NPComponent, make: Any, **options: Any) -> None:
    optimizer = make(part.parameters(), lr=0.1, **options)
    for parameter in part.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def resized(part: NPComponent) -> None:
    """What FSDP2 does: frees the memory and fills it again, without a new version."""
    parameter = part.w_down
    storage = parameter.untyped_storage()
    size = storage.size()
    part.w_down = nn.Parameter(torch.zeros(1))
    storage.resize_(0)
    storage.resize_(size)
    with torch.autograd._unsafe_preserve_version_counter(parameter), torch.no_grad():
        parameter.fill_(0.5)
    part.w_down = parameter


def by_numpy(part: NPComponent) -> None:
    part.w_down.detach().numpy()[:] = 0.5
    part.eval()


WRITES: dict[str, Callable[[NPComponent], None]] = {
    "in place": lambda part: nn.init.ones_(part.w_down),
    "a detached view": lambda part: part.w_down.detach()[0].zero_(),
    ".data in place": filled,
    ".data, by hand": sgd_by_hand,
    ".data replaced": replaced_data,
    "in inference mode": one_element,
    "to another dtype": halves,
    "to a dtype and back": elsewhere,
    "another parameter": new_parameter,
    "load_state_dict": lambda part: loaded(part, assign=False),
    "load_state_dict, assign": lambda part: loaded(part, assign=True),
    "vector_to_parameters": lambda part: nn.utils.vector_to_parameters(
        torch.full((sum(p.numel() for p in part.parameters()),), 0.1), part.parameters()
    ),
    "SGD": lambda part: stepped(part, torch.optim.SGD, foreach=False),
    "SGD, foreach": lambda part: stepped(part, torch.optim.SGD, foreach=True),
    "SGD, fused": lambda part: stepped(part, torch.optim.SGD, fused=True),
    "AdamW": lambda part: stepped(part, torch.optim.AdamW, foreach=False),
    "AdamW, foreach": lambda part: stepped(part, torch.optim.AdamW, foreach=True),
    "AdamW, fused": lambda part: stepped(part, torch.optim.AdamW, fused=True),
    "freed and filled": resized,
    "an alias, then eval()": by_numpy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen_by_the_next_call(write: str, way: str) -> None:
    part, base = component(), WAYS[way]()
    before = output(part, base)
    WRITES[write](part)
    after = output(part, base)
    assert torch.equal(after, truth(part, base))
    if write != "to another dtype":
        assert not torch.equal(after, before)
    with ParameterCasts(part) as casts:
        assert torch.equal(output(part, base), after)
    assert casts.bytes == 0 or write == "to another dtype"  # float16 is no copy of float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_token_casts_no_parameter_of_a_model_after_the_first(context: Any) -> None:
    """Base in bfloat16, factors in float32, as training leaves them; a decode step of one token."""
    model = converted(layers=(0, 2, 3))
    expected = logits(copy.deepcopy(model).to(BF16))
    for layer in model.model.layers:
        layer.self_attn.to(BF16), layer.input_layernorm.to(BF16)
        layer.post_attention_layernorm.to(BF16), layer.mlp.to(BF16)
    model.model.embed_tokens.to(BF16), model.model.norm.to(BF16), model.lm_head.to(BF16)
    held = [p for p in model.parameters() if p.dtype == torch.float32]
    counts = []
    with context():
        out = model(PROMPT, use_cache=True)
        drop_copies()
        for token in range(3):
            with ParameterCasts(model) as casts:
                out = model(PROMPT[:, token : token + 1], past_key_values=out.past_key_values)
            counts.append((casts.count, casts.bytes))
    assert counts == [(len(held), 6 * sum(p.numel() for p in held)), (0, 0), (0, 0)]
    assert torch.equal(logits(model), expected)


def test_frozen_parameters_are_cast_once_where_inputs_want_gradients() -> None:
    part, base = component().requires_grad_(False), mlp()
    x, h = (tensor.requires_grad_() for tensor in inputs())
    part(x, h, base).sum().backward()
    assert x.grad is not None and h.grad is not None
    with ParameterCasts(part) as casts:
        part(x, h, base)
    assert casts.count == 0


def test_a_copy_of_inference_mode_serves_a_call_with_gradients() -> None:
    part, base = component().requires_grad_(False), mlp()
    with torch.inference_mode():
        part(*inputs(), base)
    x, h = (tensor.requires_grad_() for tensor in inputs())
    part(x, h, base).sum().backward()
    assert x.grad is not None


def test_parameters_of_inference_mode_are_cast_in_every_call() -> None:
    with torch.inference_mode():
        part, base = component(), mlp()
        first = part(*inputs(), base)
        part.w_b_gate.mul_(2)
        second = part(*inputs(), base)
        assert torch.equal(second, truth(part, base)) and not torch.equal(first, second)


def test_there_is_one_set_of_copies() -> None:
    kept, parameter = KeptCast(), nn.Parameter(torch.randn(4, 4))
    [first] = kept([parameter], BF16)
    [half] = kept([parameter], torch.float16)
    assert half is not None and half.dtype == torch.float16
    [again] = kept([parameter], BF16)
    assert again is not first and torch.equal(again, parameter.to(BF16))  # type: ignore[arg-type]


def test_a_parameter_of_the_dtype_is_taken_itself() -> None:
    kept = KeptCast()
    wide, half = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4).to(BF16))
    copied, missing, own = kept([wide, None, half], BF16)
    assert missing is None and own is not None and copied is not None
    assert own.data_ptr() == half.data_ptr()
    assert not own.requires_grad and not copied.requires_grad


def test_two_modules_may_share_a_parameter() -> None:
    one, two, parameter = KeptCast(), KeptCast(), nn.Parameter(torch.randn(4))
    one([parameter], BF16), two([parameter], BF16)
    parameter.data.fill_(7)
    assert one([parameter], BF16)[0].sum() == 28  # type: ignore[union-attr]
    assert two([parameter], BF16)[0].sum() == 28  # type: ignore[union-attr]


def test_copies_and_pickles_of_a_component_have_nothing_of_the_casts() -> None:
    part, base = component(), mlp()
    output(part, base)
    twin = copy.deepcopy(part)
    thawed = pickle.loads(pickle.dumps(part))
    for other in (twin, thawed):
        assert all(type(p) is nn.Parameter for p in other.parameters())
        with torch.no_grad():
            other.w_b_gate.zero_()
        assert torch.equal(output(other, base), truth(other, base))
    output(part, base)
    assert torch.equal(output(part, base), truth(part, base))
    assert set(part.state_dict()) == {name for name, _ in part.named_parameters()}
    file = io.BytesIO()
    torch.save(dict(part.named_parameters()), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["w_down"]) is nn.Parameter


def test_optimizers_find_plain_parameters() -> None:
    """With any other class, they would take their slow path."""
    part, base = component(), mlp()
    output(part, base)
    seen = []
    optimizer = torch.optim.SGD(part.parameters(), lr=0.0)
    original = torch.optim.SGD.step.__wrapped__  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(lambda *_: seen.extend(map(type, part.parameters())))
    assert original is not None
    optimizer.step()
    assert seen and set(seen) == {nn.Parameter}


def test_threads_share_a_component() -> None:
    """As replicas do: each thread has parameters of its own, and gets the copies of those."""
    kept, wrong = KeptCast(), []

    def run(value: float) -> None:
        parameter = nn.Parameter(torch.full((4,), value))
        for _ in range(300):
            [found] = kept([parameter], BF16)
            if found is None or found.sum() != 4 * value:
                wrong.append(value)

    threads = [Thread(target=run, args=(float(value),)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_transforms_leave_no_copy_behind() -> None:
    kept, parameter = KeptCast(), nn.Parameter(torch.randn(4, 4))

    def function(x: Tensor) -> Tensor:
        return (x @ kept([parameter], BF16)[0]).sum()  # type: ignore[operator]

    torch.func.grad(function)(torch.randn(4, 4).to(BF16))
    assert kept([parameter], BF16)[0].sum().isfinite()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_has_the_cast_in_its_graph(backend: str) -> None:
    part, base = component(), mlp()
    output(part, base)  # its parameters are watched now
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(part, backend=backend, fullgraph=True)
        for write in (".data in place", "in place", "AdamW, fused", "load_state_dict"):
            assert torch.equal(compiled(*inputs(), base), truth(part, base))
            WRITES[write](part)
            assert torch.equal(compiled(*inputs(), base), truth(part, base))


@pytest.mark.parametrize("watched_first", [True, False])
def test_a_compiled_function_that_writes_data_renews_the_copy(watched_first: bool) -> None:
    kept, parameter = KeptCast(), nn.Parameter(torch.ones(4))
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def double() -> None:
        with torch.no_grad():
            parameter.data.mul_(2)

    if not watched_first:
        double()
        parameter.data.fill_(1)
    assert kept([parameter], BF16)[0].sum() == 4  # type: ignore[union-attr]
    double()
    assert kept([parameter], BF16)[0].sum() == 8  # type: ignore[union-attr]


def test_a_closure_that_calls_the_module_in_a_fused_step() -> None:
    part, base = component(), mlp()
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.1, fused=True)

    def closure() -> float:
        for parameter in part.parameters():
            parameter.grad = torch.ones_like(parameter)
        output(part, base)  # copies of the weights before the step
        return 0.0

    optimizer.step(closure)
    assert torch.equal(output(part, base), truth(part, base))


def test_fake_tensors_are_not_kept() -> None:
    part, base = component(), mlp()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        part(*map(mode.from_tensor, inputs()), base)
    assert torch.equal(output(part, base), truth(part, base))


def test_a_parameter_made_of_one_that_is_watched() -> None:
    part, base = component(), mlp()
    output(part, base)
    again = nn.Parameter(part.w_down, requires_grad=False)
    assert type(again) is nn.Parameter and again.data_ptr() == part.w_down.data_ptr()
    again.data.zero_()
    assert torch.equal(output(part, base), truth(part, base))
    output(part, base)
    assert type(part.w_down.detach()) is Tensor


@pytest.mark.parametrize("replace", ["quantize", "assign"])
def test_parameters_that_are_replaced_are_not_kept_alive(replace: str) -> None:
    part = component()
    output(part, mlp())
    before = [ref(parameter) for parameter in part.parameters()]
    if replace == "quantize":
        part.quantize()
    else:
        loaded(part, assign=True)
    assert [found() for found in before] == [None] * len(before)
