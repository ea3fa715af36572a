"""Make transformers know exported models, whichever of the two packages is imported first.

``import npt_fast`` must not import transformers, which takes seconds. So the model types are
entered into transformers' table of them when that is imported.
"""

from __future__ import annotations

import sys

# for type checkers only: `import npt_fast` loads this module, and `typing` would take most of it
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TABLE = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Enter the model types now if transformers is there, else as soon as it is."""
    if _TABLE in sys.modules:
        _enter(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds only the module of the table, as others would, and enters the model types after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec


def _enter(module: ModuleType) -> None:
    from npt_fast.hf.auto import register

    register(module.CONFIG_MAPPING)
