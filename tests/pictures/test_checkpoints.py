"""Norms, spectra, fidelity and provenance are read back from the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.checkpoint.certificate import Certificate, Closeness
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.errors import NPTError
from npt_fast.pictures.checkpoints import draw_checkpoints
from npt_fast.pictures.figure import figure_class
from npt_fast.pictures.provenance import draw_provenance, provenance
from tests.checkpoints import layer_weights, trained_checkpoint, write_checkpoint
from tests.hub import Hub

CERTIFICATE = Certificate(
    (3, 5), 7, "docs", Closeness(10, 0.25, 1.5),
    {"news": Closeness(10, 0.5, None), "code": Closeness(10, 0.125, 1.25)},
)  # fmt: skip


def axes_of(figure: Any) -> dict[str, Any]:
    """The panels of all subfigures, by their titles or else their labels."""
    return {axes.get_title() or axes.get_ylabel(): axes for axes in figure.get_axes()}


def all_axes(figure: Any) -> dict[str, Any]:
    found = axes_of(figure)
    for inner in figure.subfigs:
        found |= all_axes(inner)
    return found


def norm(weights: dict[str, torch.Tensor], start: str) -> float:
    found = torch.cat([w.flatten() for name, w in weights.items() if name.startswith(start)])
    return float(found.double().norm())


def test_norms_and_spectra(tmp_path: Path) -> None:
    weights = {
        **layer_weights(3, num_ranks=2), **layer_weights(5, num_ranks=3, modulation="single")
    }  # fmt: skip
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "a", weights))
    found = all_axes(draw_checkpoints([checkpoint]))
    assert list(found) == [
        "W_down", "W_a_up", "W_b_up",
        "spectrum of W_down", "spectrum of W_a_up", "spectrum of W_b_up",
    ]  # fmt: skip
    for stem in ("W_down", "W_a_up", "W_b_up"):
        bars = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in found[stem].patches}
        expected = [
            norm(weights, f"layer_3_np.{stem}_gate."),
            norm(weights, f"layer_3_np.{stem}_up."),
            norm(weights, f"layer_3_np.{stem}_down."),
            norm(weights, f"layer_5_np.{stem}."),
        ]
        assert [bars[x] for x in sorted(bars)] == pytest.approx(expected)
        assert [text.get_text() for text in found[stem].get_xticklabels()] == ["3", "5"]
        lines = found[f"spectrum of {stem}"].lines
        assert len(lines) == 4
        values = torch.stack(
            [torch.linalg.svdvals(weights[f"layer_5_np.{stem}.{i}"].double()) for i in range(3)]
        )
        assert list(lines[3].get_xdata()) == [1, 2, 3, 4]
        assert list(lines[3].get_ydata()) == pytest.approx(values.median(0).values.tolist())


def test_fidelity_is_drawn_once_for_layers_of_one_run(tmp_path: Path) -> None:
    weights = {**layer_weights(3), **layer_weights(5), **layer_weights(6)}
    folder = write_checkpoint(tmp_path / "a", weights)
    layers = {n: {"certificate": CERTIFICATE.to_dict()} if n != "6" else {} for n in "356"}
    for about in layers.values():
        about |= {"modulation": "triple", "num_ranks": 1, "rank": 4}
    (folder / "npt_config.json").write_text(json.dumps({"format_version": 1, "layers": layers}))
    found = all_axes(draw_checkpoints([open_checkpoint(folder)]))
    kl = found["KL from the base model, nats"]
    assert [bar.get_height() for bar in kl.patches] == [0.25, 0.5]
    assert [text.get_text() for text in kl.get_xticklabels()] == ["3,5"]
    ratio = found["perplexity over the base model's"]
    assert [bar.get_y() + bar.get_height() for bar in ratio.patches] == [1.5, 1]
    assert [text.get_text() for text in ratio.texts] == ["not finite"]


def labels(figure: Any) -> list[str]:
    (axes,) = figure.get_axes()
    return [text.get_text() for text in axes.texts]


def test_provenance_goes_through_merges_and_joins(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for layer in (3, 5):
        trained_checkpoint(tmp_path / f"run{layer}" / "checkpoints" / "checkpoint-3", layer)
    npt.merge(["run3/checkpoint-3", "run5/checkpoint-3"], "both")
    options = npt.MergeOptions(on_conflict="concat")
    npt.merge(["both", "run3/checkpoint-3"], "joined", options=options)
    assert sorted(labels(draw_provenance(open_checkpoint("joined")))) == [
        "both\nlayers 3,5", "joined\nlayers 3,5",
        "run3/checkpoint-3\nlayer 3, step 3", "run3/checkpoint-3\nlayer 3, step 3",
        "run5/checkpoint-3\nlayer 5, step 3",
    ]  # fmt: skip
    whole = all_axes(draw_checkpoints([open_checkpoint("joined"), open_checkpoint("both")]))
    assert "where the layers come from" in whole
    with pytest.raises(NPTError, match="records no sources"):
        draw_provenance(open_checkpoint("run3/checkpoint-3"))


def merged(folder: Path, sources: dict[int, tuple[str, list[str]]]) -> Any:
    weights = {key: value for n in sources for key, value in layer_weights(n, d=2, f=2).items()}
    write_checkpoint(folder, weights)
    layers = {n: {"source": source, "chain": chain} for n, (source, chain) in sources.items()}
    (folder / "merge_summary.json").write_text(json.dumps({"layers": layers}))
    return open_checkpoint(folder)


def test_what_is_too_large_to_draw(tmp_path: Path) -> None:
    """A file of a few bytes could otherwise ask for a picture of a kilometre."""
    long = merged(tmp_path / "long", {3: ("a", [f"{n}" for n in range(5000)])})
    with pytest.raises(NPTError, match=r"long: layer 3 went through 5,001 merges"):
        provenance(long)
    wide = merged(tmp_path / "wide", {n: (f"{n}", []) for n in range(130)})
    with pytest.raises(NPTError, match="wide: has layers of 130 checkpoints, too many"):
        provenance(wide)
    with pytest.raises(NPTError, match="13 checkpoints are too many for a picture; give 12"):
        draw_checkpoints([wide] * 13)


def test_names_of_others_are_texts(tmp_path: Path) -> None:
    root = merged(tmp_path / "a", {3: ("$x_1^ $\x1b[2J/" + "b" * 99, [])})
    figure = draw_provenance(root)
    figure.canvas.draw()
    assert labels(figure)[0] == f"...{'b' * 33}\nlayer 3"
    assert isinstance(figure, figure_class())


def test_names_on_the_hub_are_shown_without_the_commit(hub: Hub, tmp_path: Path) -> None:
    merged(tmp_path / "a", {3: (f"hf://org/first@{'b' * 40}", [])})
    hub.add("org/merged", tmp_path / "a")
    found = labels(draw_provenance(open_checkpoint("org/merged")))
    assert found == ["org/first\nlayer 3", "org/merged\nlayer 3"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    weights = {name: value * float("nan") for name, value in layer_weights(3).items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "a", weights))
    with pytest.raises(NPTError, match="a: nothing to draw"):
        draw_checkpoints([checkpoint])
