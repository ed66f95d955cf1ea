"""Bars are for terminals; lines are for everyone."""

import io
import sys

import pytest

from train.progress import print_above_the_bar, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "show", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_a_bar_is_drawn_on_a_terminal_only_and_where_it_is_asked_for(monkeypatch, stream, show, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress_bar(range(3), title="rows", total=3, unit="row", show=show)) == [0, 1, 2]
    with progress_bar(title="steps", total=2, unit="step", show=show, leave=True) as bar:
        bar.update(2)
    drawn = sys.stderr.getvalue()
    assert ("rows:   0%" in drawn) == ("steps: 100%" in drawn) == shown
    assert shown or not drawn


def test_without_tqdm_a_terminal_gets_the_lines_and_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress_bar(range(3), title="rows", total=3, unit="row", show=True)) == [0, 1, 2]
    with progress_bar(title="steps", total=2, unit="step", show=True, initial=1, leave=True) as bar:
        bar.update()
        print_above_the_bar("step 2")
        bar.set_postfix(loss="1.0", refresh=False)
    assert capsys.readouterr().out == "step 2\n" and not sys.stderr.getvalue()


def test_a_line_is_printed_wherever_it_goes(capsys):
    print_above_the_bar("step 3")
    assert capsys.readouterr().out == "step 3\n"
