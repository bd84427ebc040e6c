"""`elasticmoe completion SHELL`: a script for the shell that completes commands, flags and their values."""

from __future__ import annotations

import argparse

import shtab

from elasticmoe.cli.terminal import say

HELP = "print a script that lets a shell complete commands and flags"
SHELLS = ("bash", "zsh", "fish")
_HOW = """\
bash:  elasticmoe completion bash > ~/.local/share/bash-completion/completions/elasticmoe
zsh:   elasticmoe completion zsh > "${fpath[1]}/_elasticmoe"
fish:  elasticmoe completion fish > ~/.config/fish/completions/elasticmoe.fish
for this shell only:  eval "$(elasticmoe completion bash)"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `completion`."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="the shell that reads the script")
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from elasticmoe.cli.main import make_parser  # which imports this module

    say(shtab.complete(make_parser(), shell=args.shell), end="")
    return 0
