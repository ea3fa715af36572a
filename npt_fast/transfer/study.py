"""Study what injections move: the same relation, another one, unrelated sentences, nothing.

An injection shows that knowledge moves only beside its controls. The base model, patched with its
own attention outputs, is the ceiling: it is what NP layers without an error would compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from npt_fast.arguments import Positive, check_arguments
from npt_fast.config import Injection, InjectionMode
from npt_fast.errors import ModelError, TransferError
from npt_fast.hf.convert import AnyModel, components, disabled
from npt_fast.hf.tokenizer import Reading, Tokenizer, first_token, read
from npt_fast.transfer.attention import attention_hooks, batches, next_logits
from npt_fast.transfer.bake import bake
from npt_fast.transfer.extract import enabled_layers, extract
from npt_fast.transfer.inject import injecting
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.study_report import study_folder
from npt_fast.transfer.study_results import Condition, Known, Row, Study
from npt_fast.transfer.suite import Relation, Suite, default_suite, filled

MODES: tuple[InjectionMode, ...] = ("replace", "exact-add")
STRENGTHS = (1.0, 2.0)
NOTHING, SAME, OTHER, UNRELATED = "nothing", "same relation", "other relation", "unrelated"
REWORDED = "same, paraphrased"


@dataclass(frozen=True, slots=True)
class _Object:
    """What the base model answers: the object of a subject, and its first token."""

    text: str
    token: int


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two subjects of a relation whose objects the base model knows.

    `texts` has what is injected, by `Condition.injected`; without OTHER if there is none.
    """

    target: str
    source: str
    own: _Object
    moved: _Object
    other_relation: str
    crossed: _Object | None
    prompt: str
    texts: Mapping[str, str]


