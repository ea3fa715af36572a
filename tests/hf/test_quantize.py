"""int8 factors: rounded, saved, loaded, merged, used, and refused where they cannot be used."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import npt_fast as npt
from npt_fast.hf.convert import components
from tests.hf.test_convert import PROMPT, converted, logits, tiny


def quantized() -> Any:
    return npt.quantize(converted())


def dense(model: Any) -> Any:
    """A float model with the numbers that int8 factors stand for, by the definition."""
    other = copy.deepcopy(model)
    for part in components(other).values():
        scales, numbers = part.scales, part.joined
        part.dequantize()
        for name, values in numbers.items():
            getattr(part, name).copy_((values.double() * scales[name].double()).float())
    return other


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return npt.save(quantized(), tmp_path / "int8")


def test_the_model_computes_with_the_rounded_numbers() -> None:
    model = quantized()
    assert torch.equal(logits(model), logits(dense(model)))
    floats = logits(converted())
    assert not torch.equal(logits(model), floats)
    assert (logits(model) - floats).norm() < 0.02 * floats.norm()
    assert [s.dtype for s in npt.status(model)] == ["int8", "int8"]
    half = converted()
    for int8, wide in zip(npt.status(model), npt.status(half), strict=True):
        assert int8.parameters == wide.parameters
        channels = sum(t.numel() for t in components(model)[int8.layer].scales.values())
        assert int8.nbytes == int8.parameters + 4 * channels
        assert wide.nbytes == 4 * wide.parameters


@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_round_trip(tmp_path: Path, modulation: Any, num_ranks: int) -> None:
    config = npt.NPTConfig(
        layers=[1, 2], rank=4, num_ranks=num_ranks, modulation=modulation, residual="kept",
        init="improved",
    )  # fmt: skip
    model = npt.quantize(npt.convert(tiny(), config))
    path = npt.save(model, tmp_path / "out")
    other = npt.load(tiny(), path)
    assert torch.equal(logits(other), logits(model))
    assert npt.status(other) == npt.status(model)
    assert npt.verify(path).passed
    assert npt.inspect(path).layers[0].dtypes == ["I8"]
    assert npt.inspect(path).layers[0].nbytes == npt.status(model)[0].nbytes
    config_of = json.loads((path / "npt_config.json").read_text())["layers"]
    assert [config_of[layer]["factors"] for layer in "12"] == ["int8", "int8"]


def test_float_layers_say_nothing_of_it(tmp_path: Path) -> None:
    path = npt.save(npt.quantize(converted(), [2]), tmp_path / "out")
    layers = json.loads((path / "npt_config.json").read_text())["layers"]
    assert "factors" not in layers["1"] and layers["2"]["factors"] == "int8"
    assert [s.dtype for s in npt.status(npt.load(tiny(), path))] == ["float32", "int8"]


def test_loading_floats_as_int8_is_quantizing_them(tmp_path: Path) -> None:
    floats = npt.save(converted(), tmp_path / "floats")
    # a bfloat16 model, whose layers would have been rounded to that before
    model = npt.load(tiny().bfloat16(), floats, factors="int8")
    for layer, part in components(model).items():
        wanted = components(quantized())[layer]
        assert {n: b.tolist() for n, b in part.named_buffers()} == {
            n: b.tolist() for n, b in wanted.named_buffers()
        }
    assert components(npt.load(tiny(), floats, layers=[1], factors="int8"))[1].is_int8


def test_a_layer_becomes_what_the_checkpoint_holds(tmp_path: Path, saved: Path) -> None:
    floats = npt.save(converted(), tmp_path / "floats")
    model = npt.load(tiny(), floats)
    assert torch.equal(logits(npt.load(model, saved)), logits(quantized()))
    assert torch.equal(logits(npt.load(model, floats)), logits(converted()))
    assert torch.equal(logits(npt.load(model, floats, factors="int8")), logits(quantized()))
    assert torch.equal(logits(npt.load(model, floats, factors="int8")), logits(quantized()))
    npt.load(model, floats, trainable=True)
    assert {p.requires_grad for p in components(model)[1].parameters()} == {True}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_models_dtype_leaves_numbers_and_scales_alone(dtype: torch.dtype) -> None:
    model = converted()
    with torch.no_grad():
        components(model)[1].w_down.mul_(1e-9)  # scales that float16 does not hold
    npt.quantize(model)
    before = {n: b.clone() for n, b in components(model)[1].named_buffers()}
    for moved in (model.to(dtype), model.to("cpu", dtype)):
        after = dict(components(moved)[1].named_buffers())
        assert {n: b.dtype for n, b in after.items()} == {n: b.dtype for n, b in before.items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert logits(moved).dtype == dtype and logits(moved).isfinite().all()


def test_copies_and_state_dicts() -> None:
    model = quantized()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    other = quantized()
    with torch.no_grad():
        components(other)[1].w_down.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    stride = {part.w_down.stride(0) for part in components(copy.deepcopy(model)).values()}
    assert stride == {1}
    floats = converted()
    for own, given in ((floats, model), (model, floats)):
        with pytest.raises(RuntimeError, match="its factors are"):
            own.load_state_dict(given.state_dict(), strict=False)
    assert npt.unload(model) is model and not components(model)


def test_a_compiled_model() -> None:
    model = quantized()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(PROMPT, use_cache=False).logits, logits(model))


def test_projections_that_are_called() -> None:
    model = quantized()
    wanted = logits(model)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits(model), wanted)


def test_one_matrix_at_a_time_is_in_floats() -> None:
    """Besides activations, a call holds the floats of one factor only."""
    from npt_fast.kernels.int8 import Int8Matrix

    alive: list[Any] = []
    most = 0
    original = Int8Matrix.dense

    def watched(self: Int8Matrix) -> Tensor:
        nonlocal most
        import weakref

        out = original(self)
        alive.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in alive))
        return out

    model = quantized()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Int8Matrix, "dense", watched)
        model(PROMPT, use_cache=False)
    assert len(alive) == 12 and most == 1


def test_merge_copies_such_layers(tmp_path: Path, saved: Path) -> None:
    floats = npt.save(converted(), tmp_path / "floats")
    npt.merge([f"{saved}:1", f"{floats}:2"], tmp_path / "merged", verify=True)
    assert npt.verify(tmp_path / "merged").passed
    own, merged = (load_file(p / "npt_weights.safetensors") for p in (saved, tmp_path / "merged"))
    assert {n for n in merged if n.startswith("layer_1_")} == {
        n for n in own if n.startswith("layer_1_")
    }
    assert all(torch.equal(merged[n], own[n]) for n in merged if n.startswith("layer_1_"))
    model = npt.load(tiny(), tmp_path / "merged")
    assert torch.equal(logits(model), logits(npt.quantize(converted(), [1])))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"on_conflict": "concat"}, "concat of int8 factors is not supported"),
        ({"on_conflict": "mean"}, "mean of int8 factors is not supported"),
        ({"on_conflict": "first", "dtype": "bfloat16"}, "int8 factors cannot be converted"),
        ({"on_conflict": "first", "format": "pt"}, "cannot be written as pt"),
    ],
)
def test_merges_that_need_arithmetic_are_refused(
    tmp_path: Path, saved: Path, options: Any, line: str
) -> None:
    with pytest.raises(npt.MergeError, match=line) as caught:
        npt.merge([saved, saved], tmp_path / "merged", options=npt.MergeOptions(**options))
    assert "\n" not in str(caught.value)
    npt.merge([saved, saved], tmp_path / "ok", options=npt.MergeOptions(on_conflict="identical"))


def test_gradients_are_refused(saved: Path) -> None:
    model = quantized()
    assert model(PROMPT, use_cache=False).logits.isfinite().all()  # in grad mode, frozen: fine
    embedded = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    with pytest.raises(npt.ModelError, match="int8 factors pass no gradients on"):
        model(inputs_embeds=embedded)
    for options in ({"trainable": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(npt.ModelError, match="int8 factors cannot be trained") as caught:
            npt.load(tiny(), saved, **options)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_quantized_is_told(tmp_path: Path) -> None:
    with pytest.raises(npt.ModelError, match="no NP layers to quantize"):
        npt.quantize(tiny())
    with pytest.raises(npt.ModelError, match="layer 3 is no NP layer"):
        npt.quantize(converted(), [3])
    model = converted()
    with torch.no_grad():
        components(model)[2].w_b_up[0, 0] = torch.nan
    with pytest.raises(npt.ModelError, match="layer 2: w_b_up: NaN"):
        npt.quantize(model)
    assert [s.dtype for s in npt.status(model)] == ["float32", "float32"]
    with pytest.raises(npt.ModelError, match="which the original cannot read"):
        npt.save(quantized(), tmp_path / "out", format="pt")
    with pytest.raises(npt.OptionError, match="factors must be one of int8 or None"):
        npt.load(tiny(), tmp_path, factors="int4")  # type: ignore[arg-type]


def test_whole_models(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path / "whole")
    again = npt.load(tiny(), tmp_path / "whole")
    assert torch.equal(logits(again), logits(model))
