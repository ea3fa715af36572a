"""``python -m tests.fuzz --minutes 30``: new inputs for every reader, on all cores.

Each target runs in processes of its own, so that a crash or a hang is a failure like any other. An
input that fails is kept, and ``--again TARGET FILE`` runs it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.run import InputError, run
from tests.fuzz.target import Place
from tests.fuzz.targets import TARGETS

KEPT = Path("build/fuzz")
BATCH = 200
_MEMORY = 4 << 30  # a bomb must not take the machine down before it is noticed
_GRACE = 400  # seconds; hypothesis takes 300 at most to make an input small


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--again", nargs=2, metavar=("TARGET", "FILE"))
    parser.add_argument("--slice", nargs=3, help=argparse.SUPPRESS)  # target, folder, end
    given = parser.parse_args()
    if given.again:
        return again(*given.again)
    if given.slice:
        name, folder, end = given.slice
        return _slice(name, Path(folder), float(end))
    return all_targets(given.targets, 60 * given.minutes)


def all_targets(names: list[str], seconds: float) -> int:
    """Run new inputs for these targets, and print counts and failures; returns the exit code."""
    cores = len(os.sched_getaffinity(0))
    slices = names * math.ceil(cores / len(names))
    each = seconds * cores / len(slices)
    counts = {name: Counter[str]() for name in names}
    problems: list[str] = []

    def start(name: str) -> None:
        found, problem = _in_a_process(name, each)
        counts[name].update(found)
        if problem:
            problems.append(problem)
            print(problem, flush=True)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(start, slices))
    total = sum((counts.values()), Counter[str]())
    for name, count in [*counts.items(), ("all", total)]:
        accepted, refused = count["accepted"], count["refused"]
        print(
            f"{name:<18}{accepted + refused:>10,} inputs{accepted:>10,} accepted"
            f"{refused:>10,} refused"
        )
    print(f"{len(problems)} failed")
    return 1 if problems else 0


def _in_a_process(name: str, seconds: float) -> tuple[dict[str, int], str]:
    """Fuzz one target in a process of its own; returns counts of inputs and the failure, or ""."""
    with tempfile.TemporaryDirectory(prefix="npt-fast-fuzz-") as folder:
        end = str(time.time() + seconds)
        command = [sys.executable, "-m", "tests.fuzz", "--slice", name, folder, end]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            try:
                out, err = child.communicate(timeout=seconds + _GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                out, err = child.communicate()
        found = json.loads(out.splitlines()[-1]) if out else {}
        if not child.returncode:
            return found, ""
        said = err.decode(errors="replace").strip() or f"died with {child.returncode}"
        path = Path(folder, TARGETS[name].file)
        data = path.read_bytes() if path.exists() else b""
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = KEPT / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}{path.suffix}"
    kept.write_bytes(data)
    return (
        found,
        f"{name}: {said}\nRun it again: {sys.executable} -m tests.fuzz --again {name} {kept}",
    )


def _slice(name: str, folder: Path, end: float) -> int:
    """The work of one process: run new inputs for a target, and print their number repeatedly."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.RLIM_INFINITY))
    place = Place(TARGETS[name], folder)
    try:
        while True:
            run(place, BATCH, secrets.randbits(64))
            print(json.dumps({"accepted": place.accepted, "refused": place.refused}), flush=True)
            if time.time() > end:
                return 0
    except InputError as error:
        place.path.write_bytes(error.data)
        traceback.print_exception(error.__cause__, limit=-6)
        return 1


def again(name: str, file: str) -> int:
    """Run an input that was kept; raises what is wrong with reading it."""
    data = Path(file).read_bytes()
    with tempfile.TemporaryDirectory(prefix="npt-fast-fuzz-") as folder:
        accepted = Place(TARGETS[name], Path(folder)).run(data)
    print("accepted" if accepted else "refused, as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
