"""What ``--data`` names."""

from __future__ import annotations

import pytest

import npt_fast as npt
from npt_fast.errors import PathError
from npt_fast.text_sources import Source, data_name, parse_data


def test_texts() -> None:
    assert parse_data("a/b.txt") == (Source("a/b.txt"),)
    assert parse_data("self") == (Source("self:100000", 100_000),)
    assert parse_data("self:007, python-docs,./self:1") == (
        Source("self:7", 7), Source("python-docs"), Source("./self:1"),
    )  # fmt: skip
    assert data_name("medium,self") == "medium,self:100000"
    assert data_name(data_name("self:5,x")) == "self:5,x"


@pytest.mark.parametrize(
    "text",
    ["self:", "self:abc", "self:0", "self:-1", "self:1.5", "self:1e3", "self: 5", "self:5:5",
     "self:100000001", "self:" + "9" * 100_000, "self:\u0665", "a,self:x"],
)  # fmt: skip
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not self or self:TOKENS with a number") as caught:
        parse_data(text)
    assert len(str(caught.value)) < 300
    for name in ("data", "eval_data"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            npt.TrainOptions(train_layers="1", **{name: text})


def test_texts_that_are_none() -> None:
    for text in ("", " ", "a,", ",a", "a,,b", "~nosuchuser/a,self"):
        with pytest.raises(PathError, match=r"empty|no home"):
            parse_data(text)
    for text in ("a,a", "self,self:100000", "self:5,b,self:05", "self:5,self:9"):
        with pytest.raises(ValueError, match="names a text twice"):
            parse_data(text)
