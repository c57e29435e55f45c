"""The help of every command ends in an example, and the example is a command line that the command takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest

from ppg_agents.commands.doctor import doctor
from ppg_agents.commands.main import cli

EXAMPLE = re.compile(r"Example:\s+(.+)")


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the command and all below it."""
    yield path, command
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from walk(inner, (*path, name))


ROOT = click.Group("ppg-agent", {**cli.commands, "doctor": doctor}, help=cli.help, params=cli.params)
COMMANDS = dict(walk(ROOT, ("ppg-agent",)))


def example(command: click.Command) -> str:
    """Return the last example in a command's help, "" when there is none."""
    text = "\n".join(part for part in (command.help, command.epilog) if part)
    found = EXAMPLE.findall(text)
    return str(found[-1]).strip() if found else ""


def parse(words: list[str]) -> tuple[str, ...]:
    """Parse a command line down to its last command, without running it; return the command's path."""
    path, rest = words[:1], words[1:]
    command: click.Command = ROOT
    parent = None
    while True:
        context = command.make_context(path[-1], rest, parent=parent)
        if not isinstance(command, click.Group):
            return tuple(path)
        name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None
        path, command, parent = [*path, str(name)], inner, context


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_ends_in_an_example_that_the_command_takes(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    line = example(command)
    assert line, f"{' '.join(path)}: expected a line 'Example: …' in its help, got none; add it to the docstring"
    words = shlex.split(line)
    if words[0] != "ppg-agent":  # accelerate launch … -m ppg_agents.cli train
        assert " ".join(path) in line, "an example of something else"
        words = ["ppg-agent", *words[words.index("ppg_agents.cli") + 1 :]]
        assert parse(words)
        return
    assert parse(words)[: len(path)] == path


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_example_is_shown_whole(path: tuple[str, ...]) -> None:
    """A line that is wrapped can not be copied; a terminal is taken to be 80 columns wide."""
    command = COMMANDS[path]
    context = click.Context(command, info_name=path[-1], max_content_width=100, terminal_width=78)
    assert any(line.strip().endswith(example(command)) for line in command.get_help(context).splitlines())


@pytest.mark.parametrize("path", [path for path, c in COMMANDS.items() if isinstance(c, click.Group)], ids=" ".join)
def test_the_list_of_commands_is_shown_whole(path: tuple[str, ...]) -> None:
    context = click.Context(COMMANDS[path], info_name=path[-1], max_content_width=100, terminal_width=78)
    listed = COMMANDS[path].get_help(context).split("Commands:")[1]
    assert "..." not in listed


def test_a_wrong_flag_in_an_example_is_found() -> None:
    with pytest.raises(click.UsageError, match="--polcy-class"):
        parse(["ppg-agent", "train", "--polcy-class", "full"])
