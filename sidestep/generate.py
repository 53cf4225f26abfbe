"""Text to music: ``python -m sidestep.generate adapter_dir=... prompt="..." [lyrics=@song.txt]``."""

from __future__ import annotations

import re
import sys

from sidestep.cli import importing, run_command
from sidestep.config.settings import GenerateConfig

WORDS = ("prompt", "lyrics", "keyscale")


def generate_command(config: GenerateConfig) -> None:
    """Generate, and print the path of each file."""
    # imported here so that a mistyped setting is answered before torch loads
    with importing():
        from sidestep.inference.generation import generate

    for file in generate(config):
        print(file)


def quote_words(arguments: list[str]) -> list[str]:
    """Put words in the quotes that Hydra needs around commas, brackets, line breaks and letters beyond ASCII.

    What already begins with a quote stays as it is, and so does everything in a sweep, where a comma means two points.
    """
    if "-m" in arguments or "--multirun" in arguments:
        return arguments
    quoted = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key in WORDS and equals and text not in ("", "null", "???") and text[0] not in "'\"":
            text = re.sub(r"(\\*)\"", r'\1\1\\"', text)  # Hydra undoes backslashes only in front of a quote
            text = re.sub(r"(\\+)$", r"\1\1", text)
            text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # and OmegaConf in front of an interpolation
            argument = f'{key}="{text}"'
        quoted.append(argument)
    return quoted


if __name__ == "__main__":
    sys.argv[1:] = quote_words(sys.argv[1:])
    run_command("generate", GenerateConfig, generate_command)
