"""Workers with deadlines and turns, and sheets that are whole at every moment."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_process
from bench.gpu_process import Ended, Sheet, Workers

ROOT = Path(gpu_process.__file__).parent.parent


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def hear(commands: dict[str, list[str]], seconds: float, at_once: int = 4) -> tuple[list, dict[str, Ended]]:
    """All lines in the order of their arrival, and how each command ended."""
    lines, ends = [], {}
    with Workers(seconds=seconds, at_once=at_once) as workers:
        for name, command in commands.items():
            workers.start(name, command)
        for name, heard in workers:
            if isinstance(heard, Ended):
                ends[name] = heard
            else:
                lines.append((name, heard))
    return lines, ends


NOTE = "from bench.gpu_process import note; "


def test_workers_are_heard_line_by_line_and_end_with_their_code():
    failing = script(NOTE + "note(value=1); note(value=2); print('the reason'); raise SystemExit(7)")
    lines, ends = hear({"a": failing, "b": script("pass")}, seconds=60)
    assert lines == [("a", {"value": 1}), ("a", {"value": 2})]
    assert ends == {"a": Ended(code=7, tail="the reason"), "b": Ended(code=0, tail="")}


def _is_running(mark: str) -> bool:
    """Whether a process has `mark` in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError as gone:
            assert gone.errno in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM)
            continue
        if mark.encode() in command:
            return True
    return False


def test_a_hanging_worker_is_cut_with_its_children_and_keeps_its_lines(tmp_path):
    sleeper = f"import time; time.sleep(60)  # {tmp_path}"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{sleeper}']); "
    started = time.monotonic()
    lines, ends = hear({"a": script(NOTE + child + "note(found=3); time.sleep(60)")}, seconds=3)
    assert time.monotonic() - started < 20
    assert lines == [("a", {"found": 3})] and ends["a"].code is None
    # a child that was killed is seen until the system has taken it away
    while time.monotonic() - started < 20 and _is_running(str(tmp_path)):
        time.sleep(0.05)
    assert not _is_running(str(tmp_path))


def test_workers_that_there_was_no_time_to_start_are_named():
    _, ends = hear({"a": script("import time; time.sleep(60)"), "b": script("pass")}, seconds=0.5, at_once=1)
    assert [end.code for end in ends.values()] == [None, None] and "no time" in ends["b"].tail


TURNS = NOTE + "from bench.gpu_process import wait_for_turn; import time; "


def hear_turns(workers: Workers) -> list[str]:
    return [f"{name} {'ends' if isinstance(heard, Ended) else heard['does']}" for name, heard in workers]


def test_what_is_timed_has_the_machine_for_itself_once_all_are_prepared():
    timing = script(TURNS + "wait_for_turn(); note(does='begins'); time.sleep(0.3); note(does='is done')")
    with Workers(seconds=60, at_once=2) as workers:
        for name in ("a", "b", "c"):
            workers.start(name, timing)
        workers.start("checks", script(TURNS + "time.sleep(1); note(does='checked')"))
        told = hear_turns(workers)
    assert told[:2] == ["checks checked", "checks ends"]
    assert told[2:] == [f"{name} {does}" for name in "abc" for does in ("begins", "is done", "ends")]


def test_what_is_not_prepared_in_time_is_cut_and_so_is_a_turn_that_takes_too_long():
    timing = TURNS + "wait_for_turn(); note(does='begins')"
    with Workers(seconds=60, at_once=8, prepare=3) as workers:
        workers.start("slow to prepare", script(TURNS + "time.sleep(60)"))
        workers.start("slow", script(timing + "; time.sleep(60)"), turn_s=1)
        workers.start("quick", script(timing))
        told = hear_turns(workers)
    assert told == ["slow to prepare ends", "slow begins", "slow ends", "quick begins", "quick ends"]


