"""Progress for people: bars where standard error is a terminal, and lines that stay. A log gets the lines only.

Bars are drawn by tqdm, and without it there are none: nothing else here needs it.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any


class _NoBar:
    """What tqdm's bar is asked to do, and nothing drawn."""

    def __init__(self, items: Iterable[Any] | None):
        self._items = () if items is None else items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def update(self, _count: float = 1) -> None:
        pass

    def set_postfix(self, **_values: Any) -> None:
        pass


def progress_bar(items: Iterable[Any] | None = None, *, title: str, total: int, unit: str, show: bool, **options: Any):
    """Return tqdm's bar, over `items` if there are any; without `show`, a terminal to redraw or tqdm it is silent.

    Args:
        options: as tqdm takes them; a bar that is done is wiped away unless `leave=True`.
    """
    tqdm = _tqdm() if show else None
    if tqdm is None:
        return _NoBar(items)
    return tqdm(items, desc=title, total=total, unit=unit, **{"leave": False, **options})


def is_watched() -> bool:
    """Say whether bars go to a terminal, and not into a file."""
    return sys.stderr.isatty()


def print_above_the_bar(line: str) -> None:
    """Print a line without tearing a bar."""
    tqdm = _tqdm()
    if tqdm is None:
        print(line)
    else:
        tqdm.write(line)


def _tqdm() -> Any:
    """Tqdm's class, where somebody would see a bar and it is installed; None elsewhere."""
    if not is_watched():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
