"""Merging: the rules of the users' guide, the laws of design.md#merge-laws, and refusals."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import npt_fast as npt
from npt_fast.checkpoint.digests import read_digests
from tests.checkpoints import (
    assert_same_tensors,
    contents,
    layer_weights,
    load_state,
    multi_layer_state,
    raw,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
    write_shards,
)
from tests.reference import Situation, delta, modulated_mlp, relative_error

EXACT = 4e-15  # float64, another order of summation (design.md#merge-laws)


def one_layer(root: Path, layer: int, **architecture: Any) -> Path:
    return write_checkpoint(root, layer_weights(layer, **architecture))


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def only(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: t for name, t in weights.items() if name.startswith(f"layer_{layer}_np.")}


# the guide's rules ------------------------------------------------------------------------------


def test_layers_from_every_input_in_ascending_order(tmp_path: Path) -> None:
    layers = [13, 2, 11, 0, 14]
    paths = [one_layer(tmp_path / str(n), n, num_ranks=1 + n % 3) for n in layers]
    report = npt.merge(paths, tmp_path / "out", verify=True)
    expected = [item for n in sorted(layers) for item in read_weights(tmp_path / str(n)).items()]
    merged = read_weights(tmp_path / "out")
    assert list(merged) == [name for name, _ in expected]
    assert_same_tensors(merged, dict(expected))
    assert [info.layer for info in report.layers] == sorted(layers)
    assert [info.source for info in report.layers] == [
        str(tmp_path / str(n)) for n in sorted(layers)
    ]
    assert report.total_parameters == sum(tensor.numel() for tensor in merged.values())
    assert report.checkpoint_keys == len(merged)


def test_the_first_wins_and_a_warning_names_the_layer(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", {**layer_weights(11), **layer_weights(12)})
    # more tensors than in the first: none of them may slip through
    second = write_checkpoint(
        tmp_path / "b", {**layer_weights(11, seed=5, num_ranks=3), **layer_weights(13)}
    )
    report = npt.merge([first, second], tmp_path / "out", verify=True)
    (warning,) = [line for line in report.warnings if "already exists" in line]
    assert "Layer 11 already exists" in warning
    assert str(first) in warning and str(second) in warning
    expected = {**read_weights(first), **only(read_weights(second), 13)}
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_last_takes_the_whole_layer_from_the_last(tmp_path: Path) -> None:
    first = one_layer(tmp_path / "a", 11, num_ranks=3)
    second = one_layer(tmp_path / "b", 11, seed=5)
    options = npt.MergeOptions(on_conflict="last")
    report = npt.merge([first, second], tmp_path / "out", options=options)
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(second))
    assert report.layers[0].source == str(second)
    assert any("Layer 11 already exists" in line for line in report.warnings)


def test_error_refuses_a_conflict_and_nothing_else(tmp_path: Path) -> None:
    options = npt.MergeOptions(on_conflict="error")
    first, second = one_layer(tmp_path / "a", 11), one_layer(tmp_path / "b", 12)
    npt.merge([first, second], tmp_path / "fine", options=options)
    with pytest.raises(npt.MergeError, match="Layer 11 already exists") as caught:
        npt.merge([first, second, first], tmp_path / "out", options=options)
    assert str(first) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_identical_accepts_equal_bytes_in_any_form(tmp_path: Path) -> None:
    weights = layer_weights(11, num_ranks=2)
    first = write_checkpoint(tmp_path / "a", weights)
    second = write_shards(tmp_path / "b", [weights])
    options = npt.MergeOptions(on_conflict="identical")
    npt.merge([first, second], tmp_path / "out", verify=True, options=options)
    assert_same_tensors(read_weights(tmp_path / "out"), weights)


def other_value(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = list(weights)[4]
    changed = weights[name].clone()
    changed[-1, -1] = torch.nextafter(changed[-1, -1], torch.tensor(torch.inf))
    return {**weights, name: changed}


def other_dtype(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


def other_rank(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return layer_weights(11, rank=5)


@pytest.mark.parametrize("change", [other_value, other_dtype, other_rank], ids=lambda c: c.__name__)
def test_identical_refuses_any_difference(tmp_path: Path, change: Callable[..., Any]) -> None:
    weights = layer_weights(11)
    first = write_checkpoint(tmp_path / "a", weights)
    second = write_checkpoint(tmp_path / "b", change(weights))
    options = npt.MergeOptions(on_conflict="identical")
    with pytest.raises(npt.MergeError, match=r"Layer 11 already exists.*not identical"):
        npt.merge([first, second], tmp_path / "out", options=options)


def test_config_of_the_first_plus_merge_info(tmp_path: Path) -> None:
    configs: list[Any] = [None, {"model_name": "m", "max_steps": 1, "nested": {"é": [1.5, None]}}]
    configs.append({"model_name": "m", "max_steps": 2})
    paths = [
        write_checkpoint(tmp_path / f"{n}", layer_weights(n), config=config)
        for n, config in enumerate(configs)
    ]
    npt.merge(paths, tmp_path / "out")
    merge_info = {
        "merged_from": [str(path) for path in paths],
        "merged_layers": [0, 1, 2],
        "layer_sources": {str(n): str(path) for n, path in enumerate(paths)},
    }
    assert json_of(tmp_path / "out" / "config.json") == {**configs[1], "merge_info": merge_info}


def test_no_config_no_file(tmp_path: Path) -> None:
    npt.merge([one_layer(tmp_path / "a", 1)], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_summary_has_the_keys_of_the_original(tmp_path: Path) -> None:
    paths = [one_layer(tmp_path / "a", 13), one_layer(tmp_path / "b", 2)]
    npt.merge(paths, tmp_path / "out")
    summary = json_of(tmp_path / "out" / "merge_summary.json")
    assert summary["merged_layers"] == [2, 13]
    assert summary["layer_sources"] == {"2": str(paths[1]), "13": str(paths[0])}
    assert summary["total_parameters"] == sum(
        tensor.numel() for path in paths for tensor in read_weights(path).values()
    )
    assert summary["checkpoint_keys"] == 18


def test_one_input_keeps_every_byte(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 11, num_ranks=2)
    npt.merge([path], tmp_path / "out", verify=True)
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(path))
    assert list(read_weights(tmp_path / "out")) == list(read_weights(path))
    merged, source = load_state(tmp_path / "out"), load_state(path)
    del merged["merge_info"]
    assert merged.keys() == source.keys()
    assert all(repr(merged[name]) == repr(source[name]) for name in source)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("11", [11]),
        ("13,11", [11, 13]),
        ("11,11", [11]),
        ("12", [12]),
        ("11-13", [11, 12, 13]),
        ("13,11-12", [11, 12, 13]),
        ("12-13, 12", [12, 13]),
        ("13-13", [13]),
    ],
)
def test_selected_layers(tmp_path: Path, spec: str, wanted: list[int]) -> None:
    weights = {**layer_weights(11), **layer_weights(12), **layer_weights(13)}
    path = write_checkpoint(tmp_path / "a", weights)
    report = npt.merge([f"{path}:{spec}"], tmp_path / "out", verify=True)
    assert [info.layer for info in report.layers] == wanted
    assert [info.source for info in report.layers] == [str(path)] * len(wanted)
    assert_same_tensors(
        read_weights(tmp_path / "out"), {k: v for n in wanted for k, v in only(weights, n).items()}
    )


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("13-11", "13-11 runs backwards"),
        ("11,13-11", "13-11 runs backwards"),
        ("0-99999", "more than 10,000 layers"),
        (",".join(["0-9999"] * 1000), "more than 10,000 layers"),
        ("11-", "'11-' is not a list of layers"),
        ("11,,13", "'11,,13' is not a list of layers"),
        ("111111", "'111111' is not a list of layers"),
        ("10-13", "has no layer 10, only \\[11\\]"),
        ("11,-1", "has no layer -1, only \\[11\\]"),
    ],
)
def test_a_selection_that_selects_nothing(tmp_path: Path, spec: str, problem: str) -> None:
    path = one_layer(tmp_path / "a", 11)
    with pytest.raises(npt.NPTError, match=problem):
        npt.merge([f"{path}:{spec}"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_selection_avoids_a_conflict(tmp_path: Path) -> None:
    both = write_checkpoint(tmp_path / "a", {**layer_weights(11), **layer_weights(13)})
    other = one_layer(tmp_path / "b", 11, seed=9)
    options = npt.MergeOptions(on_conflict="error")
    npt.merge([f"{both}:13", other], tmp_path / "out", options=options)
    expected = {**read_weights(other), **only(read_weights(both), 13)}
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_selected_layer_keeps_its_moments(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    paths = [trained_checkpoint(tmp_path / str(n), n, steps=n) for n in (2, 3, 4)]
    npt.merge(paths, merged)
    npt.merge([f"{merged}:3"], tmp_path / "out")
    found = load_state(tmp_path / "out")["optimizer_state_dict"]["state"]
    source = load_state(paths[1])["optimizer_state_dict"]["state"]
    assert [raw(s["exp_avg"]) for s in found.values()] == [
        raw(s["exp_avg"]) for s in source.values()
    ]


def test_a_selected_layer_that_is_not_there(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 11)
    with pytest.raises(npt.MergeError, match=r"has no layer 12, only \[11\]"):
        npt.merge([f"{path}:11,12"], tmp_path / "out")


def test_a_selection_that_is_too_long_for_a_name(tmp_path: Path) -> None:
    layers = range(100)
    weights = {k: v for n in layers for k, v in layer_weights(n, modulation="single").items()}
    path = write_checkpoint(tmp_path / "a", weights)
    spec = ",".join(map(str, layers))
    assert len(spec) > 255
    report = npt.merge([f"{path}:{spec}"], tmp_path / "out")
    assert [info.layer for info in report.layers] == list(layers)


def test_a_path_that_looks_like_a_selection(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "run:11", {**layer_weights(11), **layer_weights(13)})
    assert [info.layer for info in npt.merge([path], tmp_path / "out").layers] == [11, 13]


# laws -------------------------------------------------------------------------------------------


def test_disjoint_merges_commute(tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n, num_ranks=n) for n in (1, 2, 3)]
    results = []
    for number, order in enumerate(itertools.permutations(paths)):
        out = tmp_path / f"out{number}"
        npt.merge(order, out)
        results.append((out / "npt_weights.pt").read_bytes())
        moments = load_state(out)["optimizer_state_dict"]["state"]
        results[-1] += b"".join(raw(state["exp_avg"]) for state in moments.values())
    assert len(set(results)) == 1


def test_merging_is_associative(tmp_path: Path) -> None:
    a, b, c = (trained_checkpoint(tmp_path / str(n), n, steps=n) for n in (1, 2, 3))
    npt.merge([a, b, c], tmp_path / "at-once")
    npt.merge([a, b], tmp_path / "ab")
    npt.merge([tmp_path / "ab", c], tmp_path / "left")
    npt.merge([b, c], tmp_path / "bc")
    npt.merge([a, tmp_path / "bc"], tmp_path / "right")
    expected = read_weights(tmp_path / "at-once")
    moments = load_state(tmp_path / "at-once")["optimizer_state_dict"]
    for name in ("left", "right"):
        assert_same_tensors(read_weights(tmp_path / name), expected)
        state = load_state(tmp_path / name)
        assert repr(state["optimizer_state_dict"]) == repr(moments)
        assert state["global_step"] == 3


OPTION_SETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shards": {"format": "safetensors", "max_shard_size": 3000},
    "uniform": {"uniform": True},
    "mean": {"on_conflict": "mean", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", OPTION_SETS)
def test_same_inputs_and_options_same_bytes(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    trained_checkpoint(first / "a", 1, num_ranks=2)
    trained_checkpoint(first / "b", 2, rank=7, modulation="dual")
    trained_checkpoint(first / "c", 1, seed=8, steps=6)
    shutil.copytree(first, tmp_path / "elsewhere" / "second")  # new inodes, times and places
    written = []
    for place in (first, tmp_path / "elsewhere" / "second", first):
        monkeypatch.chdir(place)
        shutil.rmtree("out", ignore_errors=True)
        options = npt.MergeOptions(**OPTION_SETS[case])
        npt.merge(["a", "b", "c"], "out", verify=True, options=options)
        written.append(contents(place / "out"))
    assert len(written[0]) >= 6
    assert written[0] == written[1] == written[2]


# concat and mean --------------------------------------------------------------------------------

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1+1": ({}, {}),
    "2+3": ({"num_ranks": 2}, {"num_ranks": 3}),
    "unlike-ranks": ({"rank": 3, "num_ranks": 2}, {"rank": 5}),
    "single": ({"modulation": "single"}, {"modulation": "single", "num_ranks": 2}),
    "dual": ({"modulation": "dual"}, {"modulation": "dual"}),
    "single+dual": ({"modulation": "single", "num_ranks": 2}, {"modulation": "dual", "rank": 6}),
    "dual+triple": ({"modulation": "dual"}, {"modulation": "triple", "num_ranks": 2}),
    "triple+single": ({"modulation": "triple", "rank": 2}, {"modulation": "single"}),
}


def joined(
    tmp_path: Path, policy: Any, parts: Sequence[Mapping[str, Tensor]], **options: Any
) -> dict[str, Tensor]:
    paths = [write_checkpoint(tmp_path / f"in{n}", part) for n, part in enumerate(parts)]
    chosen = npt.MergeOptions(on_conflict=policy, **options)
    npt.merge(paths, tmp_path / "out", verify=True, options=chosen)
    return read_weights(tmp_path / "out")


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize(("policy", "scale"), [("concat", 1.0), ("mean", 0.5)])
def test_joined_layers_add_up(tmp_path: Path, case: str, policy: str, scale: float) -> None:
    parts = [layer_weights(11, seed=n, **kind) for n, kind in enumerate(PAIRS[case])]
    merged = joined(tmp_path, policy, parts)
    where = Situation.random()
    m = torch.randn(7, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for projection, x in (("gate", where.x), ("up", where.x), ("down", m)):
        sums = [delta(part, 11, projection, where.attention, x) for part in parts]
        expected = scale * (sums[0] + sums[1])
        if expected.any():
            found = delta(merged, 11, projection, where.attention, x)
            assert relative_error(found, expected) <= EXACT
    whole = modulated_mlp(parts, 11, where, scale)
    assert relative_error(modulated_mlp([merged], 11, where), whole) <= EXACT


def test_concat_only_renames(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1, num_ranks=2), layer_weights(11, seed=2)]
    merged = joined(tmp_path, "concat", parts)
    expected = dict(parts[0])
    expected |= {f"{name}.2": tensor for name, tensor in parts[1].items()}
    assert_same_tensors(merged, expected)


def test_mean_changes_nothing_but_b_up(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=n) for n in (1, 2)]
    merged = joined(tmp_path, "mean", parts)
    assert len(merged) == 18
    for index, part in enumerate(parts):
        for name, tensor in part.items():
            expected = tensor / 2 if "W_b_up" in name else tensor
            assert raw(merged[f"{name}.{index}"]) == raw(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_mean_is_rounded_once(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    parts = [layer_weights(11, seed=n, dtype=dtype) for n in range(count)]
    merged = joined(tmp_path, "mean", parts)
    for index, part in enumerate(parts):
        for name, tensor in part.items():
            if "W_b_up" in name:
                expected = (tensor.double() / count).to(dtype)
                assert raw(merged[f"{name}.{index}"]) == raw(expected)


def test_concat_of_one_is_the_layer(tmp_path: Path) -> None:
    weights = layer_weights(11, num_ranks=2)
    for policy in ("concat", "mean"):
        assert_same_tensors(joined(tmp_path / policy, policy, [weights]), weights)


def test_concat_pads_ranks_exactly(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1, rank=3), layer_weights(11, seed=2, rank=5)]
    merged = joined(tmp_path, "concat", parts)
    for name, tensor in parts[0].items():
        found = merged[f"{name}.0"]
        rows, columns = tensor.shape
        assert torch.equal(found[:rows, :columns], tensor)
        if "W_down" in name:
            assert found.shape == (16, 5)  # what the new columns hold is multiplied by zero
        else:
            assert not found[3:].any() and found.shape[0] == 5
    for name, tensor in parts[1].items():
        assert raw(merged[f"{name}.1"]) == raw(tensor)


def test_mixed_dtypes_need_a_choice(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1), layer_weights(11, seed=2, dtype=torch.bfloat16)]
    with pytest.raises(npt.MergeError, match="BF16, F32; choose one with --dtype"):
        joined(tmp_path / "a", "concat", parts)
    merged = joined(tmp_path / "b", "concat", parts, dtype="float32")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    for name, tensor in parts[1].items():
        assert raw(merged[f"{name}.1"]) == raw(tensor.float())


def test_parts_are_recorded(tmp_path: Path) -> None:
    parts = [layer_weights(11, seed=1, num_ranks=2), layer_weights(11, seed=2)]
    joined(tmp_path, "mean", parts)
    facts = json_of(tmp_path / "out" / "merge_summary.json")["layers"]["11"]
    assert facts["source"] == f"{tmp_path / 'in0'} + {tmp_path / 'in1'}"
    found = [(part["source"], part["num_ranks"], part["divisor"]) for part in facts["parts"]]
    assert found == [(str(tmp_path / "in0"), 2, 2), (str(tmp_path / "in1"), 1, 2)]


def test_residuals_that_differ_cannot_be_joined(tmp_path: Path) -> None:
    paths = []
    for name, residual in (("a", "kept"), ("b", "removed")):
        path = one_layer(tmp_path / name, 11, modulation="dual")
        npt_config = {"format_version": 1, "layers": {"11": {"residual": residual}}}
        (path / "npt_config.json").write_text(json.dumps(npt_config))
        paths.append(path)
    with pytest.raises(npt.MergeError, match="with and without the residual"):
        npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(on_conflict="concat"))


# uniform ----------------------------------------------------------------------------------------

LAYERS: dict[int, dict[str, Any]] = {
    1: {"modulation": "single", "rank": 3, "num_ranks": 2},
    2: {"modulation": "dual", "rank": 5},
    3: {"modulation": "triple", "rank": 2, "num_ranks": 3},
    4: {"modulation": "single", "rank": 4},
}


@pytest.fixture
def uniform(tmp_path: Path) -> dict[str, Tensor]:
    paths = [one_layer(tmp_path / str(n), n, **kind) for n, kind in LAYERS.items()]
    npt.merge(paths, tmp_path / "out", verify=True, options=npt.MergeOptions(uniform=True))
    return read_weights(tmp_path / "out")


@pytest.mark.parametrize("layer", LAYERS)
def test_uniform_keeps_every_function(uniform: dict[str, Tensor], layer: int) -> None:
    where = Situation.random(seed=layer)
    expected = modulated_mlp([layer_weights(layer, **LAYERS[layer])], layer, where)
    assert relative_error(modulated_mlp([uniform], layer, where), expected) <= EXACT


class OriginalLayer(torch.nn.Module):
    """The parameters of the original's NP component: one list per projection and stem."""

    def __init__(self, d: int, f: int, rank: int, num_ranks: int) -> None:
        super().__init__()
        for projection, (a, b) in {"gate": (d, f), "up": (d, f), "down": (f, d)}.items():
            shapes = {"W_down": (d, rank), "W_a_up": (rank, a), "W_b_up": (rank, b)}
            for stem, shape in shapes.items():
                parameters = [torch.nn.Parameter(torch.full(shape, 9.0)) for _ in range(num_ranks)]
                name = f"{stem}_{projection}"
                if num_ranks == 1:
                    self.register_parameter(name, parameters[0])
                else:
                    setattr(self, name, torch.nn.ParameterList(parameters))


