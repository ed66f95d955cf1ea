"""Progress for people: bars where standard error is a terminal, and lines that stay. A log gets the lines only."""

import sys
from collections.abc import Iterable
from typing import Any


def progress_bar(items: Iterable[Any] | None = None, *, title: str, total: int, unit: str, show: bool, **options: Any):
    """Return tqdm's bar, over `items` if there are any; without `show`, or a terminal to be redrawn on, it is silent.

    Args:
        options: as tqdm takes them; a bar that is done is wiped away unless `leave=True`.
    """
    from tqdm import tqdm

    silent = not (show and is_watched())
    return tqdm(items, desc=title, total=total, unit=unit, disable=silent, **{"leave": False, **options})


def is_watched() -> bool:
    """Say whether bars go to a terminal, and not into a file."""
    return sys.stderr.isatty()


def print_above_the_bar(line: str) -> None:
    """Print a line without tearing a bar."""
    from tqdm import tqdm

    tqdm.write(line)
