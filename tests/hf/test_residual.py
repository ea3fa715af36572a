"""What happens to the attention output of layers of which no file says it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_fast as npt
from npt_fast.config import Residual
from npt_fast.errors import NPTWarning
from npt_fast.hf import checkpoint as loading
from npt_fast.hf.base_model import load_base_model, save_base_model
from npt_fast.hf.residual import judge, probe_residuals
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny

LAYER = 1
SIZES = {"d": 32, "f": 48}
WIDE = 256


def base() -> Any:
    return tiny.model(initializer_range=0.3)


def residual_of(model: Any) -> str:
    return npt.status(model)[0].residual


# the decision, on numbers ----------------------------------------------------------------------


def outputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a base layer: of its MLP without attention in its input, attention, MLP."""
    generator = torch.Generator().manual_seed(seed)
    start, attention, moved = torch.randn(3, 4, 16, WIDE, generator=generator)
    attention[:, 3] *= 50  # an outlier
    return start, attention, start + 0.5 * attention + moved


@pytest.mark.parametrize("learned", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_the_target_is_recognised_however_far_training_went(residual: str, learned: float) -> None:
    start, attention, mlp = outputs()
    target = mlp - start + (attention if residual == "removed" else 0)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    noise *= target.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    y = start + learned * (target + noise)  # a change that is half beside the target
    assert judge(start, y, attention, mlp) == residual


def test_what_does_not_tell() -> None:
    start, attention, mlp = outputs()
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
    target = mlp - start
    for change in (
        torch.zeros_like(start),
        noise,
        target + 0.35 * attention,  # between the two
        -target,
        target * torch.tensor([1, 1, 1, -1.0]).view(4, 1, 1),  # one text disagrees
        target * float("nan"),
    ):
        assert judge(start, start + change, attention, mlp) is None


# loading ------------------------------------------------------------------------------------------


def unrecorded(path: Path, modulation: str, scale: float = 1.0) -> Path:
    weights = layer_weights(LAYER, modulation=modulation, rank=16, **SIZES)
    return write_checkpoint(path, {name: tensor * scale for name, tensor in weights.items()})


@pytest.mark.parametrize("modulation", ["single", "dual", "triple"])
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_what_is_found_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, residual: str, modulation: str
) -> None:
    monkeypatch.setattr(loading, "probe_residuals", lambda model, layers: {LAYER: residual})
    path = unrecorded(tmp_path / "a", modulation)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = npt.load(base(), path)
    assert residual_of(model) == residual
    npt.save(model, tmp_path / "saved")
    assert npt.inspect(tmp_path / "saved").layers[0].residual == residual
    said = [str(w.message) for w in seen if isinstance(w.message, NPTWarning)]
    if (residual, modulation) == ("removed", "triple"):
        assert said == []  # it is what all triple layers of the original have
    else:
        (line,) = said
        assert line.startswith(f"{path}: ") and f"residual {residual} for layers [1]" in line
        assert "--residual" in line and "\n" not in line


@pytest.mark.parametrize("modulation", ["single", "dual"])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_an_untrained_layer_is_refused_and_nothing_changes(
    tmp_path: Path, modulation: str, scale: float
) -> None:
    path = unrecorded(tmp_path / "a", modulation, scale)
    model = base()
    before = model(torch.arange(9)[None]).logits
    with pytest.raises(npt.ModelError, match=r"no file says whether layer 1 .*\(--residual\)"):
        npt.load(model, path)
    assert npt.status(model) == []
    assert torch.equal(model(torch.arange(9)[None]).logits, before)
    assert residual_of(npt.load(model, path, residual="kept")) == "kept"


def test_an_untrained_layer_of_three_projections_is_removed(tmp_path: Path) -> None:
    assert residual_of(npt.load(base(), unrecorded(tmp_path / "a", "triple"))) == "removed"


def test_the_probe_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = npt.load(base(), unrecorded(tmp_path / "a", "dual"), residual="kept")
    ids = torch.arange(9)[None]
    state, logits = torch.get_rng_state(), model(ids).logits
    probe_residuals(model, [LAYER])
    assert torch.equal(model(ids).logits, logits) and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_has_the_layer_keeps_its_residual(tmp_path: Path) -> None:
    path = unrecorded(tmp_path / "a", "dual")
    model = npt.load(base(), path, residual="kept")
    assert residual_of(npt.load(model, path)) == "kept"
    with pytest.raises(npt.ModelError, match="residual removed; the model's is"):
        npt.load(model, path, residual="removed")


