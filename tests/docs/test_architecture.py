"""The picture of the layers is the one that the table of layers draws."""

from __future__ import annotations

import pytest

from docs import architecture


def test_the_picture_is_up_to_date() -> None:
    assert architecture.PICTURE.read_text() == architecture.svg(), "python -m docs.architecture"


def test_arrows_leave_out_what_follows_from_others() -> None:
    pairs = {(above.parts[0], below.parts[0]) for above, below in architecture.arrows()}
    assert {("cli", "training"), ("hf", "modules"), ("functional", "kernels")} <= pairs
    assert not {("cli", "hf"), ("training", "checkpoint"), ("hf", "config")} & pairs


def test_a_changed_table_changes_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    component = {"called_mlp", "mlp_layout", "modules", "moe_mlp"}  # one box
    monkeypatch.setitem(architecture.ALLOWED, "hf", architecture.ALLOWED["hf"] - component)
    assert architecture.svg() != architecture.PICTURE.read_text()
    monkeypatch.setitem(architecture.ALLOWED, "new", set())
    with pytest.raises(ValueError, match=r"\['new'\] have no box"):
        architecture.svg()
    monkeypatch.delitem(architecture.ALLOWED, "new")
    monkeypatch.setitem(architecture.ALLOWED, "functional", {"kernels", "checkpoint"})
    with pytest.raises(ValueError, match=r"'checkpoint',.* must stand below .*'functional'"):
        architecture.svg()
