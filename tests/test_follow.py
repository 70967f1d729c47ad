"Following a validator by its folder: while it writes, rotates, is killed within a line, begins anew, and is not there at all."

import json
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest

from prompting_nb.config import InputError
from prompting_nb.loop.follow import Follower
from prompting_nb.loop.journal import Journal

SECONDS = 300.0
# writes events as a validator does, in small pieces, into files that are soon full; `kill` ends it within a line
WRITER = textwrap.dedent("""
    import json, os, sys, time
    from types import SimpleNamespace
    from prompting_nb.loop.journal import Journal

    folder, steps, kill = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kill"
    log = Journal(folder, limit=4000)
    for step in range(log.next_step, log.next_step + steps):
        line = {"step": step, "block": step // 3, "prompt": f"prompt {step}", "uids": [step % 5, 7], "hotkeys": [f"5F{step % 5}", "5G"]}
        line = json.dumps(line | {"rewards": [0.5, None], "statuses": [200, 408]})
        log.append(SimpleNamespace(step=step, to_json=lambda: line))
        log.append_late(step, step + 1, {7: step / 1000})
        if step % 10 == 0:
            time.sleep(0.002)
    if kill:
        with open(f"{folder}/events.jsonl", "ab") as file:
            file.write(line[:50].encode())
        os.kill(os.getpid(), 9)
    log.close()
""")


def writer(folder, steps, end="close"):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(steps), end])


def event(step, **changes):
    line = {"step": step, "block": 1, "prompt": "a", "uids": [1], "hotkeys": ["5F"], "rewards": [1.0], "statuses": [200]} | changes
    return SimpleNamespace(step=step, to_json=lambda: json.dumps(line))


def read_until(reader, step, process):
    deadline, found = time.monotonic() + SECONDS, []
    while not reader.events or reader.events[-1].step < step:
        assert time.monotonic() < deadline and process.poll() in (None, 0, -9)
        new = reader.read()
        found += [e.step for e in list(reader.events)[len(reader.events) - new:]]
    return found


def test_a_log_that_another_process_writes_rotates_and_is_killed_over(tmp_path):
    "Every step comes once and in order, over dozens of files, a half line, and a process that goes on."
    with Follower(tmp_path / "run", last=5000) as reader:
        assert reader.read() == 0
        first = writer(tmp_path / "run", 1500, "kill")
        found = read_until(reader, 1499, first)
        assert first.wait(SECONDS) == -9 and not (tmp_path / "run" / "events.jsonl").read_bytes().endswith(b"\n")
        assert reader.read() == 0
        second = writer(tmp_path / "run", 500)
        found += read_until(reader, 1999, second)
        assert second.wait(SECONDS) == 0
        reader.read()
        assert found == [e.step for e in reader.events] == list(range(2000))
        assert len(list((tmp_path / "run").glob("events.*.jsonl"))) > 20
        assert [e.rewards for e in reader.events] == [[0.5, step / 1000] for step in range(2000)]  # the later ones as well
        assert (reader.unreadable, reader.begun_anew) == (0, 0)
        counted = reader.tally()
    assert counted[7].asked == counted[7].failed == 2000 and counted[7].unrewarded == 0 and counted[3].asked == 400


@pytest.mark.parametrize("last", [1, 7, 8, 1999, 2000, 3000])
def test_it_begins_near_the_end_of_a_long_log(tmp_path, last):
    "The last events are read, wherever the files end, and whole files before them are not opened."
    with Journal(tmp_path, limit=900) as log:
        for step in range(2000 if last > 8 else 30):
            log.append(event(step))
    total = log.next_step
    files = sorted(tmp_path.glob("events.*.jsonl"))
    if last < total // 2:
        files[0].write_text("this is not read\n" * 9)
    with Follower(tmp_path, last) as reader:
        assert reader.read() == min(last, total) and reader.unreadable == 0
        assert [e.step for e in reader.events] == list(range(max(0, total - last), total))
        with Journal(tmp_path, limit=900) as log:
            for step in range(total, total + 20):
                log.append(event(step))
        assert reader.read() == min(last, 20) and reader.events[-1].step == total + 19


