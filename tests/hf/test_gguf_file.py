"""A GGUF file is parsed once for each load, and the package is as before afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npt_fast.hf import gguf_file
from npt_fast.hf.base_model import load_base_model
from npt_fast.hf.model_folder import SMOLLM2


@pytest.mark.usefixtures("smollm2")
def test_one_load(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf: Any = pytest.importorskip("gguf")
    read, tables = [], []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str, *args: Any) -> None:
            read.append(Path(path).name)
            super().__init__(path, *args)

    def table(*args: Any, own: Any = gguf.get_tensor_name_map) -> Any:
        tables.append(args)
        return own(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", table)
    load_base_model(SMOLLM2)
    assert len(read) == 1 and read[0].endswith(".gguf")
    assert len(tables) == len(set(tables)) > 0
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Reader, table)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda _: None)
    with gguf_file.parsed_once():
        pass