def test_uniform_loads_the_original_way(uniform: dict[str, Tensor]) -> None:
    """The original strips a prefix per layer and builds one architecture; all keys must match."""
    for layer in LAYERS:
        prefix = f"layer_{layer}_np."
        own = {k.removeprefix(prefix): v for k, v in uniform.items() if k.startswith(prefix)}
        module = OriginalLayer(16, 24, rank=5, num_ranks=3)
        assert len(own) == 27
        module.load_state_dict(own, strict=True)
        assert all(torch.equal(dict(module.named_parameters())[k], v) for k, v in own.items())


def old_names(layer: int) -> set[str]:
    """The names that a layer's old tensors have after a uniform merge."""
    names = set()
    for name in layer_weights(layer, **LAYERS[layer]):
        base, _, component = name.removeprefix(f"layer_{layer}_np.").partition(".")
        projection = "_gate" if LAYERS[layer]["modulation"] == "single" else ""
        names.add(f"layer_{layer}_np.{base}{projection}.{component or 0}")
    return names


def test_uniform_starts_new_components_at_zero_but_live(uniform: dict[str, Tensor]) -> None:
    checked = 0
    for layer in LAYERS:
        new = only(uniform, layer).keys() - old_names(layer)
        for name in new:
            tensor = uniform[name]
            assert tensor.isfinite().all()
            if "W_b_up" in name:
                assert not tensor.any(), name
            else:
                assert tensor.count_nonzero() > 0.9 * tensor.numel(), name
        checked += len(new)
    assert checked == 21 + 21 + 0 + 24