def test_a_part_whose_workers_are_prepared_waits_for_its_own_turn(tmp_path):
    inner = tmp_path / "part.py"
    inner.write_text(
        f"""
import sys
from bench.gpu_process import Ended, Workers, note
with Workers(seconds=60, at_once=2) as workers:
    for name in "12":
        workers.start(name, [sys.executable, "-c", {TURNS + "wait_for_turn(); note(does='times')"!r}])
    for name, heard in workers:
        if not isinstance(heard, Ended):
            note(does=f"{{name}} {{heard['does']}}")
"""
    )
    with Workers(seconds=60, at_once=4) as workers:
        for name in ("first", "second"):
            workers.start(name, [sys.executable, str(inner)], {"PYTHONPATH": str(ROOT)})
        workers.start("checks", script(TURNS + "time.sleep(2); note(does='checked')"))
        told = hear_turns(workers)
    each = ["1 times", "2 times", "ends"]
    assert told == [
        "checks checked",
        "checks ends",
        *(f"{name} {does}" for name in ("first", "second") for does in each),
    ]


def test_a_sheet_is_whole_at_every_moment(tmp_path):
    sheet = Sheet(tmp_path / "new" / "sheet.json", a=1)
    sheet.content["b"] = object()
    with pytest.raises(TypeError):
        sheet.write()
    assert json.loads(sheet.path.read_text()) == {"a": 1}
    assert gpu_process.LINES not in os.environ


STAYS = TURNS + "wait_for_turn(); note(does='times'); gpu_process.stay(); note(does='goes on')"


def test_one_that_stays_hands_its_turn_on_and_is_ended_with_the_others():
    stays = script(f"from bench import gpu_process; {STAYS}")
    with Workers(seconds=60, at_once=1) as workers:
        workers.start("a", stays)
        workers.start("b", script(TURNS + "wait_for_turn(); note(does='times')"))
        workers.start("c", stays)
        told = list(workers)
    times = {"does": "times"}
    assert told[:4] == [("a", times), ("b", times), ("b", Ended(code=0, tail="")), ("c", times)]
    assert told[4:] == [("a", Ended(code=0, tail="")), ("c", Ended(code=0, tail=""))]


def test_one_that_stays_ended_well_also_when_another_hangs_in_its_turn():
    with Workers(seconds=4, at_once=2) as workers:
        workers.start("a", script(f"from bench import gpu_process; {STAYS}"), turn_s=1)
        workers.start("b", script(TURNS + "wait_for_turn(); time.sleep(60)"))
        ends = {name: heard.code for name, heard in workers if isinstance(heard, Ended)}
    assert ends == {"a": 0, "b": None}


def test_a_worker_can_be_killed():
    with Workers(seconds=60, at_once=1) as workers:
        workers.start("a", script(NOTE + "import time; note(found=1); time.sleep(60)"))
        ends = [heard.code if isinstance(heard, Ended) else workers.kill(name) for name, heard in workers]
        assert ends == [True, -signal.SIGKILL] and not workers.kill("a")


def test_what_a_turn_leaves_of_its_time_is_there_for_the_next():
    with Workers(seconds=60, at_once=2) as workers:
        workers.start("a", script(TURNS + "wait_for_turn(); note(does='times')"), turn_s=30)
        workers.start("b", script(TURNS + "wait_for_turn(); time.sleep(3); note(does='times')"), turn_s=1)
        assert hear_turns(workers) == ["a times", "a ends", "b times", "b ends"]


@pytest.mark.parametrize("slack", [False, True])
def test_a_turn_lasts_longer_as_long_as_those_after_it_can_have_theirs(slack):
    """Also by what was not needed to prepare."""
    timing = TURNS + "wait_for_turn(); note(does='begins'); time.sleep(3); note(does='is done')"
    seconds, prepare = (2, 12) if slack else (12, math.inf)
    with Workers(seconds=seconds, prepare=prepare, at_once=2) as workers:
        workers.start("a", script(timing), turn_s=1)
        workers.start("b", script(timing), turn_s=1 if slack else 11)
        told = hear_turns(workers)
    done = ["a begins", *(["a is done"] if slack else []), "a ends", "b begins", "b is done", "b ends"]
    assert told == done


TELLS = (
    NOTE
    + """
import time
from bench.gpu_process import seconds_to_prepare, wait_for_turn
time.sleep(1)
note(prepare=seconds_to_prepare(1e9), now=time.monotonic())
ends = wait_for_turn()
note(ends=ends)
"""
)