def test_lines_that_are_longer_than_what_is_read_at_once(tmp_path):
    with Journal(tmp_path) as log:
        for step in range(4):
            log.append(event(step, prompt="long " * 500_000))
    with Follower(tmp_path, last=2) as reader:
        assert reader.read() == 2 and [e.step for e in reader.events] == [2, 3]


@pytest.mark.parametrize("line", ["{}", "[1]", "null", "nonsense", '{"step": "x"}', "[" * 10**5, '{"step": 1, "rewards": [NaN]}', "\0" * 9])
def test_lines_of_another_kind_are_counted(tmp_path, line):
    with Journal(tmp_path) as log:
        log.append(event(0))
    with open(tmp_path / "events.jsonl", "a") as file:
        others = [event(1), event(2, rewards=[float("inf")]), event(3, uids=[1, 2])]
        file.write("\n".join([line, *(other.to_json() for other in others), ""]))
    (tmp_path / "rewards.jsonl").write_text(f"{line}\n")
    with Follower(tmp_path) as reader:
        assert reader.read() == 2 and [e.step for e in reader.events] == [0, 1]
        assert reader.unreadable == 4 and "4 lines of the log without an event" in str(reader)


def test_a_folder_that_begins_anew_or_loses_its_old_files(tmp_path):
    with Journal(tmp_path, limit=300) as log:
        for step in range(9):
            log.append(event(step))
    with Follower(tmp_path) as reader:
        assert reader.read() == 9
        sorted(tmp_path.glob("events.*.jsonl"))[0].unlink()  # somebody makes room
        with Journal(tmp_path, limit=300) as log:
            for step in range(9, 12):
                log.append(event(step))
        assert reader.read() == 3 and reader.begun_anew == 0
        for path in tmp_path.glob("events*"):
            path.unlink()
        with Journal(tmp_path) as log:
            log.append(event(0, prompt="another log"))
        assert reader.read() == 1 and [e.prompt for e in reader.events] == ["another log"] and reader.begun_anew == 1
        (tmp_path / "events.jsonl").write_text("")  # emptied where it is
        with Journal(tmp_path) as log:
            assert reader.read() == 0
            log.append(event(0, prompt="a third"))
        assert reader.read() == 1 and [e.prompt for e in reader.events] == ["a third"] and "begun anew" in str(reader)


def test_rewards_that_come_before_their_event_is_read_or_never(tmp_path):
    with Journal(tmp_path) as log, Follower(tmp_path, last=3) as reader:
        log.append_late(1, 2, {1: 0.25})
        assert reader.read() == 0
        log.append(event(0, rewards=[None]))
        assert reader.read() == 1 and reader.events[0].rewards == [None]
        log.append(event(1, rewards=[None]))
        assert reader.read() == 1 and [e.rewards for e in reader.events] == [[None], [0.25]]
        log.append_late(0, 2, {1: 0.75, 9: 1.0})
        assert reader.read() == 0 and [e.rewards for e in reader.events] == [[0.75], [0.25]]
        for step in range(2, 6):
            log.append(event(step))
        log.append_late(0, 6, {1: 0.5})  # of a step that is not kept any more
        assert reader.read() == 3 and [e.step for e in reader.events] == [3, 4, 5]


def test_a_view_keeps_something(tmp_path):
    with pytest.raises(InputError, match="at least one event"):
        Follower(tmp_path, last=0)


WATCH = [sys.executable, "-c", "import sys; from prompting_nb.cli import main; main(sys.argv[1:])", "watch", "--every", "0.05", "--dir"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_waits_follows_and_ends_in_order(tmp_path, number):
    watching = subprocess.Popen([*WATCH, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watching.stdout.readline().startswith(f"waiting: there is no folder {tmp_path / 'run'} yet")
        with Journal(tmp_path / "run") as log:
            assert "holds no events yet" in watching.stdout.readline()
            log.append(event(0))
            assert "; step 0, block 1; mean reward 1.000, 1 request to 1 uid, 0 failed" in watching.stdout.readline()
        watching.send_signal(number)
        out, err = watching.communicate(timeout=SECONDS)
        assert (watching.returncode, err) == (0, "")
    finally:
        watching.kill()
        watching.wait()
