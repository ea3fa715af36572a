"""``npt-fast evaluate``: figures and texts of checkpoints, each on its own."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast import text_sources
from npt_fast.cli.arguments import ReadingOptions, RowOptions
from npt_fast.cli.evaluate import evaluate
from npt_fast.errors import NPTWarning
from npt_fast.hf.base_model import load_base_model
from tests.checkpoints import layer_weights, read_weights, run, write_checkpoint
from tests.training import runs
from tests.training.runs import LENGTH, Place


def arguments(place: Place, *more: object) -> list[object]:
    return [
        "evaluate", "--model_name", place.base, "--data", place.text, "--max_length", LENGTH,
        "--num_eval_samples", 4, "--cpu", *more,
    ]  # fmt: skip


def test_each_checkpoint_by_itself(place: Place, capsys: Any, tmp_path: Path) -> None:
    """The second checkpoint is measured in a clean base model: the first leaves nothing behind."""
    paths = [runs.start(tmp_path / "a", 1, 2), runs.start(tmp_path / "b", 2, num_ranks=4)]
    code, out, err = run(capsys, *arguments(place, "--checkpoint", *paths, "--json"))
    assert (code, err) == (0, "")
    results = json.loads(out)["results"]
    assert [result["checkpoint"] for result in results] == [str(path) for path in paths]
    assert [result["layers"] for result in results] == [[1, 2], [2]]
    for path, result in zip(paths, results, strict=True):
        model, tokenizer = load_base_model(str(place.base))
        npt.load(model, path)
        data = str(place.text)
        expected = npt.evaluate(model, tokenizer, data, windows=4, max_length=LENGTH, batch_size=4)
        assert result["perplexity"] == pytest.approx(expected.perplexity)
        assert result["kl"] == pytest.approx(expected.kl)
        assert result["tokens"] == expected.tokens == 4 * LENGTH
        assert list(result["texts"]) == ["news", "story", "code", "french"]
        for name, text in result["texts"].items():
            assert text["kl"] == pytest.approx(expected.texts[name].kl)
        for figure, worst in result["worst"].items():
            assert worst == max(text[figure] for text in result["texts"].values())
        assert result["direct"] == pytest.approx({str(n): v for n, v in expected.direct.items()})
    assert results[0]["kl"] != results[1]["kl"]
    assert results[0]["base_perplexity"] == results[1]["base_perplexity"]


def test_a_converted_models_folder_is_base_model_and_checkpoint(
    place: Place, capsys: Any, tmp_path: Path
) -> None:
    checkpoint, folder = runs.start(tmp_path / "a", 1, 2), tmp_path / "model"
    model, tokenizer = load_base_model(str(place.base))
    npt.load(model, checkpoint).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def figures(base: Path, checkpoint: Path) -> tuple[dict[str, Any], str]:
        args = [arg if arg != place.base else base for arg in arguments(place)]
        code, out, err = run(capsys, *args, "--checkpoint", checkpoint, "--json")
        assert code == 0
        (result,) = json.loads(out)["results"]
        assert result.pop("checkpoint") == str(checkpoint)
        return result, err

    expected, _ = figures(place.base, checkpoint)
    assert figures(folder, folder) == (expected, "")
    assert figures(place.base, folder) == (expected, "")
    found, err = figures(folder, checkpoint)
    assert found == expected
    assert err == (
        f"Warning: {folder}: holds NP layers 1, 2 too, which the base model does not have; "
        f"--checkpoint {folder} or npt.load(model, {str(folder)!r}) loads them\n"
    )


def test_the_figures_are_those_of_training(place: Place, capsys: Any, tmp_path: Path) -> None:
    """evaluate uses the windows that train holds out, and student mode in any stage."""
    path = place.train(tmp_path / "out", max_steps=3, eval_steps=3)
    (line,) = (line for line in runs.log(tmp_path / "out") if "eval/kl" in line)
    _, out, _ = run(capsys, *arguments(place, "--checkpoint", path, "--json"))
    (result,) = json.loads(out)["results"]
    for name in ("perplexity", "base_perplexity", "kl", "top1_agreement"):
        assert result[name] == pytest.approx(line[f"eval/{name}"])


def test_lines_for_people(place: Place, capsys: Any, tmp_path: Path) -> None:
    path = runs.start(tmp_path / "a", 1, 2)
    prompts = ["--prompt", "abc", "dea"]
    code, out, _ = run(
        capsys, *arguments(place, "--checkpoint", path, *prompts, "--max-new-tokens", 5)
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{path}: layers [1, 2]"
    assert "perplexity" in lines[1] and "base" in lines[1] and "ratio" in lines[1]
    assert "KL" in lines[2] and "layer 1 " in lines[3] and "96 tokens" in lines[4]
    table, rest = lines[5:13], lines[13:]
    assert max(map(len, table)) <= 80
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert rows[0] == ["text", "tokens", "KL, nats", "ratio"]
    # the end of a long path
    assert rows[2][0].startswith("...") and str(place.text).endswith(rows[2][0][3:])
    names = [row[0] for row in rows[3:]]
    assert names == ["news", "story", "code", "french", "worst of other kinds"]
    for column in (2, 3):
        figures = [float(row[column]) for row in rows[3:]]
        assert figures[-1] == max(figures[:-1])
    assert [line for line in rest if not line.startswith("  ")] == ["Prompt: abc", "Prompt: dea"]
    assert rest[1].startswith("  base: ") and rest[2].startswith(f"  {path}: ")


def test_a_broken_model_is_still_json(place: Place, capsys: Any, tmp_path: Path) -> None:
    """A diverged model has figures that JSON cannot hold; they become null."""
    weights = read_weights(runs.start(tmp_path / "a", 1))
    weights["layer_1_np.W_b_up_up.1"][0, 0] = float("nan")
    path = write_checkpoint(tmp_path / "b", weights)
    code, out, _ = run(capsys, *arguments(place, "--checkpoint", path, "--json"))
    assert code == 0
    (result,) = json.loads(out)["results"]
    assert result["kl"] is None and result["base_perplexity"] > 1
    assert result["worst"] == {"kl": None, "perplexity_ratio": None}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--num_eval_samples", "0"], "num_eval_samples"),
        (["--max-length", "1"], "max-length"),
        (["--batch_size", "0"], "batch_size"),
        (["--max_new_tokens", "-1"], "max_new_tokens"),
        (["--base_dtype", "half"], "base_dtype"),
        ([], "--checkpoint"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys: Any, option: list[str], expected: str) -> None:
    given = ["--checkpoint", "a"] if option else []
    code, out, err = run(capsys, "evaluate", *given, *option)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err


def test_failures_are_one_line(place: Place, capsys: Any, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", layer_weights(1, d=16, f=24))
    path = runs.start(tmp_path / "a", 1)
    cases: list[tuple[list[object], str]] = [
        (["--checkpoint", tmp_path / "none"], "Checkpoint not found"),
        (["--checkpoint", other], "was trained on another base model"),
        (["--checkpoint", path, "--data", tmp_path / "none.txt"], "no such file"),
        (["--checkpoint", path, "--model_name", tmp_path / "none"], "no such folder"),
    ]
    for more, expected in cases:
        given = arguments(place)
        for name, value in zip(more[::2], more[1::2], strict=True):
            if name in given:
                given[given.index(name) + 1] = value
            else:
                given += [name, value]
        code, out, err = run(capsys, *given)
        assert (code, out) == (1, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and expected in err


def test_how_texts_are_read(place: Place, bos_base: Path, capsys: Any, tmp_path: Path) -> None:
    """Documents and prompts have BOS, or none; a chat is for prompts alone."""
    bos, path = replace(place, base=bos_base), runs.start(tmp_path / "a", 1, 2)
    model, tokenizer = load_base_model(str(bos_base))
    npt.load(model, path)
    more = ["--checkpoint", path, "--prompt", "abc", "--max_new_tokens", 4, "--json"]
    for option, prompt in (
        ([], "<bos>abc"), (["--no-special-tokens"], "abc"), (["--chat"], "<bos>user:abc;me:")
    ):  # fmt: skip
        _, out, _ = run(capsys, *arguments(bos, *more, *option))
        found = json.loads(out)
        special = "--no-special-tokens" not in option
        expected = npt.evaluate(
            model, tokenizer, str(bos.text), windows=4, max_length=LENGTH, special_tokens=special
        )
        assert found["results"][0]["perplexity"] == pytest.approx(expected.perplexity)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        told = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert found["texts"][str(path)] == [tokenizer.decode(told, skip_special_tokens=True)]


def test_without_data_it_reads_what_training_would(
    place: Place, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(text_sources, "DEFAULT_TOKENS", 20 * LENGTH)
    checkpoint = runs.start(tmp_path / "a", 1)
    given = arguments(place, "--checkpoint", checkpoint, "--json")
    at = given.index("--data")
    code, out, err = run(capsys, *given[:at], *given[at + 2 :])
    assert code == 0
    assert (
        err.startswith("Note: no --data is named; medium: cannot reach ") and err.count("\n") == 1
    )
    (found,) = json.loads(out)["results"]
    given[at + 1] = "self"
    code, out, err = run(capsys, *given)
    assert (code, err) == (0, "")
    assert json.loads(out)["results"] == [found]


def test_defaults_are_those_of_python(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where no text can be streamed, Python warns as the verb notes."""
    theirs = {"windows": "num_eval_samples"}
    verb = signature(evaluate).parameters
    options = {"special_tokens": ReadingOptions(), "text_column": RowOptions()}
    options["chat_template"] = options["text_column"]
    for name, parameter in signature(npt.evaluate).parameters.items():
        if name in options:
            assert getattr(options[name], name) == parameter.default, name
        elif name not in ("model", "tokenizer", "progress"):
            assert verb[theirs.get(name, name)].default == parameter.default, name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(text_sources, "DEFAULT_TOKENS", 20 * LENGTH)
    model, tokenizer = load_base_model(str(place.base))
    npt.load(model, runs.start(tmp_path / "a", 1))
    settings: dict[str, Any] = {"windows": 2, "max_length": LENGTH}
    with pytest.warns(NPTWarning, match="medium: cannot reach .*own text") as told:
        found = npt.evaluate(model, tokenizer, **settings)
    assert [warning.filename for warning in told] == [__file__]
    assert found == npt.evaluate(model, tokenizer, "self", **settings)


def test_columns_and_chats(place: Place, capsys: Any, tmp_path: Path) -> None:
    """A chat by the template of a file is the text that it writes."""
    text = place.text.read_text()
    pieces = [text[n : n + 40] for n in range(0, len(text), 40)]
    chats = [{"turns": [{"role": "user", "content": piece}]} for piece in pieces]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    (tmp_path / "template").write_text("{{ messages[0].content }}")
    (tmp_path / "texts.txt").write_text("\n\n".join(pieces))
    given = arguments(place, "--checkpoint", runs.start(tmp_path / "a", 1), "--json")
    at = given.index("--data") + 1
    given[at] = tmp_path / "texts.txt"
    _, expected, _ = run(capsys, *given)
    given[at] = tmp_path / "chats.jsonl"
    given += ["--text_column", "turns"]
    code, out, err = run(capsys, *given)
    assert (code, out) == (1, "") and "no chat template; give one with chat_template" in err
    code, out, err = run(capsys, *given, "--chat_template", tmp_path / "template")
    assert (code, err) == (0, "")
    assert json.loads(out)["results"] == json.loads(expected)["results"]
