"""Which text a run reads: sampled, mixed, of the run that it resumes, or the default."""

from __future__ import annotations

import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import npt_fast as npt
from npt_fast import text_sources
from npt_fast.hf.base_model import load_base_model
from npt_fast.training import data as module
from npt_fast.training import documents
from npt_fast.training import self_text as self_text_module
from npt_fast.training.data import default_data, open_data, sampled_beforehand, with_data
from npt_fast.training.sampling import sample_text
from tests.checkpoints import load_state
from tests.training import runs
from tests.training.runs import LENGTH, Place

SELF = f"self:{30 * LENGTH}"


def said(line: str) -> None:
    raise AssertionError(line)


def untouchable(*args: Any, **options: Any) -> Any:
    raise AssertionError("touched")


def options(place: Place, output: Path, **changes: Any) -> npt.TrainOptions:
    return npt.TrainOptions(**place.settings(output, **{"data": SELF, **changes}))


@pytest.mark.parametrize("data", [SELF, f"{SELF},{{text}}"])
def test_a_run_resumes_exactly(place: Place, tmp_path: Path, data: str, capsys: Any) -> None:
    data = data.format(text=place.text)
    whole = place.train(tmp_path / "whole", data=data, save_steps=3)
    half = place.train(tmp_path / "half", data=data, max_steps=3, lr_schedule="constant")
    # a schedule over three steps would be another one
    again = whole.with_name("checkpoint-3")
    resumed = place.train(tmp_path / "resumed", data=data, resume_from=str(again))
    runs.assert_same_end(whole, resumed)
    assert load_state(whole)["data_state"] == load_state(resumed)["data_state"]
    assert load_state(half)["data_state"] == load_state(again)["data_state"]
    assert load_state(whole)["data_state"]["source"] == data
    assert "starts over" not in capsys.readouterr().err


@pytest.mark.parametrize("data", ["self", SELF, f"{SELF},python-docs"])
def test_a_resumed_run_goes_on_with_its_data(
    place: Place, tmp_path: Path, data: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "DEFAULT_TOKENS", 20 * LENGTH)
    first = place.train(tmp_path / "first", data=data, max_steps=2)
    last = place.train(tmp_path / "last", data=None, resume_from=str(first), max_steps=4)
    states = [load_state(path)["data_state"] for path in (first, last)]
    assert states[1]["source"] == states[0]["source"] == text_sources.data_name(data)
    assert states[1]["windows"] == states[0]["windows"] + 8
    assert states[0]["windows"] > 8  # the fit's come before
    assert "starts over" not in capsys.readouterr().err


def test_a_checkpoint_does_not_say_which_files_are_read(place: Place, tmp_path: Path) -> None:
    first = place.train(tmp_path / "first", max_steps=2)
    with pytest.raises(npt.TrainingError, match=r"was trained on .*text\.txt'; name it with "):
        place.train(tmp_path / "last", data=None, resume_from=str(first), max_steps=4)
    plain = npt.TrainOptions(train_layers="1", resume_from="a")
    for source in ("python-docs,/etc/passwd", "self:x", "", "self:5,self:5"):
        with pytest.raises(npt.TrainingError, match=r"^a: was trained on"):
            with_data(plain, {"source": source}, said)
    assert with_data(plain, {"source": "large,self:5"}, said).data == "large,self:5"


def test_another_model_or_seed_starts_over(place: Place, tmp_path: Path, capsys: Any) -> None:
    first = place.train(tmp_path / "first", data=SELF, max_steps=2)
    changes: dict[str, Any] = {"resume_from": str(first), "max_steps": 4, "data": SELF}
    place.train(tmp_path / "last", first_tokens=["a"], **changes)
    assert "Note: the data or the windows are not those of before" in capsys.readouterr().err


