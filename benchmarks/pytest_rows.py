"""A plugin of pytest: the result of each test as a line of JSON on stdout, as soon as it is known.

``pytest -s -p npt_fast.benchmarks.pytest_rows``. Unlike a report at the end, nothing is lost when
the time is over.
"""

from __future__ import annotations

import json
from typing import Any

MARK = "pytest-row "
"""What a line begins with."""


def pytest_configure(config: Any) -> None:
    """Only the process that hears of all tests reports, not those of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reporter())


class _Reporter:
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._print(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._print(report)

    def _print(self, report: Any) -> None:
        file, _, test = report.nodeid.partition("::")
        reason = report.longrepr
        if isinstance(reason, tuple):  # of a skip: file, line, words
            reason = reason[2].removeprefix("Skipped: ")
        elif crash := getattr(reason, "reprcrash", None):
            reason = crash.message.splitlines()[0]
        else:  # of a file that cannot be collected: the error is at the end
            reason = next(iter(str(reason or "").splitlines()[::-1]), "")
        found = {"file": file, "test": test, "outcome": report.outcome}
        # on a line of its own, whatever a test has printed before
        print(f"\n{MARK}{json.dumps(found | {'reason': str(reason)[:300]})}", flush=True)
