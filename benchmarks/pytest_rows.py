"""A pytest plugin that prints each test's result at once, as a line of JSON on stdout.

Run ``pytest -s -p npt_fast.benchmarks.pytest_rows``. Unlike a report at the end, this loses nothing
if the time runs out.
"""

from __future__ import annotations

import json
from typing import Any

MARK = "pytest-row "
"""Prefix of each line."""


def pytest_configure(config: Any) -> None:
    """Register in the main process only, not in workers of pytest-xdist."""
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
        if isinstance(reason, tuple):  # a skip has (file, line, reason)
            reason = reason[2].removeprefix("Skipped: ")
        elif crash := getattr(reason, "reprcrash", None):
            reason = crash.message.splitlines()[0]
        else:  # a file that cannot be collected ends with its error
            reason = next(iter(str(reason or "").splitlines()[::-1]), "")
        found = {"file": file, "test": test, "outcome": report.outcome}
        # start a new line, because a test may have printed something
        print(f"\n{MARK}{json.dumps(found | {'reason': str(reason)[:300]})}", flush=True)