def test_the_default(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = npt.TrainOptions(train_layers="1")
    monkeypatch.setattr(module, "check_hub", lambda source: None)
    monkeypatch.setattr(module, "open_documents", lambda source, seed: None)
    assert with_data(nothing, None, said).data == "medium"

    def unreachable(source: str, seed: int) -> None:
        raise npt.DataError(f"{source}: cannot be reached")

    monkeypatch.setattr(module, "open_documents", unreachable)
    lines: list[str] = []
    assert with_data(nothing, None, lines.append).data == "self:100000"
    (line,) = lines
    assert "no --data is named; medium: cannot be reached. The base model's own text" in line
    monkeypatch.setattr(module, "check_hub", lambda source: unreachable(source, 0))
    monkeypatch.setattr(module, "open_documents", untouchable)
    assert with_data(nothing, None, lines.append).data == "self:100000"
    assert lines == [line, line]
    named = npt.TrainOptions(train_layers="1", data="medium")
    assert with_data(named, {"source": "self:5"}, said).data == "medium"


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any answer will do, and none within the patience; then nothing of the library is tried."""
    monkeypatch.setattr(module, "open_documents", lambda source, seed: None)
    hub = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers HEAD with 501
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(BaseHTTPRequestHandler, "log_message", lambda *args: None)
    assert default_data(said) == "medium"
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(module, "open_documents", untouchable)
    lines: list[str] = []
    assert default_data(lines.append) == "self"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with monkeypatch.context() as patch:
            patch.setattr(documents, "_PATIENCE", 0.3)
            assert default_data(lines.append) == "self"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert default_data(lines.append) == "self"
    for line, problem in zip(lines, ("[Cc]onnection refused", "", "offline mode"), strict=True):
        assert re.search(rf"medium: cannot reach http://127\.0\.0\.1:\d+: .*{problem}", line)


def test_the_hubs_address_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PATIENCE", 0.2)
    done = Event()
    monkeypatch.setattr(documents, "get_session", done.wait)
    with pytest.raises(npt.DataError, match=r"^large: cannot reach .*: no answer within 0\.2 sec"):
        documents.check_hub("large")
    done.set()


def test_processes_do_not_look_for_the_default_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("npt_fast.training.train.launch", lambda options: options.data)
    given = npt.TrainOptions(train_layers="1,2", num_processes=2, parallel="layers")
    assert npt.train(given) == "self:100000"
    assert capsys.readouterr().err.count("Note: no --data is named") == 1


def test_windows_are_the_sampled_ids(place: Place, tmp_path: Path) -> None:
    model, tokenizer = load_base_model(str(place.base))
    windows, held_out = open_data(
        options(place, tmp_path, seed=7), model, tokenizer, None, None, lambda line: None
    )
    expected = sample_text(model, tokenizer, 30 * LENGTH, max_length=LENGTH, seed=7).tolist()
    assert [w["input_ids"].tolist() for w in held_out] == expected[:4]
    stream = iter(windows)
    found = {int(w["window"]): w["input_ids"].tolist() for w in (next(stream) for _ in range(26))}
    assert [found[n] for n in range(26)] == expected[4:]


def test_held_out_text_of_its_own_is_another_text(place: Place, tmp_path: Path) -> None:
    model, tokenizer = load_base_model(str(place.base))
    given = options(place, tmp_path, eval_data=SELF)
    windows, held_out = open_data(given, model, tokenizer, None, None, lambda line: None)
    stream = iter(windows)
    own = {tuple(next(stream)["input_ids"].tolist()) for _ in range(30)}
    assert len(held_out) == 4
    assert own.isdisjoint(tuple(w["input_ids"].tolist()) for w in held_out)


@pytest.mark.parametrize("data", [f"self:{2 * LENGTH - 1}", f"python-docs,self:{LENGTH}", "self:1"])
def test_too_few_tokens(place: Place, tmp_path: Path, data: str) -> None:
    with pytest.raises(npt.DataError, match=rf"^self:\d+: windows of {LENGTH} tokens need 48 or "):
        place.train(tmp_path / "run", data=data)
    place.train(tmp_path / "two", data=f"self:{2 * LENGTH}", max_steps=1)


def test_a_model_without_an_end_token(place: Place, tmp_path: Path) -> None:
    model, tokenizer = load_base_model(str(place.base))
    tokenizer.eos_token = tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(npt.ModelError, match="has no token that ends a text"):
        place.train(tmp_path / "run", data=SELF, model_name=str(tmp_path / "base"))


def test_names_of_sampled_texts(place: Place, tmp_path: Path) -> None:
    run = options(place, tmp_path / "run", max_steps=1, eval_steps=1)
    report = npt.train(run)
    assert report.data == SELF
    assert report.to_dict()["data"] == SELF
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == SELF
    described = json.loads((report.checkpoint / "npt_config.json").read_text())
    assert described["layers"]["1"]["certificate"]["data"] == SELF


def test_evaluate_measures_what_training_holds_out(place: Place, tmp_path: Path) -> None:
    report = npt.train(options(place, tmp_path / "run", max_steps=2, eval_steps=2))
    assert report.evaluation is not None
    model, tokenizer = load_base_model(str(place.base))
    npt.load(model, report.checkpoint)
    found = npt.evaluate(model, tokenizer, SELF, windows=4, max_length=LENGTH)
    assert found.kl == pytest.approx(report.evaluation.kl, rel=1e-5)


def test_a_text_is_sampled_before_processes_form_a_group(
    place: Place, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    given = options(place, tmp_path / "run", data=f"{SELF},python-docs", eval_data="self:96")
    assert sampled_beforehand(given, None, lines.append).data == given.data
    assert len(list(cache.iterdir())) == len(lines) == 2

    monkeypatch.setattr(self_text_module, "sample_text", untouchable)
    npt.train(given)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_two_processes_read_the_text_of_one(place: Place, tmp_path: Path) -> None:
    data = f"{SELF},{place.text}"
    one = place.train(tmp_path / "one", data=data, batch_size=2, max_steps=2)
    two = place.train(tmp_path / "two", data=data, batch_size=1, num_processes=2, max_steps=2)
    assert load_state(one)["data_state"] == load_state(two)["data_state"]
    for ours, theirs in zip(runs.moments(two), runs.moments(one), strict=True):
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-7)