@pytest.fixture(scope="module")
def two_real_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of SmolLM2-135M, with the tokens of single bytes alone.

    Random layers learn too little of their target for a verdict; all of the real ones, and the
    whole vocabulary, would take 15 times as long.
    """
    whole, tokenizer = load_base_model(str(smollm2), dtype="float32")
    tokens = tiny.tokenizer()
    ids = whole.get_input_embeddings().weight.new_zeros(len(tokens), dtype=torch.long)
    for token, index in tokens.get_vocab().items():
        ids[index] = tokenizer.convert_tokens_to_ids(token) or 0
    config = copy.deepcopy(whole.config)
    config.update({"num_hidden_layers": 2, "vocab_size": len(ids), "bos_token_id": None})
    config.update({"eos_token_id": 0, "pad_token_id": 0})
    model = type(whole)(config)
    embedding = whole.get_input_embeddings().weight[ids]
    model.load_state_dict(whole.model.layers.state_dict(prefix="model.layers."), strict=False)
    model.get_input_embeddings().weight.data.copy_(embedding)
    folder = tmp_path_factory.mktemp("two_real_layers")
    save_base_model(model, tokens, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["removed", "kept"])
def test_a_briefly_trained_layer_of_a_real_model(
    two_real_layers: Path, tmp_path: Path, residual: Residual
) -> None:
    options = npt.TrainOptions(
        train_layers="1", model_name=str(two_real_layers), data="python-docs",
        output_dir=tmp_path / "run", modulation="dual", residual=residual, np_rank=64,
        learning_rate=2e-4, lr_schedule="constant", max_length=64,
        batch_size=4, gradient_accumulation_steps=1, max_steps=20, warmup_steps=5, eval_steps=0,
        num_eval_samples=1, generation_steps=0, cpu=True, init_strategy="zero",
    )  # fmt: skip
    path = npt.train(options).checkpoint
    (path / "npt_config.json").unlink()
    model, _ = load_base_model(str(two_real_layers))
    with pytest.warns(NPTWarning, match=f"residual {residual} for layers"):
        assert residual_of(npt.load(model, path)) == residual


# records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "OLD", "v2", "NEW"])
def test_the_originals_record_is_read_and_survives_merges(tmp_path: Path, version: str) -> None:
    residual = "kept" if version in ("v1", "OLD") else "removed"
    other = "removed" if residual == "kept" else "kept"
    path = unrecorded(tmp_path / "a", "dual")
    (path / "training_metadata.json").write_text(json.dumps({"architecture_version": version}))
    npt.merge([path], tmp_path / "merged")
    for place in (path, tmp_path / "merged"):
        assert npt.inspect(place).layers[0].residual == residual
        assert residual_of(npt.load(base(), place)) == residual
        line = f"layer 1 is recorded with residual {residual}, which residual {other} contradicts"
        with pytest.raises(npt.ModelError, match=line):
            npt.load(base(), place, residual=other)


def test_the_tools_default_says_nothing_of_three_projections(tmp_path: Path) -> None:
    path = unrecorded(tmp_path / "a", "triple")
    (path / "training_metadata.json").write_text('{"architecture_version": "v1"}')
    assert npt.inspect(path).layers[0].residual == "removed"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"architecture_version": "v3"}', "architecture_version"),
        ('{"architecture_version": 2}', "architecture_version"),
        ('{"architecture_version": "v1", "architecture_version": "v2"}', "occurs twice"),
        ("[]", "object"),
        ("", "is empty"),
    ],
)
def test_a_record_that_cannot_be_read(tmp_path: Path, content: str, problem: str) -> None:
    path = unrecorded(tmp_path / "a", "dual")
    (path / "training_metadata.json").write_text(content)
    for verb in (npt.inspect, lambda path: npt.merge([path], tmp_path / "out")):
        with pytest.raises(npt.CheckpointError) as caught:
            verb(path)
        line = str(caught.value)
        assert line.startswith(f"{path / 'training_metadata.json'}: ") and problem in line
    assert not (tmp_path / "out").exists()


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(npt.OptionError, match="residual must be one of removed, kept or None"):
        npt.load(base(), tmp_path, residual="gone")  # type: ignore[arg-type]
