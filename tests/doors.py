"""Every kind of file that the program reads, the verbs that read it, and the attacks on it.

A door is a file in a folder of valid files, with the command lines that read it. An attack replaces
the file by another. `tests/test_doors.py` tries each on every file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

from tests.hostile import pickles
from tests.hostile.pickles import PROTO, STOP, dict_of, integer, text
from tests.hostile.zips import write_pt

ATTACKS = (
    "code", "depth", "cycle", "alias", "width", "numbers", "text", "links", "fifo", "device", "size"
)  # fmt: skip

Attack = Callable[[Path], None]
"""Done to a sound file, or to a path where there is none."""


@dataclass(frozen=True)
class Door:
    """A kind of file.

    Attributes:
        name: name in the documentation.
        file: path in the folder of valid files.
        verbs: command lines; ``{}`` stands for that folder, ``{out}`` for a new path.
        attacks: attacks on its format, by name.
        also_named: another name that a library's message may use.
        opened_by_libraries: whether a library opens the file, and `SourceFile` does not.
    """

    name: str
    file: str
    verbs: Mapping[str, str]
    attacks: Mapping[str, Attack]
    also_named: tuple[str, ...] = ()
    opened_by_libraries: bool = False


def replaced(content: bytes | str) -> Attack:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda path: void(path.write_bytes(raw))


def void(result: object) -> None:
    del result


def _link(target: str) -> Attack:
    def attack(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return attack


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _long(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 3 << 30)


EVERY_FILE: dict[str, Attack] = {
    "text": replaced(b"\xff\xfe\xfa" * 1000 + b"\x1b[2J\n"),
    "links": _link("gone"),
    "fifo": _fifo,
    "device": _link("/dev/zero"),
    "size": _long,
}


# --- JSON: one more value in a sound object

VALUES = {
    "depth": "[" * 100_000 + "]" * 100_000,
    "width": "[" + "{}," * 1_000_000 + "1]",
    "numbers": "1" + "0" * 4000,
    "text": '"\\ud800\\u001b[2J"',
}


def _more(value: str) -> Attack:
    def attack(path: Path) -> None:
        sound = path.read_text().rstrip() if path.exists() else '{"a": 1}'
        path.write_text(f'{sound[:-1]}, "zz": {value}}}')

    return attack


JSON = {name: _more(value) for name, value in VALUES.items()}


# --- pickles: one more value in a sound dict


def _doubled() -> bytes:
    """60 tuples, through which 2^60 paths lead."""
    tuples = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return pickles.MARK + integer(1) + b"q\0" + tuples + b"t"


PICKLES = {
    "code": pickles.PAYLOADS["global-os-system"],
    "depth": b"]" * 3000 + b"a" * 2999,
    "cycle": b"]q\0h\0a",
    "alias": _doubled(),
    "width": b"](" + text("x" * (1 << 20)) + b"q\0" + b"h\0" * 2000 + b"e",
    "numbers": dict_of(*((integer(n * ((1 << 61) - 1)), b"N") for n in range(5, 30_000))),
}


def _pickled(**sound: bytes) -> dict[str, Attack]:
    def attack(value: bytes) -> Attack:
        pairs = [(text(key), item) for key, item in [*sound.items(), ("zz", value)]]
        pairs = pairs if sound else [*pickles.items(), *pairs]

        def write(path: Path) -> None:
            folder = path.parent / "written"
            folder.mkdir()
            write_pt(folder, pickle=PROTO + dict_of(*pairs) + STOP).replace(path)
            folder.rmdir()

        return write

    return {name: attack(value) for name, value in PICKLES.items()}


# --- safetensors


def safetensors(header: str, data: bytes = b"") -> bytes:
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


CODE = replaced(PROTO + pickles.PAYLOADS["global-os-system"] + STOP)
_META = '{"__metadata__": {"a": %s}}'
_ENTRY = '{"x": {"dtype": "F32", "shape": [9%s], "data_offsets": [-0, 4]}}'
SAFETENSORS = {
    "code": CODE,
    **{name: replaced(safetensors(_META % VALUES[name])) for name in ("depth", "width", "text")},
    "numbers": replaced(safetensors(_ENTRY % ("9" * 99))),
}


def modulation(origin: str = "{}", name: str = "m", value: float = 1.0) -> bytes:
    """The file of one, for the tiny model."""
    base = {
        "name": name, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "vocab_size": 257,
    }  # fmt: skip
    described = (
        f'{{"version": 1, "base": {json.dumps(base)}, "origin": {origin}, "vectors": false, '
        '"layers": {"1": ["gate"]}}'
    )
    header = {
        "__metadata__": {"npt_modulation": described},
        "layer.1.gate.v_a": {"dtype": "F32", "shape": [1, 32], "data_offsets": [0, 128]},
        "layer.1.gate.v_b": {"dtype": "F32", "shape": [1, 48], "data_offsets": [128, 320]},
    }
    return safetensors(json.dumps(header), struct.pack("<f", value) * 80)


MODULATION = {
    "code": CODE,
    "depth": replaced(modulation('{"of": ' * 850 + "1" + "}" * 850)),
    "width": replaced(modulation('{"a": [' + "{}," * 2_000_000 + "1]}")),
    "numbers": replaced(modulation('{"factor": 1' + "0" * 400 + "}", value=float("nan"))),
    "text": replaced(modulation('{"text": "\\ud800"}', "\ud800")),
}


# --- text: YAML, logs, scripts, training data

_YAML = {
    "code": '!!python/object/apply:os.system ["touch canary"]',
    "depth": "[" * 20_000 + "]" * 20_000,
    "cycle": "&a [*a]",
    "width": "[" + "{}, " * 240_000 + "]",
}
_FACT = "facts:\n  - prompt: a\n    inject: {from: b}\n    expect: c\n"
_NINE = (f"a{n}: &a{n} [" + f"*a{n - 1}, " * 9 + "1]\n" for n in range(1, 30))
FACTS = {
    **{name: replaced(f"facts: {value}\n") for name, value in _YAML.items()},
    "alias": replaced("a0: &a0 {x: 1}\n" + "".join(_NINE)),
    "numbers": replaced(_FACT + "    tokens: 1" + "0" * 400_000 + "\n"),
}
_RELATION = "relations:\n  - {name: a, prompt: '{}', pairs: {a: b, c: d}, at_least: %s}\n"
SUITE = {
    **{name: replaced(f"relations: {value}\n") for name, value in _YAML.items()},
    "alias": FACTS["alias"],
    "numbers": replaced(_RELATION % ("1" + "0" * 400_000)),
}  # fmt: skip
CONFIG = {
    **{name: replaced(f"checkpoints: {value}\n") for name, value in _YAML.items()},
    "alias": FACTS["alias"],
    "numbers": replaced("max_shard_size: 1" + "0" * 400_000 + "\n"),
}  # fmt: skip
_LOG = '{"npt_session": 1, "checkpoint": "x", "model_name": "y", %s}\n'
JOURNAL = {
    "code": CODE,
    "depth": replaced(_LOG % f'"base": {VALUES["depth"]}'),
    "width": replaced((_LOG % '"npt_fast": "1"') + '{"command": "status"}\n{}\n' * 300_000),
    "numbers": replaced(_LOG % f'"layers": [{VALUES["numbers"]}]'),
    "text": replaced(_LOG % '"dtype": "\\ud800"'),
}
TRAINING_LOG = {
    "depth": replaced(f'{{"step": {VALUES["depth"]}}}\n'),
    "width": replaced(f'{{"step": 1, "x": {VALUES["width"]}}}\n'),
    "numbers": replaced(f'{{"step": {VALUES["numbers"]}}}\n'),
}
_ROW = '{"text": "a word", "more": %s}\n'
ROWS = {
    "depth": replaced(_ROW % VALUES["depth"]),
    "width": replaced(_ROW % VALUES["width"]),
    "numbers": replaced(_ROW % ("1" + "0" * 5_000_000)),
    "text": replaced(_ROW % 1 + '{"text": "\\ud800"}\n'),
}


def _dictionary(path: Path) -> None:
    """4,000 rows that share the same 300 kB."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), ["xy " * 100_000])
    parquet.write_table(pa.table({"text": column}), path, compression="none")


