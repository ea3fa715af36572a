"""The operations of an interactive session, each of which can be undone."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.config import Injection, Position
from npt_fast.errors import CheckpointError, ModelError, TransferError, printable, suggestion
from npt_fast.hf.convert import components
from npt_fast.hf.tokenizer import DEFAULT_READING, PLAIN, Reading, first_token, read
from npt_fast.paths import is_directory, path_errors, user_path
from npt_fast.schema import shown
from npt_fast.transfer import bake as baking
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.compare import Comparison, Sweep, compare, sweep
from npt_fast.transfer.expression import evaluate
from npt_fast.transfer.extract import digest, extract
from npt_fast.transfer.generate import Sampling, continue_ids
from npt_fast.transfer.modulation import Modulation
from npt_fast.transfer.session_state import Item, State, read_modulation, read_state, write_state

_NO_EFFECT = 1e-9  # nats of KL; a no-op injection leaves rounding errors of float32 logits


@dataclass(frozen=True)
class Prediction:
    """A continuation without injection.

    Attributes:
        prompt: Texts of the prompt's tokens.
        continuation: Texts of the generated tokens.
        text: `continuation` decoded as a whole.
        top: Likeliest next tokens and their probabilities.
        tracked: Tracked tokens and their probabilities.
    """

    prompt: list[str]
    continuation: list[str]
    text: str
    top: list[tuple[str, float]]
    tracked: list[tuple[str, float]]


@dataclass(frozen=True)
class InjectionResult:
    """The effect of an injection.

    Attributes:
        comparison: The text continued without and with the injection.
        left_out: Layers of the modulation that are off and received nothing.
        no_effect: Reason why nothing changed; empty if something did.
    """

    comparison: Comparison
    left_out: list[int]
    no_effect: str


class Session:
    """A model, its state, and the operations that the shell's commands call.

    Args:
        model: Model with NP layers.
        tokenizer: Tokenizer of the model.
        reading: How texts become tokens, at first.

    Attributes:
        available: Indices of all NP layers.
        state: Everything that commands change, except base weights.

    Raises:
        ModelError: the model has no NP layers.
    """

    def __init__(self, model: Any, tokenizer: Any, reading: Reading = DEFAULT_READING) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.available = tuple(components(model))
        if not self.available:
            raise ModelError("no NPT layers are loaded")
        self._first = State(MappingProxyType({}), (), self.available, Sampling(), reading)
        self.state = self._first
        self._undo: list[tuple[str, State, baking.Baked | None]] = []
        self._activate()

    @property
    def bakes(self) -> int:
        """Number of modulations that are baked into the base weights now."""
        return sum(baked is not None for _, _, baked in self._undo)

    def modulation(self, name: str) -> Modulation:
        """The modulation of this name.

        Raises:
            TransferError: there is none on the shelf.
        """
        return self.item(name).modulation

    def item(self, name: str) -> Item:
        """The modulation of this name with the time it was made; raises like `modulation`."""
        shelf = self.state.shelf
        if name not in shelf:
            there = f"; there are {', '.join(sorted(shelf))}" if shelf else "; extract one first"
            raise TransferError(
                f"no modulation is called {shown(name)}{suggestion(name, shelf) or there}"
            )
        return shelf[name]

    def extract(
        self, name: str, text: str, *, position: Position = -1, sequence: bool = False
    ) -> Modulation:
        """Extract a text's modulation from the layers that are on, and put it on the shelf.

        Args:
            name: Name on the shelf; an older modulation of that name is replaced.
            text: Text that the model reads.
            position: Token whose modulation is taken.
            sequence: Take the mean over all tokens instead.
        """
        found = extract(
            self.model,
            self.tokenizer,
            text,
            position="all" if sequence else position,
            layers=self.state.layers,
            reduce="mean" if sequence else "none",
            **asdict(self.state.reading),
        )
        return self._keep(name, found, f"extract {name}")

    def combine(self, name: str, result: Modulation) -> Modulation:
        """Put the result of arithmetic on the shelf."""
        return self._keep(name, result, f"{name} = {result.description}")

    def calculate(self, name: str, expression: str) -> Modulation:
        """Put the value of an expression on the shelf; see `npt_fast.transfer.expression`."""
        result = evaluate(expression, self.modulation)
        return self._keep(name, result, f"{name} = {expression.strip()}")

    def delete(self, name: str) -> None:
        """Take a modulation off the shelf."""
        self.item(name)
        shelf = {key: item for key, item in self.state.shelf.items() if key != name}
        self._change(f"delete {name}", shelf=MappingProxyType(shelf))

    def _keep(self, name: str, modulation: Modulation, what: str) -> Modulation:
        item = Item(modulation, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self._change(what, shelf=MappingProxyType({**self.state.shelf, name: item}))
        return modulation

    def first_piece(self, text: str) -> tuple[str, int]:
        """The first token of a text, which is the one tracked, and the number of its tokens."""
        _, tokens = read(self.tokenizer, text, PLAIN)
        return tokens[0], len(tokens)

    def track(self, texts: Sequence[str]) -> None:
        """Report the probability of each text's first token from now on."""
        for text in texts:
            self.first_piece(text)
        new = [text for text in dict.fromkeys(texts) if text not in self.state.tracked]
        if new:
            self._change(f"track {new}", tracked=(*self.state.tracked, *new))

    def untrack(self, texts: Sequence[str]) -> None:
        """Stop reporting the probability of these texts."""
        kept = tuple(text for text in self.state.tracked if text not in texts)
        if kept != self.state.tracked:
            self._change(f"untrack {list(texts)}", tracked=kept)

    def activate(self, layers: Sequence[int]) -> None:
        """Turn these NP layers on and all others off.

        Raises:
            TransferError: one of them is not loaded.
        """
        for layer in layers:
            if layer not in self.available:
                raise TransferError(f"layer {layer} is not loaded; loaded are {self._loaded()}")
        self._change(f"layers {list(layers)}", layers=tuple(sorted(set(layers))))

    def set(self, **values: Any) -> None:
        """Change settings, which are the fields of `Sampling` and of `Reading`.

        Raises:
            TransferError: a value is not allowed.
        """
        tokens = {key: values.pop(key) for key in asdict(self.state.reading) if key in values}
        reading = replace(self.state.reading, **tokens)
        settings = replace(self.state.settings, **values)
        self._change(f"set {values | tokens}", settings=settings, reading=reading)

    def _loaded(self) -> str:
        return ", ".join(map(str, self.available))

    @torch.no_grad()
    def predict(self, text: str, sampling: Sampling | None = None, top: int = 5) -> Prediction:
        """Continue a text without injection, with the layers that are on."""
        ids, tokens = read(self.tokenizer, text, self.state.reading)
        found, logits = continue_ids(self.model, ids, sampling or self.state.settings)
        probabilities = logits[0].softmax(-1)

        def token(index: int) -> tuple[str, float]:
            return self.tokenizer.decode([index]), probabilities[index].item()

        return Prediction(
            prompt=tokens,
            continuation=[self.tokenizer.decode([i]) for i in found],
            text=self.tokenizer.decode(found),
            top=[token(i) for i in probabilities.topk(top).indices.tolist()],
            tracked=[token(first_token(self.tokenizer, t)) for t in self.state.tracked],
        )

    def inject(
        self,
        name: str,
        text: str,
        injection: Injection,
        sampling: Sampling | None = None,
    ) -> InjectionResult:
        """Continue a text without and with an injection, in the modulation's layers that are on.

        Raises:
            TransferError: all of its layers are off, or as in `npt_fast.transfer.compare.compare`.
            ModelError: as in `npt_fast.transfer.compare.compare`.
        """
        part, left_out = self._active_part(name)
        found = compare(
            self.model,
            self.tokenizer,
            part,
            text,
            injection,
            sampling=sampling or self.state.settings,
            tracked=self.state.tracked,
            reading=self.state.reading,
        )
        return InjectionResult(found, left_out, _no_effect(part, found, injection))

    def sweep(
        self,
        name: str,
        text: str,
        injection: Injection,
        strengths: Sequence[float],
    ) -> Sweep:
        """Inject into each layer alone and into all, of those that are on, at several strengths."""
        part, _ = self._active_part(name)
        return sweep(
            self.model,
            self.tokenizer,
            part,
            text,
            injection,
            strengths=strengths,
            tracked=self.state.tracked,
            reading=self.state.reading,
        )

    def bake(self, name: str, strength: float = 1.0) -> Modulation:
        """Add a modulation to the base weights, until it is undone."""
        found = self.modulation(name)
        with _uninterrupted():
            baked = baking.bake(self.model, found, strength)
            # inside the block: after weights have changed, Ctrl-C must not lose the way back
            self._undo.append((f"bake {name}", self.state, baked))
        return found

    def export_lora(self, name: str, folder: str | Path) -> Path:
        """Write a modulation as a PEFT adapter."""
        return baking.export_lora(self.modulation(name), self.model, folder)

    def _active_part(self, name: str) -> tuple[Modulation, list[int]]:
        found = self.modulation(name)
        chosen = [layer for layer in found.layers if layer in self.state.layers]
        if not chosen:
            raise TransferError(
                f"{name!r} changes layers {sorted(found.layers)}, which are off; on are "
                f"{list(self.state.layers)}; layers {','.join(map(str, sorted(found.layers)))} "
                "turns them on"
            )
        left_out = sorted(set(found.layers) - set(chosen))
        return (found.only(chosen) if left_out else found), left_out

    def undo(self) -> str:
        """Undo the last change of any kind, and say which it was.

        Raises:
            TransferError: there is no change left.
        """
        if not self._undo:
            raise TransferError("there is nothing to undo")
        with _uninterrupted():
            what, before, baked = self._undo[-1]
            if baked is not None:
                # before the change is taken off the list: an undo that fails stays possible
                baked.undo()
            self._undo.pop()
            self.state = before
            self._activate()
        return what

    def reset(self) -> None:
        """Restore the start, with base weights; `undo` brings back all but baked modulations."""
        with _uninterrupted():
            # in reverse: each undo checks that the weights are as its bake left them
            for _, _, baked in reversed(self._undo):
                if baked is not None:
                    baked.undo()
            self._undo = [("reset", self.state, None)]
            self.state = self._first
            self._activate()

    def _change(self, what: str, **changes: Any) -> None:
        self._become(what, replace(self.state, **changes))

    def _become(self, what: str, state: State) -> None:
        self._undo.append((what, self.state, None))
        self.state = state
        self._activate()

    def _activate(self) -> None:
        for layer, component in components(self.model).items():
            component.enabled = layer in self.state.layers

    def save(self, path: str | Path) -> Path:
        """Write everything but base weights into a folder, and return its path.

        Raises:
            TransferError: the folder exists and holds something else, or cannot be written.
        """
        target = user_path(path)
        write_state(self.state, self.model, target)
        return target

    def load(self, path: str | Path) -> list[str]:
        """Replace this session by a saved one, or add the modulation of one file to the shelf.

        Returns:
            Names of the modulations that were read.

        Raises:
            CheckpointError: a file is missing, damaged, or a pickle.
            ModelError: a modulation belongs to another base model, or a layer is not loaded.
        """
        source = user_path(path)
        with path_errors(source, CheckpointError):
            folder = is_directory(source)
        if not folder:
            name = printable(source.name.removesuffix(".safetensors"))
            file = SourceFile.of(source, follow_links=True)
            self._keep(name, read_modulation(file, self.model), f"load {path}")
            return [name]
        state = read_state(source, self.model)
        for text in state.tracked:
            self.first_piece(text)
        for layer in state.layers:
            if layer not in self.available:
                raise ModelError(
                    f"{source}: layer {layer} is not loaded; loaded are {self._loaded()}"
                )
        self._become(f"load {path}", state)
        return list(state.shelf)

    def description(self) -> dict[str, Any]:
        """Sizes, dtype, layers and weight digests that a replay compares, for a log's header."""
        return {
            "torch": torch.__version__,
            "base": BaseModel.of(self.model).to_dict(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "layers": list(self.available),
            **asdict(self._first.reading),
            "weights": {str(n): digest(part) for n, part in components(self.model).items()},
        }

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """SHA-256 of the terms of each of these modulations."""
        return {name: fingerprint(self.modulation(name)) for name in names}


def fingerprint(modulation: Modulation) -> str:
    """SHA-256 of a modulation's terms, with their layers and projections."""
    found = hashlib.sha256()
    for layer, name, terms in modulation.walk():
        found.update(f"{layer}.{name}".encode())
        for tensor in terms:
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _no_effect(modulation: Modulation, found: Comparison, injection: Injection) -> str:
    """The reason why an injection changed nothing; empty if it changed something."""
    if max(found.kls) > _NO_EFFECT or found.no_injection != found.injected:
        return ""
    if injection.strength == 0 and injection.mode != "replace":
        return "the strength is 0"
    origin = modulation.origin
    own = found.prompt[: max(found.positions, default=-1) + 1]
    if origin.get("tokens") and found.positions == origin.get("positions"):
        if origin["tokens"][: len(own)] == own:
            return "the injected modulation is the token's own"
    if all(not t.v_b.any() or not t.v_a.any() for _, _, t in modulation.walk()):
        return "the modulation is zero"
    return "the weight changes of these layers do not affect this text"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, so that weights and the list of changes to undo stay consistent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