@check_arguments
@torch.no_grad()
def study(
    model: AnyModel,
    tokenizer: Tokenizer,
    suite: Suite | None = None,
    *,
    relations: Sequence[str] = (),
    modes: Sequence[InjectionMode] = MODES,
    strengths: Sequence[float] = STRENGTHS,
    pairs: Positive = 10,
    seed: int = 0,
    baked: bool = False,
    special_tokens: bool = True,
    chat: bool = False,
    output: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Study:
    """Inject texts about one subject into prompts about another, with controls.

    Pairs are made of subjects whose object is the base model's likeliest next token. Into the last
    token of a prompt about the one goes what is extracted at the last token of: the same prompt
    about the other (does its object come on top?); another relation's prompt about the other (which
    of its objects wins?); an unrelated sentence; nothing. The base model is measured, too, as it
    is and with its own attention outputs after those texts in the place of the prompt's, in the
    same layers.

    Args:
        model: Model with NP layers; those that are on are extracted from and injected into.
        tokenizer: Tokenizer of the model.
        suite: Relations and controls; the default suite if None.
        relations: Names of the suite's relations to study; all if empty. The others are still
            injected as other relations.
        modes: Modes of the injections.
        strengths: Strengths of the injections, in each mode.
        pairs: Largest number of pairs of a relation.
        seed: Seed of the choice of pairs, and of intervals.
        baked: Measure what `npt_fast.bake` does with the source's text, too, at each strength: to a
            prompt about another subject, the target, and to paraphrases of it.
        special_tokens: As in `npt_fast.extract`.
        chat: As in `npt_fast.extract`.
        output: Folder to create for tables and pictures; None for none.
        progress: Called with a line before each relation.

    Returns:
        One row for each pair and condition; `Study.summaries` has means and intervals.

    Raises:
        ModelError: no NP layer is on.
        TransferError: the suite has no relations or not one of `relations`, the base model knows
            no two subjects of any relation, a mode is unknown, or `output` exists or cannot be
            written.
    """
    suite = suite or default_suite()
    if not suite.relations:
        raise TransferError("the suite has no relations, which a study needs")
    on = enabled_layers(components(model))
    if not on:
        raise ModelError("the model has no NP layers that are on; load a checkpoint first")
    reading = Reading(special_tokens=special_tokens, chat=chat)
    settings = list(product(modes, strengths))
    run = _Run(model, tokenizer, reading, on)
    tell = progress or (lambda line: None)
    with nullcontext() if output is None else study_folder(output) as write:
        tell("what the base model knows")
        objects = {relation.name: run.known(relation) for relation in suite.relations}
        known: list[Known] = []
        rows: list[Row] = []
        for relation in suite.named(relations):
            name, answered = relation.name, list(objects[relation.name])
            chosen = list(islice(_pairs(relation, suite, objects, seed), pairs))
            known.append(Known(name, relation.prompt, len(relation.pairs), answered, len(chosen)))
            if not chosen:
                continue
            tell(f"{name}: {len(chosen)} pairs")
            rows += run.rows(relation, chosen, settings)
            if baked:
                rows += run.baked(relation, chosen, strengths)
        if not rows:
            raise TransferError(
                "the base model knows no two subjects of a relation with different objects; "
                "see which token it gives, and write the prompts in another way"
            )
        found = Study(on, str(reading), seed, known, rows)
        if write is not None:
            write(found)
    return found


def _pairs(
    relation: Relation, suite: Suite, objects: Mapping[str, Mapping[str, _Object]], seed: int
) -> Iterator[_Pair]:
    """Pairs in a shuffled ring, so that the first of them use each subject once in each role."""
    own = objects[relation.name]
    subjects = list(own)
    Random(f"{seed} {relation.name}").shuffle(subjects)
    number = 0
    for step in range(1, len(subjects)):
        for place, target in enumerate(subjects):
            source = subjects[(place + step) % len(subjects)]
            taken = {own[target].token, own[source].token}
            if len(taken) == 1:  # which of the two is on top could not be told
                continue
            texts = {
                SAME: relation.about(source),
                UNRELATED: suite.controls[number % len(suite.controls)],
            }
            others = [
                other
                for other in suite.relations
                if other is not relation
                and source in objects[other.name]
                and objects[other.name][source].token not in taken
            ]
            other = others[number % len(others)] if others else None
            if other is not None:
                texts[OTHER] = other.about(source)
            yield _Pair(
                target, source, own[target], own[source],
                "" if other is None else other.name,
                None if other is None else objects[other.name][source],
                relation.about(target), texts,
            )  # fmt: skip
            number += 1


class _Run:
    """Passes of one model, in one reading."""

    def __init__(self, model: Any, tokenizer: Any, reading: Reading, layers: list[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reading = reading
        self.layers = layers

    def known(self, relation: Relation) -> dict[str, _Object]:
        """The objects that the base model gives, by subject."""
        with disabled(self.model):
            tops = self._logits([relation.about(s) for s in relation.pairs]).argmax(-1).tolist()
        found = {}
        for (subject, text), top in zip(relation.pairs.items(), tops, strict=True):
            token = first_token(self.tokenizer, relation.separator + text)
            if token == top:
                found[subject] = _Object(text, token)
        return found

    def rows(
        self, relation: Relation, pairs: list[_Pair], settings: list[tuple[InjectionMode, float]]
    ) -> Iterator[Row]:
        """Rows of all pairs under each condition."""
        prompts = [pair.prompt for pair in pairs]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair.texts.values()))
        with disabled(self.model):
            outputs = self._attention(texts)
            yield from self._scored(
                relation, pairs, Condition("base model", None, NOTHING), self._logits(prompts)
            )
            for what, some in _by_text(pairs):
                given = [outputs[pair.texts[what]] for pair in some]
                logits = self._logits([p.prompt for p in some], partial(self._patched, given))
                yield from self._scored(
                    relation, some, Condition("base patched", None, what), logits
                )
        yield from self._scored(
            relation, pairs, Condition("no injection", None, NOTHING), self._logits(prompts)
        )
        modulations = {
            text: extract(self.model, self.tokenizer, text, **asdict(self.reading))
            for text in texts
        }
        for mode, strength in settings:
            injection = Injection(mode=mode, strength=strength)
            for what, some in _by_text(pairs):
                chosen = [modulations[pair.texts[what]] for pair in some]
                during = partial(self._injected, injection, chosen)
                logits = self._logits([pair.prompt for pair in some], during)
                yield from self._scored(relation, some, Condition(mode, strength, what), logits)

    def baked(
        self, relation: Relation, pairs: list[_Pair], strengths: Sequence[float]
    ) -> Iterator[Row]:
        """Rows of all pairs with the source's modulation in the base weights."""
        for strength, pair in product(strengths, pairs):
            prompts = [pair.prompt, *(filled(p, pair.target) for p in relation.paraphrases)]
            modulation = extract(
                self.model, self.tokenizer, pair.texts[SAME], **asdict(self.reading)
            )
            changed = bake(self.model, modulation, strength)
            try:
                logits = self._logits(prompts)
            finally:
                changed.undo()
            for number, prompt in enumerate(prompts):
                what = REWORDED if number else SAME
                asked = replace(pair, prompt=prompt, texts={**pair.texts, what: pair.texts[SAME]})
                condition = Condition("baked", strength, what)
                yield from self._scored(relation, [asked], condition, logits[number : number + 1])

    def _logits(
        self,
        texts: Sequence[str],
        during: Callable[[list[int]], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> Tensor:
        """Next-token logits of texts, ``(texts, vocab)``; passes run in ``during(rows)``."""
        ids = [read(self.tokenizer, text, self.reading).ids for text in texts]
        found: dict[int, Tensor] = {}
        for batch in batches(ids):
            with during(batch):
                logits = next_logits(self.model, [ids[row] for row in batch])
            found.update(zip(batch, logits, strict=True))
        return torch.stack([found[row] for row in range(len(ids))])

    def _attention(self, texts: Sequence[str]) -> dict[str, dict[int, Tensor]]:
        """Attention outputs ``(D,)`` at the last token, by text and layer."""
        found: dict[str, dict[int, Tensor]] = {text: {} for text in texts}

        def during(batch: list[int]) -> AbstractContextManager[None]:
            def keep(layer: int, attention: Tensor) -> None:
                for row, output in zip(batch, attention[:, -1], strict=True):
                    found[texts[row]][layer] = output

            return attention_hooks(self.model, self.layers, keep)

        self._logits(texts, during)
        return found

    def _patched(
        self, outputs: Sequence[Mapping[int, Tensor]], batch: list[int]
    ) -> AbstractContextManager[None]:
        """Put attention outputs in the place of those of the last token of each row."""

        def put(layer: int, attention: Tensor) -> None:
            attention[:, -1] = torch.stack([outputs[row][layer] for row in batch])

        return attention_hooks(self.model, self.layers, put)

    def _injected(
        self, injection: Injection, modulations: Sequence[Modulation], batch: list[int]
    ) -> AbstractContextManager[Any]:
        return injecting(self.model, [modulations[row] for row in batch], injection)

    def _scored(
        self, relation: Relation, pairs: Sequence[_Pair], condition: Condition, logits: Tensor
    ) -> Iterator[Row]:
        method, strength, injected = condition
        for pair, row in zip(pairs, logits.double(), strict=True):
            probabilities, top = row.softmax(-1), int(row.argmax())
            crossed = pair.crossed
            winners = {pair.own.token: "own", pair.moved.token: "moved"}
            if crossed is not None:
                winners[crossed.token] = "crossed"
            yield Row(
                relation.name, pair.target, pair.source, method, strength, injected,
                pair.prompt, pair.texts.get(injected, ""), pair.own.text, pair.moved.text,
                pair.other_relation, "" if crossed is None else crossed.text,
                probabilities[pair.own.token].item(), probabilities[pair.moved.token].item(),
                None if crossed is None else probabilities[crossed.token].item(),
                str(self.tokenizer.decode([top])), winners.get(top, ""),
            )  # fmt: skip


def _by_text(pairs: Sequence[_Pair]) -> Iterator[tuple[str, list[_Pair]]]:
    """Each kind of text, with the pairs that have one."""
    for what in (SAME, OTHER, UNRELATED):
        some = [pair for pair in pairs if what in pair.texts]
        if some:
            yield what, some