def _auto_map(**stranger: str) -> Attack:
    own = {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}, **stranger}
    return lambda path: void(path.write_text(json.dumps({**json.loads(path.read_text()), **own})))


# --- the table

_EVALUATE = (
    "evaluate --checkpoint {}/a --model_name {}/base --data {}/text.txt --max_length 24 "
    "--num_eval_samples 1 --cpu"
)
_TRAIN = (
    "train --train_layers 1 --model_name {}/base --data {}/text.txt --max_length 24 --cpu "
    "--num_eval_samples 1 --np_rank 3 --num_ranks 2 --batch_size 2 --max_steps 2 "
    "--gradient_accumulation_steps 1 --generation_steps 0 --output_dir {out}"
)
SHELL = "interact --checkpoint {}/a --model_name {}/base --device cpu --log {out}"
_CHECK = "check {}/facts.yaml --checkpoint {}/a --model_name {}/base --cpu"
_STUDY = "study --suite {}/suite.yaml --checkpoint {}/a --model_name {}/base --cpu --output {out}"
_SAMPLE = "sample --model_name {}/base --tokens 8 --max_length 8 --output {out}.jsonl --cpu"
_EXPORT = "export --checkpoint {}/a --model_name {}/base --output {out}"
_READ = {
    "analyze": "analyze --checkpoint {}/a",
    "merge": "merge --checkpoints {}/a --output {out}",
    "verify": "verify {}/a",
}
_RESUME = {"train": _TRAIN.replace("_steps 2", "_steps 4") + " --resume_from {}/a"}
_SCRIPT = {"interact": f"{SHELL} --script {{}}/script"}
_WEIGHTS = {**_READ, **_RESUME, "evaluate": _EVALUATE, **_SCRIPT, "export": _EXPORT}
_MODELS = {
    **{"evaluate": _EVALUATE, "train": _TRAIN, "sample": _SAMPLE, "check": _CHECK},
    **{"study": _STUDY, **_SCRIPT, "export": _EXPORT},
}
_LOAD = {"interact": f"{SHELL} --script {{}}/load"}
_LOAD_SESSION = {"interact": f"{SHELL} --script {{}}/load-session"}


