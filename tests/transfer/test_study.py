"""Each condition of a study against its definition: dense weights, and hooks of our own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.errors import ModelError, TransferError
from npt_fast.transfer.study_results import Row, Study
from npt_fast.transfer.suite import Relation, Suite
from tests.transfer import models
from tests.transfer.injected import truth
from tests.transfer.known import known_relations

tokenizer = models.tokenizer
CONTROLS = ("the wet road", "a kind of tea")
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.converted()


@pytest.fixture(scope="module")
def suite(model: Any) -> Suite:
    """Two relations of the same subjects; one more subject of the first is not known."""
    found = known_relations(model, tokenizer, one="{}", two="of {}")
    found[0]["pairs"]["zz"] = "<eos>"
    relations = [Relation(**relation) for relation in found]
    return Suite(relations=relations, controls=CONTROLS)


@pytest.fixture(scope="module")
def study(model: Any, suite: Suite) -> Study:
    return npt.study(
        model, tokenizer, suite, modes=["replace", "exact-add"], strengths=[0.5, 2.0], pairs=5
    )


@contextmanager
def patched(model: Any, text: str) -> Iterator[None]:
    """The base model with the last attention outputs of another text."""
    with npt.disabled(model), ExitStack() as stack:
        kept = models.attention_outputs(model, text, LAYERS)

        def hook(layer: int) -> Any:
            def put(_: Any, __: Any, out: Any) -> Any:
                changed = out.clone()
                changed[0, -1] = kept[layer][-1]
                return changed

            return put

        for layer in LAYERS:
            part = model.model.layers[layer].self_attn.o_proj
            stack.callback(part.register_forward_hook(hook(layer)).remove)
        yield


def expected(model: Any, row: Row) -> torch.Tensor:
    """Next-token probabilities under a row's condition."""
    ids = models.ids_of(row.prompt)
    if row.method == "base model":
        context: Any = npt.disabled(model)
    elif row.method == "no injection":
        context = nullcontext()
    elif row.method == "base patched":
        context = patched(model, row.text)
    else:
        assert row.strength is not None
        m = npt.extract(model, tokenizer, row.text)
        mode: Any = row.method
        context = truth(model, m, [[ids.shape[1] - 1]], mode, row.strength)
    with context:
        return models.logits(model, ids)[0, -1].softmax(-1)


def test_every_condition_is_its_definition(model: Any, study: Study, suite: Suite) -> None:
    assert study.layers == list(LAYERS)
    objects = {relation.name: relation.pairs for relation in suite.relations}
    for row in study.rows:
        other = {"one": "two", "two": "one"}[row.relation]
        assert (row.own, row.moved) == tuple(
            objects[row.relation][subject] for subject in (row.target, row.source)
        )
        prompt = {"one": "{}", "two": "of {}"}
        text = {
            "nothing": "",
            "same relation": prompt[row.relation].format(row.source),
            "other relation": prompt[other].format(row.source),
            "unrelated": row.text,
        }[row.injected]
        assert row.text == text and row.prompt == prompt[row.relation].format(row.target)
        assert row.injected != "unrelated" or row.text in CONTROLS
        probabilities = expected(model, row)
        tokens = {"own": row.own, "moved": row.moved}
        if row.crossed:
            assert (row.other_relation, row.crossed) == (other, objects[other][row.source])
            tokens["crossed"] = row.crossed
        found = {
            "own": row.own_probability,
            "moved": row.moved_probability,
            "crossed": row.crossed_probability,
        }
        for name, text in tokens.items():
            (token,) = tokenizer(text)["input_ids"]
            assert found[name] == pytest.approx(probabilities[token].item(), rel=1e-4)
        top = tokenizer.decode([int(probabilities.argmax())])
        assert row.top == top
        assert row.winner == next((name for name, text in tokens.items() if text == top), "")
        assert row.measures["source's above own"] == (row.moved_probability > row.own_probability)


