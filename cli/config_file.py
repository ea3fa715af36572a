"""``--config``: options of a verb that are read from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cyclopts import App, CycloptsError, Token
from cyclopts.argument import ArgumentCollection

from npt_fast.errors import NPTError, suggestion
from npt_fast.paths import user_path
from npt_fast.schema import shown
from npt_fast.transfer.strict_yaml import settings


class ConfigFile:
    """A source of options for cyclopts: a file whose keys stand for options that are not given.

    Keys are names of options in either spelling. A value is written as on a command line, and a
    list gives several values, or one with commas in between where the option takes one text.

    Args:
        path: the file, which the user named.

    Raises:
        NPTError: the file cannot be read, or is not YAML of this form.
    """

    def __init__(self, path: str) -> None:
        self.path = user_path(path)
        self._settings = settings(self.path)
        self._taken: dict[str, str] = {}  # file and line of each option that counts

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Give the verb's options what the file says.

        Raises:
            CycloptsError: a key is no option of the verb, or one that no file may set.
        """
        known = {
            _normal(name): one
            for one in arguments
            if not one.children
            for name in one.parameter.name or ()
        }
        seen: dict[int, str] = {}
        for key, (line, value) in self._settings.items():
            source = f"{self.path}, line {line}"
            argument = known.get(_normal(key))
            if argument is None:
                near = suggestion(_normal(key)[:40], known)
                raise CycloptsError(msg=f"{source}: unknown key {shown(key)}{near}")
            if (first := seen.setdefault(id(argument), key)) != key:
                raise CycloptsError(msg=f"{source}: {shown(key)} and {shown(first)} are the same")
            if argument.field_info.name == "trust_remote_code":
                raise CycloptsError(
                    msg=f"{source}: no file may let code run; give --trust_remote_code itself"
                )
            if argument.tokens or value is None:
                continue
            self._taken[_normal(key)] = source
            words = [value] if isinstance(value, str) else value
            _, takes_many = argument.token_count()
            if not takes_many:
                words = [",".join(words)]
            for index, word in enumerate(words):
                argument.append(Token(keyword=key, value=word, source=source, index=index))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put file and line before a message that begins with an option that the file gives."""
        try:
            yield
        except (NPTError, ValueError) as error:
            option = re.match(r"(\w+)[ :]", str(error))
            if option and option[1] in self._taken:
                error.args = (f"{self._taken[option[1]]}: {error}",)
            raise


def _normal(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")