def _data(name: str) -> dict[str, str]:
    return {
        "train": _TRAIN.replace("text.txt", name),
        "evaluate": _EVALUATE.replace("text.txt", name),
    }


def _shards(verbs: Mapping[str, str]) -> dict[str, str]:
    return {verb: line.replace("{}/a", "{}/shards") for verb, line in verbs.items()}


def _whole(folder: str) -> dict[str, str]:
    verbs = {"analyze": _READ["analyze"], "merge": _READ["merge"], "evaluate": _EVALUATE}
    return {verb: line.replace("{}/a", f"{{}}/{folder}") for verb, line in verbs.items()}


DOORS = (
    Door("npt_weights.pt", "a/npt_weights.pt", _WEIGHTS, _pickled()),
    Door(
        "npt_weights.safetensors", "shards/npt_weights-00001-of-00005.safetensors",
        _shards(_WEIGHTS), SAFETENSORS,
    ),
    Door(
        "…safetensors.index.json", "shards/npt_weights.safetensors.index.json",
        _shards(_WEIGHTS), JSON,
    ),
    Door("npt_config.json", "a/npt_config.json", _WEIGHTS, JSON),
    Door("training_metadata.json", "a/training_metadata.json", _WEIGHTS, JSON),
    Door("config.json", "a/config.json", _WEIGHTS, JSON),
    Door("merge_summary.json", "a/merge_summary.json", _READ, JSON),
    Door("merge_digests.txt", "a/merge_digests.txt", _READ, {
        "width": replaced("a\tb\tc\n" * 999_999),
    }),
    Door("training_state.pt", "a/training_state.pt", {**_READ, **_RESUME}, _pickled(
        global_step=integer(1)
    )),
    Door("multi_layer_state.pt", "a/multi_layer_state.pt", {**_READ, **_RESUME}, _pickled(
        layers_to_train=b"]"
    )),
    Door("whole model: model.safetensors", "whole/model.safetensors", _whole("whole"), SAFETENSORS),
    Door("whole model: pytorch_model.bin", "bin/pytorch_model.bin", _whole("bin"), _pickled()),
    Door("whole model: config.json", "whole/config.json", _whole("whole"), JSON),
    Door("exported model: config.json", "exported/config.json",
         {"evaluate": _EVALUATE.replace("{}/a", "{}/exported").replace("{}/base", "{}/exported")},
         {**JSON, "code": _auto_map(model_type="own")}),
    Door("training_log.jsonl", "run/training_log.jsonl",
         {
             "train": _RESUME["train"].replace("{out}", "{}/run").replace(
                 "{}/a", "{}/run/checkpoints/checkpoint-2"
             ),
             "plot": "plot {}/run --output {out}.png",
         }, TRAINING_LOG),
    Door("modulation", "m.safetensors", _LOAD, MODULATION),
    Door("session.json", "session/session.json", _LOAD_SESSION, JSON),
    Door("session's modulation", "session/0.safetensors", _LOAD_SESSION, MODULATION),
    Door("log of a session", "log.jsonl",
         {"interact --replay": "interact --replay {}/log.jsonl --device cpu"}, JOURNAL),
    Door("script", "script", {
        "interact --script": _SCRIPT["interact"], "run": f"{SHELL} --script {{}}/run-script",
    }, {"width": replaced("nothing\n" * 2_000_000)}),
    Door("options: run.yaml", "run.yaml", {"merge": "merge --config {}/run.yaml"}, CONFIG),
    Door("facts.yaml", "facts.yaml", {"check": _CHECK}, FACTS),
    Door("suite.yaml", "suite.yaml", {"study": _STUDY}, SUITE),
    Door("base model: config.json", "base/config.json", {**_MODELS, "models": "models {}/base"},
         {**JSON, "code": _auto_map(model_type="own")}),
    Door("base model: tokenizer_config.json", "base/tokenizer_config.json", _MODELS,
         {**JSON, "code": _auto_map(tokenizer_class="Own")}),
    Door("base model: generation_config.json", "base/generation_config.json", _MODELS, JSON),
    Door("base model: tokenizer.json", "base/tokenizer.json", _MODELS, JSON, ("the tokenizer",),
         opened_by_libraries=True),
    Door("base model: model.safetensors", "base/model.safetensors", _MODELS, SAFETENSORS,
         opened_by_libraries=True),
    Door("base model: .gguf", "base.gguf", {
        "trace": "trace --from a --to b --model_name {}/base.gguf --cpu",
        "train": _TRAIN.replace("{}/base", "{}/base.gguf"),
    }, {"code": CODE}),
    Door("data: .txt", "text.txt", _data("text.txt"), {"width": replaced("a\n\n" * 1_000_000)}),
    Door("data: .jsonl", "rows.jsonl", _data("rows.jsonl"), ROWS),
    Door("data: .json", "rows.json", _data("rows.json"), ROWS),
    Door("chat template", "chat.jinja", {
        verb: f"{line} --chat_template {{}}/chat.jinja"
        for verb, line in _data("chats.jsonl").items()
    }, {}),
    Door("data: .parquet", "rows.parquet", _data("rows.parquet"),
         {"code": CODE, "alias": _dictionary}),
)  # fmt: skip


def attacks(door: Door) -> Iterator[tuple[str, Attack]]:
    """All attacks on a door, those on its format included, in the order of `ATTACKS`."""
    own = {**EVERY_FILE, **door.attacks}
    yield from ((name, own[name]) for name in ATTACKS if name in own)


def cells(door: Door, number: int) -> Iterator[tuple[str, str, Attack]]:
    """What is tried at the door of this number: each attack by two of the verbs, in turn.

    These verbs read the file by the same code, and each meets several of the attacks. Where a
    library opens the file, each meets them all.
    """
    verbs = list(door.verbs)
    for turn, (name, attack) in enumerate(attacks(door)):
        first = (number + 2 * turn) % len(verbs)
        chosen = verbs if door.opened_by_libraries else (verbs + verbs)[first : first + 2]
        for verb in dict.fromkeys(chosen):
            yield verb, name, attack
