"""The parser of every command line: no abbreviated options, and no secrets in error messages.

argparse quotes words of the command line in its errors. A word that follows a misspelt ``--token``
or ``--hmac-secret`` is a secret, and errors end up in logs of shells and of CI.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

#: Options whose value is a secret.
SECRET_OPTIONS = frozenset({"--token", "--hmac-secret"})

#: Replaces a word of the command line in an error.
HIDDEN = "[hidden]"

#: Matches the error about an invalid command. A word of lowercase letters and dashes stays visible.
#: Any other word is hidden: it may be a secret that follows an option typed without its dashes.
_NO_COMMAND = re.compile(
    r"(argument (?:COMMAND|ACTION): invalid choice: )(?!'[a-z-]{1,20}' ).*(?= \(choose from)",
    re.DOTALL,
)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that accepts no abbreviations and whose errors contain no secrets.

    The parsers of subcommands have the same class.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._words: list[str] = []

    def parse_args(  # type: ignore[override]  # the overloads of the type stubs
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the arguments. Exits with code 2 if a word is not recognised."""
        words = list(sys.argv[1:] if args is None else args)
        arguments, unrecognized = self.parse_known_args(words, namespace)
        if unrecognized:
            super().error(self._describe(unrecognized))
        return arguments

    def parse_known_args(  # type: ignore[override]  # the overloads of the type stubs
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the arguments and the words that are not recognised."""
        self._words = list(sys.argv[1:] if args is None else args)
        joined = list(_join_secrets(self._words, self._option_string_actions))
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message`` without secrets; exit with code 2."""
        message = re.sub(
            r"ignored explicit argument .*", "takes no value", message, flags=re.DOTALL
        )
        message = _NO_COMMAND.sub(rf"\1{HIDDEN}", message)
        secrets = _secrets(self._words, self._option_string_actions) - set(_choices(self))
        for word in sorted(secrets, key=len, reverse=True):
            message = message.replace(repr(word), HIDDEN)
            message = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", HIDDEN, message)
        super().error(message)

    def _describe(self, unrecognized: Sequence[str]) -> str:
        """Return the error for words that are not recognised, with the options they resemble."""
        known = sorted(_options(self, self._words))
        similar = dict.fromkeys(
            option
            for word in unrecognized
            if word.startswith("-")
            for option in _similar_options(word, known)
        )
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        number = len(unrecognized)
        return (
            f"{number} unrecognized argument{'s' if number > 1 else ''} "
            f"(not shown, because an argument can be a secret){hint}"
        )


def _join_secrets(words: Sequence[str], known: Collection[str]) -> Iterator[str]:
    """Yield the words, with each secret joined to its option by an equals sign.

    Without the equals sign, argparse treats a secret that begins with a dash as an option.
    """
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            yield word
            yield from waiting
            return
        value = next(waiting, None) if word in SECRET_OPTIONS and word in known else None
        if value is None:
            yield word
        elif value in known:
            yield word
            yield value
        else:
            yield f"{word}={value}"


def _secrets(words: Sequence[str], known: Collection[str]) -> set[str]:
    """Return the words, and the values in ``option=value``, that may be secrets.

    The result contains the values of secret options. It also contains all words between an unknown
    option and the next known option, because the unknown option may be a misspelt secret option.
    """
    found: set[str] = set()
    hidden = False
    for word in words:
        name, _, value = word.partition("=")
        if name in known:
            hidden = name in SECRET_OPTIONS
            if hidden:
                found.add(value)
        elif hidden or name.startswith("-"):
            hidden = True
            found |= {word, name, value}
    return found - {"", "-", "--"}


def _choices(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the valid values of a parser's options and arguments, such as the commands."""
    for action in parser._actions:  # noqa: SLF001 - no public equivalent
        yield from map(str, action.choices or ())


def _options(parser: argparse.ArgumentParser, words: Collection[str]) -> Iterator[str]:
    """Yield the long options of a parser and of the subcommands in ``words``."""
    for action in parser._actions:  # noqa: SLF001 - no public equivalent
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for name, subparser in action.choices.items():
                if name in words:
                    yield from _options(subparser, words)


def _similar_options(word: str, known: Sequence[str]) -> list[str]:
    """Return the known option that an unknown option abbreviates or resembles, if any."""
    name = word.partition("=")[0]
    abbreviated = [option for option in known if len(name) > len("--") and option.startswith(name)]
    extended = [option for option in known if name.startswith(option)]
    return abbreviated or extended[-1:] or get_close_matches(name, known, 1)
