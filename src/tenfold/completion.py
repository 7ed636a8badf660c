"""`tenfold completion SHELL`: what the shell needs to complete rooms, verbs, options and their choices."""

from __future__ import annotations

import contextlib
import io
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional

from tenfold.cli import HOUSE, ROOMS, Verb, deferred, load, parser_settings, room_verbs
from tenfold.core import console

# tyro's scripts know options and the file names that follow them. The arguments of most verbs are files, too: these
# endings offer file names where no option is being typed and nothing else fits.
_ENDINGS = {
    "bash": """
_tenfold_or_files() {
  _tyro_tenfold
  if [[ ${COMP_WORDS[COMP_CWORD]} != -* ]]; then
    local fitting=() candidate
    for candidate in "${COMPREPLY[@]}"; do
      [[ -z $candidate || $candidate == -* ]] || fitting+=("$candidate")
    done
    COMPREPLY=("${fitting[@]}")
  fi
}
complete -o default -F _tenfold_or_files tenfold
""",
    "zsh": """
if (( CURRENT > 3 )) && [[ ${words[CURRENT]} != -* && ${words[CURRENT-1]} != --* ]]; then
  _files
fi
""",
    "fish": """
function _tenfold_or_files
    set -l word (commandline -ct)
    set -l fitting (_tyro_tenfold)
    if not string match --quiet -- '-*' $word
        set fitting (string match --regex --invert -- '^-' $fitting)
        if test (count $fitting) -eq 0
            __fish_complete_path $word
            return
        end
    end
    printf '%s\\n' $fitting
end
complete --erase --command tenfold
complete --no-files --command tenfold --arguments '(_tenfold_or_files)'
""",
}


def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> dict[str, str]:
    """Print the completion script for a shell: rooms, verbs, options and their choices.

    Args:
        shell: the shell that reads the script.

    Example:
        tenfold completion bash > ~/.local/share/bash-completion/completions/tenfold
    """
    script = completion_script(shell)
    console.say(script)
    return {"shell": shell, "script": script}


def completion_script(shell: str) -> str:
    """The script that tyro makes from the verbs of all rooms. It names everything: to print it enters every room."""
    rooms = [
        Annotated[
            _choice([_leaf(name, verb) for name, verb in room_verbs(room).items()]),
            tyro.conf.subcommand(name=room, description=summary),
        ]
        for room, summary in ROOMS.items()
    ]
    house = [_leaf(name, load(where)) for name, (_, where) in HOUSE.items()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(
            _choice(rooms + house),
            prog="tenfold",
            args=["--tyro-print-completion", shell],
            config=parser_settings(),
        )
    return printed.getvalue() + _ENDINGS[shell]


def _leaf(name: str, verb: Verb) -> Any:
    return Annotated[Any, tyro.conf.subcommand(name=name, constructor=deferred(verb))]


def _choice(branches: list[Any]) -> Any:
    # A union needs two members: a suppressed None stands beside a single branch.
    return Union[(*branches, Annotated[None, tyro.conf.Suppress])]