def test_gradients_reach_new_components(uniform: dict[str, Tensor]) -> None:
    where = Situation.random()
    live = {name: t.double().requires_grad_() for name, t in only(uniform, 4).items()}
    modulated_mlp([live], 4, where).square().sum().backward()
    for name, tensor in live.items():
        if "W_b_up" in name:
            assert tensor.grad is not None and tensor.grad.any(), name


def test_uniform_leaves_equal_layers_alone(tmp_path: Path) -> None:
    paths = [one_layer(tmp_path / str(n), n, num_ranks=2) for n in (1, 2)]
    report = npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(uniform=True))
    assert {info.changed for info in report.layers} == {0}


def test_uniform_reports_what_changed(tmp_path: Path, uniform: dict[str, Tensor]) -> None:
    summary = npt.inspect(tmp_path / "out")
    assert (summary.modulation, summary.num_ranks, summary.rank) == ("triple", 3, 5)


# dtype ------------------------------------------------------------------------------------------

FLOATS = ["float64", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_every_cast_equals_torch(tmp_path: Path, source: str, target: str, form: Any) -> None:
    weights = layer_weights(1, dtype=getattr(torch, source))
    path = write_checkpoint(tmp_path / "a", weights)
    options = npt.MergeOptions(dtype=target, format=form)  # type: ignore[arg-type]
    npt.merge([path], tmp_path / "out", verify=True, options=options)
    expected = {name: tensor.to(getattr(torch, target)) for name, tensor in weights.items()}
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_value_that_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_a_up_up"][2, 3] = 1e6
    path = write_checkpoint(tmp_path / "a", weights)
    with pytest.raises(
        npt.MergeError, match=r"layer_1_np\.W_a_up_up: a value is too large for F16"
    ):
        npt.merge([path], tmp_path / "out", options=npt.MergeOptions(dtype="float16"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        pytest.param({"dtype": "float32"}, [{}], id="dtype"),
        pytest.param({"on_conflict": "mean"}, [{}, {}], id="mean"),
        pytest.param({"uniform": True}, [{}, {"layer": 2, "rank": 7}], id="uniform-rank"),
        pytest.param({"uniform": True}, [{}, {"layer": 2, "num_ranks": 2}], id="uniform-num_ranks"),
    ],
)
def test_fp8_cannot_be_computed_with(
    tmp_path: Path, options: dict[str, Any], kinds: list[dict[str, Any]]
) -> None:
    paths = [
        one_layer(tmp_path / str(n), **{"layer": 1, "dtype": torch.float8_e4m3fn, **kind})
        for n, kind in enumerate(kinds)
    ]
    with pytest.raises(npt.MergeError, match="F8_E4M3 cannot be converted") as caught:
        npt.merge(paths, tmp_path / "out", options=npt.MergeOptions(**options))
    assert "layer_1_np." in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fp8_is_copied(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1, dtype=torch.float8_e5m2)
    npt.merge([path], tmp_path / "out", verify=True)
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(path))