def test_deadlines_are_moments_however_long_a_worker_took_to_load():
    begun = time.monotonic()
    with Workers(seconds=90, at_once=2, prepare=40) as workers:
        workers.start("a", script(TELLS), turn_s=20)
        (_, prepare), (_, turn), (_, ended) = list(workers)
    assert ended == Ended(code=0, tail="")
    assert prepare["now"] + prepare["prepare"] == pytest.approx(begun + 40 - gpu_process.MARGIN_S, abs=0.5)
    assert prepare["now"] - begun > 1
    # nobody's turn is after it
    assert turn["ends"] == pytest.approx(begun + 40 + 90, abs=0.5)


OUTER = (
    NOTE
    + """
import sys, time
from bench import gpu_process
from bench.gpu_process import Ended, Workers
gpu_process.MARGIN_S = gpu_process.TURN_MARGIN_S = 2.0
with Workers(at_once=2) as workers:
    workers.start("inner", [sys.executable, "-c", {inner!r}])
    for name, heard in workers:
        note(inner=getattr(heard, "code", heard), cut=isinstance(heard, Ended))
"""
)


@pytest.mark.parametrize("timed", [False, True])
def test_a_worker_ends_its_own_workers_before_it_is_ended(timed):
    inner = NOTE + ("from bench.gpu_process import wait_for_turn; wait_for_turn(); " if timed else "")
    inner += "import time; note(found=1); time.sleep(60)"
    with Workers(seconds=5, at_once=2) as workers:
        workers.start("outer", script(OUTER.format(inner=inner)), **({"turn_s": 5.0} if timed else {}))
        heard = [line for _, line in workers]
    assert heard == [{"inner": {"found": 1}, "cut": False}, {"inner": None, "cut": True}, Ended(code=0, tail="")]


def test_a_worker_gives_up_what_is_not_prepared_before_it_is_given_up_itself():
    slow = "import time; time.sleep(60)"
    ready = NOTE + "from bench.gpu_process import wait_for_turn; wait_for_turn(); note(found=1)"
    more = f'    workers.start("ready", [sys.executable, "-c", {ready!r}])\n    for name'
    outer = OUTER.format(inner=slow).replace("    for name", more)
    with Workers(seconds=20, prepare=7, at_once=2) as workers:
        workers.start("outer", script(outer), turn_s=20.0)
        heard = [line for _, line in workers]
    found = [{"inner": None, "cut": True}, {"inner": {"found": 1}, "cut": False}, {"inner": 0, "cut": True}]
    assert heard == [*found, Ended(code=0, tail="")]


def test_an_error_while_workers_run_lets_them_end_by_themselves(tmp_path):
    ending = f"""
import time
from pathlib import Path
from bench.gpu_process import end_on_sigterm, note
end_on_sigterm()
try:
    note(runs=1)
    time.sleep(60)
finally:
    Path({str(tmp_path / "wrote")!r}).write_text("what was measured")
"""
    with pytest.raises(KeyError), Workers(seconds=60, at_once=1) as workers:
        workers.start("a", script(ending))
        for _ in workers:
            raise KeyError
    assert (tmp_path / "wrote").read_text() == "what was measured"


def test_workers_do_not_outlive_a_parent_that_was_killed(tmp_path):
    worker = f"""
import os, time
from pathlib import Path
from bench.gpu_process import end_with_parent
end_with_parent()
Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
    parent = f"""
import sys
from bench.gpu_process import Workers
with Workers(seconds=60, at_once=1) as workers:
    workers.start("a", [sys.executable, "-c", {worker!r}])
    list(workers)
"""
    process = subprocess.Popen(script(parent), env={**os.environ, "PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 30
    while not (pid := tmp_path / "pid").exists() or not pid.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    while _runs(int(pid.read_text())):
        assert time.monotonic() < end, "the worker still runs"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_told_to_end_a_process_ends_its_workers_and_itself():
    worker = "import time; from bench.gpu_process import note; note(runs=1); time.sleep(60)"
    parent = f"""
import sys
from bench.gpu_process import Workers, end_on_sigterm
end_on_sigterm()
with Workers(seconds=60, at_once=1) as workers:
    workers.start("a", [sys.executable, "-c", {worker!r}])
    for _ in workers:
        print("runs", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(script(parent), env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143


def test_a_call_at_most_every_so_often_acts_that_often():
    acts = []
    act = gpu_process.at_most_every(0.2, lambda: acts.append(time.monotonic()))
    end = time.monotonic() + 1
    while time.monotonic() < end:
        act()
        time.sleep(0.01)
    assert 3 <= len(acts) <= 5
