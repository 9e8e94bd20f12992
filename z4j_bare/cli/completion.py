"""``z4j-bare completion``: completion scripts for shells, generated from the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

EXAMPLES = """\
examples:
  source <(z4j-bare completion bash)        # in ~/.bashrc
  source <(z4j-bare completion zsh)         # in ~/.zshrc, after compinit
  z4j-bare completion fish > ~/.config/fish/completions/z4j-bare.fish
"""

_BASH = """\
_z4j_bare() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local path="" words="" each
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

#: The words of a command, such as ``("buffer", "list")``, and the parser of the last word.
ParserNode = tuple[tuple[str, ...], argparse.ArgumentParser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell that runs the script")


def run(arguments: argparse.Namespace) -> int:
    """Print the completion script of the selected shell; return 0."""
    from z4j_bare.cli.main import COMMANDS, build_parser

    nodes = list(walk(build_parser("z4j-bare", COMMANDS), ()))
    if arguments.shell == "fish":
        print("\n".join(fish(nodes)))
    else:
        print((_ZSH if arguments.shell == "zsh" else "") + bash(nodes), end="")
    return 0


def walk(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[ParserNode]:
    """Yield a parser and, depth first, the parsers of its subcommands."""
    yield path, parser
    for name, subparser in _subparsers(parser).items():
        yield from walk(subparser, (*path, name))


def bash(nodes: list[ParserNode]) -> str:
    """Return the bash script, which also works in zsh after ``bashcompinit``."""
    choices, words = [], []
    for path, parser in nodes:
        location = "".join(f"/{word}" for word in path)
        words.append(f'            "{location}") words="{" ".join(_words(parser))}" ;;')
        for action in parser._actions:  # noqa: SLF001 - no public equivalent
            if action.choices and action.option_strings:
                patterns = "|".join(f'"{location} {option}"' for option in action.option_strings)
                choices.append(
                    f'        {patterns}) words="{" ".join(map(str, action.choices))}" ;;'
                )
    commands = "|".join("/" + "/".join(path) for path, _ in nodes if path)
    return _BASH.format(
        commands=commands, choices="\n".join(choices), words="\n".join(words), prog="z4j-bare"
    )


def fish(nodes: list[ParserNode]) -> Iterator[str]:
    """Yield the lines of the fish script."""
    for path, parser in nodes:
        subcommands = " ".join(_subparsers(parser))
        entered = " ; and ".join(f"__fish_seen_subcommand_from {word}" for word in path)
        not_deeper = f"not __fish_seen_subcommand_from {subcommands}" if subcommands else ""
        condition = " ; and ".join(filter(None, (entered, not_deeper)))
        for action in parser._actions:  # noqa: SLF001
            for option in action.option_strings:
                flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                values = f" -x -a '{' '.join(map(str, action.choices))}'" if action.choices else ""
                text = _quotable(action.help)
                yield f"complete -c z4j-bare -n '{condition}' {flag}{values} -d '{text}'"
        for name, text in _command_helps(parser):
            yield f"complete -c z4j-bare -f -n '{condition}' -a {name} -d '{_quotable(text)}'"


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:  # noqa: SLF001
        if action.option_strings:
            yield from action.option_strings
        elif action.choices:
            yield from map(str, action.choices)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


def _command_helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action._choices_actions:  # noqa: SLF001
                yield command.dest, command.help or ""


def _quotable(text: str | None) -> str:
    return (text or "").replace("'", "")