# real data --------------------------------------------------------------------------------------


def original_loader(weights: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """Find tensors like the original: two prefixes per layer; other names are ignored."""
    found = {}
    for layer in layers:
        for prefix in (f"layer_{layer}_np", f"model.layers.{layer}.np_component"):
            for name, tensor in weights.items():
                if name.startswith(prefix):
                    found[f"{layer}:{name[len(prefix) + 1 :]}"] = tensor
    return found


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_real_checkpoints(tmp_path: Path, layer11: Path, layer13: Path, form: Any) -> None:
    options = npt.MergeOptions(format=form)
    report = npt.merge([layer11, layer13], tmp_path / "out", verify=True, options=options)
    sources = {**read_weights(layer11), **read_weights(layer13)}
    assert len(sources) == 72
    views = []
    if form == "pt":
        file = tmp_path / "out" / "npt_weights.pt"
        views += [torch.load(file, weights_only=True, mmap=mmap) for mmap in (False, True)]
        assert list(views[0]) == list(sources)
    else:
        with safe_open(tmp_path / "out" / "npt_weights.safetensors", "pt") as opened:
            views.append({name: opened.get_tensor(name) for name in opened.keys()})
    for view in views:
        assert_same_tensors(view, sources)
    loaded = original_loader(views[0], [11, 13])
    assert len(loaded) == 72
    assert torch.equal(loaded["13:W_b_up_down.3"], sources["layer_13_np.W_b_up_down.3"])
    assert report.verification is not None and report.verification.compared == 72
    assert sum(report.ways.values()) - report.ways["headers"] == sum(
        len(raw(t)) for t in sources.values()
    )


def test_real_checkpoints_joined_with_another_training(
    tmp_path: Path, layer11: Path, layer13: Path
) -> None:
    """Layer 13's weights, renamed to layer 11, and the mean of both, at a real model's width."""
    renamed = {
        name.replace("layer_13", "layer_11"): tensor
        for name, tensor in read_weights(layer13).items()
    }
    other = write_checkpoint(tmp_path / "other", renamed)
    options = npt.MergeOptions(on_conflict="mean")
    npt.merge([layer11, other], tmp_path / "out", verify=True, options=options)
    merged = read_weights(tmp_path / "out")
    where = Situation.random(d=576, f=1536, tokens=3)
    expected = modulated_mlp([read_weights(layer11), renamed], 11, where, 0.5)
    assert relative_error(modulated_mlp([merged], 11, where), expected) <= EXACT


# provenance -------------------------------------------------------------------------------------


def test_provenance_through_three_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for layer in (1, 2, 3, 4):
        trained_checkpoint(Path(f"c{layer}"), layer, steps=layer)
    npt.merge(["c1", "c2"], "v1", verify=True)
    npt.merge(["v1", "c3"], "v2", verify=True)
    npt.merge(["v2", "c4"], "v3", verify=True)
    facts = json_of(tmp_path / "v3" / "merge_summary.json")["layers"]
    assert {n: (f["step"], f["source"], f["chain"]) for n, f in facts.items()} == {
        "1": (1, "v2", ["v1", "c1"]),
        "2": (2, "v2", ["v1", "c2"]),
        "3": (3, "v2", ["c3"]),
        "4": (4, "c4", []),
    }
    digests = [
        json_of(tmp_path / name / "merge_summary.json")["layers"]["1"]["digest"]
        for name in ("v1", "v2", "v3")
    ]
    assert len(set(digests)) == 1 and isinstance(digests[0], str)


def test_digests_travel_through_a_merge_without_verify(tmp_path: Path) -> None:
    paths = [one_layer(tmp_path / str(n), n) for n in (1, 2)]
    npt.merge([paths[0]], tmp_path / "v1", verify=True)
    npt.merge([tmp_path / "v1", paths[1]], tmp_path / "v2")
    first = json_of(tmp_path / "v1" / "merge_summary.json")
    second = json_of(tmp_path / "v2" / "merge_summary.json")
    assert list(read_digests(tmp_path / "v2")) == list(read_digests(tmp_path / "v1"))
    assert second["layers"]["1"]["digest"] == first["layers"]["1"]["digest"]
    assert second["layers"]["2"]["digest"] is None


def test_digests_are_sha256_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    weights = layer_weights(1, dtype=torch.bfloat16)
    npt.merge([write_checkpoint(tmp_path / "a", weights)], tmp_path / "out", verify=True)
    assert list(read_digests(tmp_path / "out")) == [
        (
            "npt_weights.pt",
            name,
            f"BF16{list(tensor.shape)} {hashlib.sha256(raw(tensor)).hexdigest()}",
        )
        for name, tensor in weights.items()
    ]


def test_merges_made_by_the_original_are_understood(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "old",
        {**layer_weights(1), **layer_weights(2)},
        training_state={"global_step": 7, "merge_info": {"layer_sources": {1: "a", 2: "b"}}},
    )
    summary = {
        "merged_layers": [1, 2],
        "layer_sources": {"1": "runs/a", "2": "runs/b"},
        "total_parameters": 1,
        "checkpoint_keys": 18,
    }
    (path / "merge_summary.json").write_text(json.dumps(summary))
    npt.merge([path, one_layer(tmp_path / "c", 3)], tmp_path / "out")
    facts = json_of(tmp_path / "out" / "merge_summary.json")["layers"]
    assert [facts[n]["chain"] for n in "123"] == [["runs/a"], ["runs/b"], []]
    assert [facts[n]["source"] for n in "12"] == [str(path)] * 2
    assert [facts[n]["step"] for n in "123"] == [7, 7, None]


def test_npt_config_describes_every_layer(tmp_path: Path) -> None:
    kept = one_layer(tmp_path / "a", 1, modulation="dual", rank=3)
    recorded = {
        "format_version": 1,
        "base_model": {"name": "test/model", "num_hidden_layers": 30, "vocab_size": 99},
        "layers": {"1": {"residual": "kept", "step": 70, "fidelity": 0.5}},
    }
    (kept / "npt_config.json").write_text(json.dumps(recorded))
    triple = trained_checkpoint(tmp_path / "b", 2, steps=4, num_ranks=2)
    unknown = one_layer(tmp_path / "c", 3, modulation="single")
    report = npt.merge([kept, triple, unknown], tmp_path / "out")
    assert json_of(tmp_path / "out" / "npt_config.json") == {
        "format_version": 1,
        "base_model": {
            "name": "test/model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 30,
            "vocab_size": 99,
        },
        "layers": {
            str(layer): dict(
                zip(
                    ("modulation", "num_ranks", "rank", "residual", "step", "source", "fidelity"),
                    values,
                    strict=True,
                )
            )
            for layer, values in {
                1: ("dual", 1, 3, "kept", 70, str(kept), 0.5),
                2: ("triple", 2, 4, "removed", 4, str(triple), None),
                3: ("single", 1, 4, None, None, str(unknown), None),
            }.items()
        },
    }
    (warning,) = [line for line in report.warnings if "residual" in line]
    assert "Layer 3" in warning


def test_bare_safetensors_carry_their_description(tmp_path: Path) -> None:
    """A weights file that was moved out of its folder still has its description."""
    path = trained_checkpoint(tmp_path / "a", 2, steps=4)
    npt.merge([path], tmp_path / "out", options=npt.MergeOptions(format="safetensors"))
    alone = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "out" / "npt_weights.safetensors", alone)
    report = npt.inspect(alone)
    assert report.model_name == "test/model"
    assert (report.layers[0].step, report.layers[0].residual) == (4, "removed")


