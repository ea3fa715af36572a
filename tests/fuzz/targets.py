"""All readers to fuzz, by name."""

from __future__ import annotations

from tests.fuzz import checkpoint_files, model_files, shell_files, text_files

TARGETS = {
    target.name: target
    for module in (checkpoint_files, shell_files, text_files, model_files)
    for target in module.TARGETS
}
