"""``z4j-bare completion``: what a shell needs to complete commands and options, made from the parsers themselves."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

EXAMPLES = """\
examples:
  source <(z4j-bare completion bash)                                    # in ~/.bashrc
  source <(z4j-bare completion zsh)                                     # in ~/.zshrc, after compinit
  z4j-bare completion fish > ~/.config/fish/completions/z4j-bare.fish
"""

_BASH = """\
_z4j_bare() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" path="" words="" each
    for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$path/$each" in {commands}) path="$path/$each" ;; esac
    done
    case "$path $previous" in
{choices}
        *) case "$path" in
{words}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _z4j_bare {prog}
"""

_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"

#: A parser and the commands that lead to it.
Node = tuple[tuple[str, ...], argparse.ArgumentParser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    from z4j_bare.cli.main import COMMANDS, build_parser

    nodes = list(walk(build_parser("z4j-bare", COMMANDS), ()))
    if arguments.shell == "fish":
        print("\n".join(fish(nodes)))
    else:
        print((_ZSH if arguments.shell == "zsh" else "") + bash(nodes), end="")
    return 0


def walk(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[Node]:
    """Yield a parser and all below it."""
    yield path, parser
    for name, below in _commands(parser).items():
        yield from walk(below, (*path, name))


def bash(nodes: list[Node]) -> str:
    """Return the script for bash, which zsh understands too."""
    choices, words = [], []
    for path, parser in nodes:
        place = "".join(f"/{word}" for word in path)
        words.append(f'            "{place}") words="{" ".join(_words(parser))}" ;;')
        for action in parser._actions:  # noqa: SLF001 - argparse has no public way to look at itself
            if action.choices and action.option_strings:
                patterns = "|".join(f'"{place} {option}"' for option in action.option_strings)
                choices.append(
                    f'        {patterns}) words="{" ".join(map(str, action.choices))}" ;;'
                )
    commands = "|".join("/" + "/".join(path) for path, _ in nodes if path)
    return _BASH.format(
        commands=commands, choices="\n".join(choices), words="\n".join(words), prog="z4j-bare"
    )


def fish(nodes: list[Node]) -> Iterator[str]:
    """Yield the lines for fish."""
    for path, parser in nodes:
        below = _commands(parser)
        here = " ; and ".join(f"__fish_seen_subcommand_from {word}" for word in path)
        apart = f"not __fish_seen_subcommand_from {' '.join(below)}" if below else ""
        when = " ; and ".join(filter(None, (here, apart)))
        for action in parser._actions:  # noqa: SLF001
            for option in action.option_strings:
                form = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                values = f" -x -a '{' '.join(map(str, action.choices))}'" if action.choices else ""
                yield f"complete -c z4j-bare -n '{when}' {form}{values} -d '{_plain(action.help)}'"
        for name, text in _helps(parser):
            yield f"complete -c z4j-bare -f -n '{when}' -a {name} -d '{_plain(text)}'"


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:  # noqa: SLF001
        if action.option_strings:
            yield from action.option_strings
        elif action.choices:
            yield from map(str, action.choices)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]  # noqa: SLF001
    return dict(found[0].choices) if found else {}


def _helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            yield from ((each.dest, each.help or "") for each in action._choices_actions)  # noqa: SLF001


def _plain(text: str | None) -> str:
    return (text or "").replace("'", "")