MALFORMED: dict[str, Any] = {
    "layers-of-text": {"format_version": 1, "layers": {"1": "dual"}},
    "layers-of-lists": {"format_version": 1, "layers": {"1": [1]}},
    "layers-a-list": {"format_version": 1, "layers": [1]},
    "base-of-text": {"format_version": 1, "base_model": "x"},
    "odd-facts": {"format_version": 1, "layers": {"1": {"step": "7", "residual": 3}}},
}


@pytest.mark.parametrize("file", ["npt_config.json", "merge_summary.json"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_records_are_unknown_facts_or_refused(
    tmp_path: Path, file: str, case: str
) -> None:
    path = one_layer(tmp_path / "a", 1)
    (path / file).write_text(json.dumps(MALFORMED[case]))
    try:
        npt.merge([path], tmp_path / "out")
    except npt.NPTError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_formats_of_the_future_are_refused(tmp_path: Path, version: object) -> None:
    path = one_layer(tmp_path / "a", 1)
    (path / "npt_config.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(npt.CheckpointError, match="update npt_fast"):
        npt.merge([path], tmp_path / "out")


# refusals ---------------------------------------------------------------------------------------


def refuse(tmp_path: Path, inputs: Sequence[object], match: str, **options: Any) -> None:
    """The merge must fail with one line, without creating or changing any file."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(npt.NPTError, match=match) as caught:
        npt.merge(
            [str(path) for path in inputs], tmp_path / "out", options=npt.MergeOptions(**options)
        )
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "size"), [("hidden_size", {"d": 18}), ("intermediate_size", {"f": 26})]
)
def test_another_base_model(tmp_path: Path, name: str, size: dict[str, int]) -> None:
    inputs = [one_layer(tmp_path / "a", 1), one_layer(tmp_path / "b", 2, **size)]
    refuse(tmp_path, inputs, f"layer 2 was trained on another base model: {name}")
    refuse(tmp_path, inputs, name, allow_different_base=True)


def test_another_model_name(tmp_path: Path) -> None:
    inputs = [
        write_checkpoint(tmp_path / name, layer_weights(n), config={"model_name": name})
        for n, name in enumerate(("meta/a", "b"))
    ]
    refuse(tmp_path, inputs, "model_name is 'meta/a' in .* 'b' in .*--allow-different-base")
    options = npt.MergeOptions(allow_different_base=True)
    npt.merge(inputs, tmp_path / "out", options=options)
    assert json_of(tmp_path / "out" / "config.json")["model_name"] == "meta/a"


def test_a_name_that_only_one_input_knows(tmp_path: Path) -> None:
    first = one_layer(tmp_path / "a", 1)
    second = write_checkpoint(tmp_path / "b", layer_weights(2), config={"model_name": "m"})
    npt.merge([first, second], tmp_path / "out")
    assert npt.inspect(tmp_path / "out").model_name == "m"


def test_another_fingerprint(tmp_path: Path) -> None:
    inputs = []
    for n, layers in ((1, 30), (2, 16)):
        path = one_layer(tmp_path / str(n), n)
        base = {"format_version": 1, "base_model": {"num_hidden_layers": layers}}
        (path / "npt_config.json").write_text(json.dumps(base))
        inputs.append(path)
    refuse(tmp_path, inputs, "num_hidden_layers is 30 in .* and 16 in", allow_different_base=True)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    present = one_layer(tmp_path / "a", 1)
    refuse(tmp_path, [present, tmp_path / "missing"], "Checkpoint not found: .*missing")
    refuse(tmp_path, [present, tmp_path], "NPT weights not found at")
    refuse(tmp_path, [], "no checkpoints given")


def at_input(root: Path) -> Path:
    return root / "a"


def inside_input(root: Path) -> Path:
    return root / "a" / "merged"


def deep_inside_input(root: Path) -> Path:
    return root / "a" / "x" / "y"


def around_input(root: Path) -> Path:
    return root


def link_to_input(root: Path) -> Path:
    (root / "link").symlink_to(root / "a")
    return root / "link"


def inside_by_link(root: Path) -> Path:
    (root / "link").symlink_to(root / "a")
    return root / "link" / "merged"


def around_by_link(root: Path) -> Path:
    (root.parent / f"{root.name}-link").symlink_to(root)
    return root.parent / f"{root.name}-link"


def by_dots(root: Path) -> Path:
    return root / "b" / ".." / "a"


PLACES = [
    at_input, inside_input, deep_inside_input, around_input, link_to_input, inside_by_link,
    around_by_link, by_dots,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("second", [False, True], ids=["first-input", "second-input"])
def test_the_output_never_touches_an_input(
    tmp_path: Path, place: Callable[[Path], Path], force: bool, second: bool
) -> None:
    root = tmp_path / "root"
    inputs = [one_layer(root / "a", 1), one_layer(tmp_path / "far", 2)]
    (root / "b").mkdir()
    output = place(root)
    before = {path: contents(path) for path in inputs}
    with pytest.raises(npt.MergeError) as caught:
        npt.merge(inputs[::-1] if second else inputs, output, force=force)
    assert "choose another --output" in str(caught.value)
    assert {path: contents(path) for path in inputs} == before


def test_the_output_may_be_beside_an_input(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "run" / "a", 1)
    npt.merge([path], tmp_path / "run" / "a-merged")
    npt.merge([path], tmp_path / "run" / "new" / "deep")
    assert_same_tensors(read_weights(tmp_path / "run" / "new" / "deep"), read_weights(path))


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    old = one_layer(tmp_path / "out", 2)
    stale = old / "npt_weights-00001-of-00002.safetensors"
    stale.write_bytes(b"old")
    before = contents(old)
    refuse(tmp_path, [path], "Output path already exists: .*out. Use --force to overwrite.")
    assert contents(old) == before
    npt.merge([path], old, verify=True, force=True)
    assert_same_tensors(read_weights(old), read_weights(path))
    assert not stale.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_force_goes_through_a_link_to_the_folder(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    one_layer(tmp_path / "real", 2)
    (tmp_path / "out").symlink_to("real")
    npt.merge([path], tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert_same_tensors(read_weights(tmp_path / "real"), read_weights(path))


@pytest.mark.parametrize("kind", ["file", "sub-folder", "dangling-link"])
def test_force_replaces_checkpoints_only(tmp_path: Path, kind: str) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    elif kind == "dangling-link":
        output.symlink_to("nowhere")
    else:
        (output / "checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(npt.MergeError, match="--force replaces checkpoints only"):
        npt.merge([path], output, force=True)
    assert sorted(tmp_path.rglob("*")) == before


FOREIGN = {
    "text": {"thesis.tex": b"years of work"},
    "a-model": {"config.json": b"{}", "model.safetensors": b"x", "tokenizer.json": b"{}"},
    "parts": {"config.json": b"{}", "training_state.pt": b"x"},
    "hidden": {".git": b"x"},
}


@pytest.mark.parametrize("files", FOREIGN)
def test_force_never_replaces_what_is_no_checkpoint(tmp_path: Path, files: str) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = tmp_path / "out"
    output.mkdir()
    for name, data in FOREIGN[files].items():
        (output / name).write_bytes(data)
    before = contents(output)
    with pytest.raises(npt.MergeError, match=r"holds no NPT weights.* replaces checkpoints only"):
        npt.merge([path], output, force=True)
    assert contents(output) == before


@pytest.mark.parametrize(
    "name", ["README.md", "loss.png", "npt_weights.pt.bak", "npt_weights-old.pt", ".notes"]
)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_force_refuses_foreign_files_by_name(tmp_path: Path, name: str, folder: bool) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = one_layer(tmp_path / "out", 2)
    (output / name).mkdir() if folder else (output / name).write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(npt.MergeError, match=f"holds {re.escape(name)} beside the checkpoint"):
        npt.merge([path], output, force=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert list(read_weights(output)) == list(layer_weights(2))


def test_a_folder_with_the_name_of_a_checkpoints_file_is_foreign(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = one_layer(tmp_path / "out", 2)
    (output / "training_state.pt").mkdir()
    with pytest.raises(npt.MergeError, match=r"holds training_state\.pt beside"):
        npt.merge([path], output, force=True)


def test_a_foreign_file_that_appears_while_merging_is_kept(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = one_layer(tmp_path / "out", 2)

    def progress(activity: str, done: int, total: int) -> None:
        (output / "notes.txt").write_text("mine")

    with pytest.raises(npt.MergeError, match=r"holds notes\.txt beside"):
        npt.merge([path], output, force=True, progress=progress)
    assert (output / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_force_replaces_everything_that_a_merge_writes(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    options = npt.MergeOptions(format="safetensors", max_shard_size=999)
    npt.merge([path], tmp_path / "out", verify=True, options=options)
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert sum("-of-" in name for name in written) > 1
    npt.merge([path], tmp_path / "out", verify=True, force=True)
    assert not any("-of-" in p.name for p in (tmp_path / "out").iterdir())


def test_an_empty_folder_holds_nothing_to_lose(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    output = tmp_path / "out"
    output.mkdir()
    refuse(tmp_path, [path], "already exists")
    npt.merge([path], output, force=True)
    assert_same_tensors(read_weights(output), read_weights(path))


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_b_up_up"][0, 0] = torch.nan
    path = write_checkpoint(tmp_path / "a", weights)
    old = one_layer(tmp_path / "out", 2)
    before = contents(old)
    with pytest.raises(npt.VerificationError):
        npt.merge([path], old, verify=True, force=True)
    assert contents(old) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(npt.NPTError) as caught:
        npt.merge([path], tmp_path / "file" / "out")
    assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_verify_finds_values_that_are_not_finite(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    weights = layer_weights(1, dtype=dtype)
    weights["layer_1_np.W_a_up_down"][3, 5] = bad
    path = write_checkpoint(tmp_path / "a", weights)
    with pytest.raises(npt.VerificationError) as caught:
        npt.merge([path], tmp_path / "out", verify=True)
    (problem,) = caught.value.problems
    assert problem.startswith(str(path / "npt_weights.pt"))  # the source is to blame
    assert "layer_1_np.W_a_up_down: 1 value is NaN or infinite" in problem
    assert str(caught.value) == f"{tmp_path / 'out'}: not written: {problem}"
    assert caught.value.exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    npt.merge([path], tmp_path / "out")  # only --verify looks at values
    assert_same_tensors(read_weights(tmp_path / "out"), weights)


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    before = os.umask(0o027)
    try:
        npt.merge([path], tmp_path / "out", verify=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


def test_paths_that_are_not_unicode(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    path = one_layer(odd, 1)
    npt.merge([path], tmp_path / "out", verify=True)
    assert npt.verify(tmp_path / "out").passed


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    """JSON can hold half a surrogate pair; a text that can be read must be writable."""
    path = one_layer(tmp_path / "a", 1)
    (path / "config.json").write_text('{"model_name": "m", "note": "\\ud800"}')
    npt.merge([path], tmp_path / "out", verify=True)
    assert json_of(tmp_path / "out" / "config.json")["note"] == "\ud800"


def test_progress_is_by_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    path = trained_checkpoint(tmp_path / "a", 1)
    npt.merge([path], tmp_path / "out", verify=True, progress=lambda *call: calls.append(call))
    for activity in ("merging", "verifying"):
        done = [call[1] for call in calls if call[0] == activity]
        (total,) = {call[2] for call in calls if call[0] == activity}
        assert done == sorted(done) and done[0] == 0
        assert done[-1] == total > 0


def test_curriculum_survives_a_merge_of_merges(tmp_path: Path) -> None:
    paths = [
        write_checkpoint(
            tmp_path / str(n),
            layer_weights(n),
            multi_layer_state=multi_layer_state([n], layer_weights={n: n / 4}),
        )
        for n in (1, 2, 3)
    ]
    npt.merge(paths[:2], tmp_path / "v1")
    npt.merge([tmp_path / "v1", paths[2]], tmp_path / "v2")
    state = torch.load(tmp_path / "v2" / "multi_layer_state.pt", weights_only=True)
    assert state["layer_weights"] == {1: 0.25, 2: 0.5, 3: 0.75}