def test_baked(model: Any, suite: Suite) -> None:
    """As if dW were added to the weights by hand, and undone."""
    relation = replace(suite.relations[0], paraphrases=["so {}"])
    one = Suite(relations=[relation], controls=CONTROLS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = npt.study(model, tokenizer, one, modes=[], strengths=[0.5, 2.0], pairs=2, baked=True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    rows = [row for row in found.rows if row.method == "baked"]
    assert [(row.strength, row.injected, row.prompt) for row in rows] == [
        (strength, what, template.format(pair.target))
        for strength in (0.5, 2.0)
        for pair in (r for r in found.rows if r.method == "base model")
        for what, template in (("same relation", "{}"), ("same, paraphrased", "so {}"))
    ]
    for row in rows:
        assert row.text == row.source and row.strength is not None
        m = npt.extract(model, tokenizer, row.text)
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for layer, name, terms in m.walk():
                module = changed.model.layers[layer].mlp.get_submodule(f"{name}_proj")
                module.weight += row.strength * terms.dense()
        probabilities = models.logits(changed, models.ids_of(row.prompt))[0, -1].softmax(-1)
        (token,) = tokenizer(row.moved)["input_ids"]
        assert row.moved_probability == pytest.approx(probabilities[token].item(), rel=1e-4)
        assert row.top == tokenizer.decode([int(probabilities.argmax())])


def test_the_conditions(study: Study) -> None:
    """Each pair has all of them, but for other relations that it lacks."""
    texts = ("same relation", "other relation", "unrelated")
    settings = [("replace", 0.5), ("replace", 2.0), ("exact-add", 0.5), ("exact-add", 2.0)]
    wanted = {
        ("base model", None, "nothing"), ("no injection", None, "nothing"),
        *(("base patched", None, text) for text in texts),
        *((mode, strength, text) for mode, strength in settings for text in texts),
    }  # fmt: skip
    crossed = 0
    for pair in {(row.relation, row.target, row.source) for row in study.rows}:
        rows = [row for row in study.rows if (row.relation, row.target, row.source) == pair]
        crossed += bool(rows[0].crossed)
        lacking = set() if rows[0].crossed else {c for c in wanted if c[2] == "other relation"}
        assert {tuple(row.condition) for row in rows} == wanted - lacking
        assert len(rows) == len(wanted - lacking)
    assert crossed


def test_what_the_base_model_knows(study: Study) -> None:
    one, two = study.known
    assert (one.relation, one.subjects, len(one.known), one.pairs) == ("one", 5, 4, 5)
    assert "zz" not in one.known and two.subjects == 4
    base = [row for row in study.rows if row.method == "base model"]
    assert {row.winner for row in base} == {"own"}
    assert len(base) == one.pairs + two.pairs


def test_pairs(model: Any, suite: Suite) -> None:
    """The first use every subject once in each role; a seed decides, and all pairs differ."""

    def chosen(seed: int, pairs: int) -> list[tuple[str, str]]:
        found = npt.study(
            model, tokenizer, suite, relations=["one"], modes=[], pairs=pairs, seed=seed
        )
        assert {row.relation for row in found.rows} == {"one"}
        assert any(row.injected == "other relation" for row in found.rows)
        return [(r.target, r.source) for r in found.rows if r.method == "base model"]

    first = chosen(0, 4)
    assert {t for t, _ in first} == {s for _, s in first} == set(suite.relations[0].pairs) - {"zz"}
    assert all(t != s for t, s in first)
    every = chosen(0, 99)
    assert len(set(every)) == len(every) == 12 and every[:4] == first == chosen(0, 4)
    assert len({tuple(chosen(seed, 4)) for seed in range(4)}) > 1


def test_what_cannot_be_studied(model: Any, suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="has no relations"):
        npt.study(model, tokenizer, Suite())
    unknown = Suite(
        relations=[Relation(name="a", prompt="{}", pairs={"a": "<eos>", "b": "<eos>"})],
        controls=CONTROLS,
    )
    with pytest.raises(TransferError, match="knows no two subjects"):
        npt.study(model, tokenizer, unknown)
    for without in (models.base(), None):
        with pytest.raises(ModelError, match="no NP layers that are on"):
            if without is not None:
                npt.study(without, tokenizer, suite)
            with npt.disabled(model):
                npt.study(model, tokenizer, suite)
    mode: Any = "ad"
    with pytest.raises(npt.OptionError, match="modes must be a list, each item one of replace"):
        npt.study(model, tokenizer, suite, modes=[mode], output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TransferError, match="unknown relation 'onee'; did you mean 'one'"):
        npt.study(model, tokenizer, suite, relations=["onee"])
    assert models.hooks(model) == models.hooks(models.converted())
