"""Authentication: what a request must prove, how long its nonce is known, and which answers count as the miner's."""

import asyncio
import hashlib
import logging
import os
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from bittensor import http_auth
from bittensor.sp_core import CRYPTO_ED25519, Keypair, ss58_decode, ss58_encode

from prompting_nb.network import auth
from prompting_nb.network.auth import (
    SIGNATURE,
    Spans,
    FORGOTTEN,
    FileNonces,
    Gatekeeper,
    MemoryNonces,
    Refusal,
    answer_fits,
    claimed_hotkey,
    sign_answer,
    sign_request,
)
from prompting_nb.network.chain import make_wallet
from prompting_nb.protocol import Terminal

MINER, VALIDATOR = make_wallet("miner"), make_wallet("validator")
ME, CALLER = MINER.hotkey.ss58_address, VALIDATOR.hotkey.ss58_address
SECOND = 10**9
START = 1_700_000_000 * SECOND
EARLY = "StaleRequest: signed before this miner began to remember what it accepted"
OLD = "StaleRequest: nonce is older than the 10s freshness window"
GONE = f"StaleRequest: {FORGOTTEN}"
HOUR = 3600 * SECOND
BODY = b'{"roles": ["user"], "messages": ["hello"]}'


class Clock:
    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "file"])
def nonces(request, clock, tmp_path):
    store = MemoryNonces(clock) if request.param == "memory" else FileNonces(tmp_path / "state" / "nonces", clock)
    yield store
    store.close()


def refused(function, *args):
    with pytest.raises(Refusal) as refusal:
        function(*args)
    return refusal.value


# Nonces ---------------------------------------------------------------------------------------------------------------


def test_a_nonce_is_good_once_for_each_caller(nonces):
    assert [nonces.check_and_store(who, START + n) for who, n in
            [("a", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 0)]] == [True, False, True, True, True, False]  # fmt: skip
    assert len(nonces) == 4


def test_nothing_from_before_the_store_is_accepted(nonces):
    refusal = refused(nonces.check_and_store, "a", START - 1)
    assert (refusal.status, refusal.reason, refusal.kind, refusal.headers) == (401, EARLY, "StaleRequest", ())
    assert len(nonces) == 0 and nonces.check_and_store("a", START)


def test_a_nonce_is_known_as_long_as_it_is_fresh(nonces, clock):
    assert nonces.check_and_store("a", START)
    clock.now += 10 * SECOND
    assert not nonces.check_and_store("a", START)  # ten seconds old, still fresh, still known
    clock.now += SECOND
    assert refused(nonces.check_and_store, "a", START).reason == OLD
    clock.now -= 60 * SECOND  # somebody sets the clock back
    assert refused(nonces.check_and_store, "a", START).reason == GONE
    assert nonces.floor <= START


def test_nonces_that_are_no_longer_fresh_are_dropped(nonces, clock):
    for second in range(40):
        clock.now = START + second * SECOND
        assert nonces.check_and_store("a", clock.now) and nonces.check_and_store("a", clock.now + 2 * SECOND - 1)
        assert len(nonces) <= 2 * 13
    clock.now += 11 * SECOND
    assert nonces.check_and_store("b", clock.now)
    assert len(nonces) <= 2 * 2 + 1


def test_of_many_threads_one_stores_a_nonce(nonces, clock):
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda i: nonces.check_and_store("a", START + i // 8), range(400)))
    assert sum(stored) == 50


def test_files_are_shared_and_outlive_their_process(tmp_path, clock):
    path = tmp_path / "deep" / "folder" / "nonces"
    one, other = FileNonces(str(path), clock), FileNonces(path, clock)
    assert one.path == path and path.parent.stat().st_mode & 0o777 == 0o700
    assert one.check_and_store("a", START) and not other.check_and_store("a", START)
    one.close()
    with pytest.raises(sqlite3.ProgrammingError):
        len(one)
    clock.now += 3 * SECOND
    again = FileNonces(path, clock)
    assert again.floor == START  # it knows everything since
    assert not again.check_and_store("a", START) and again.check_and_store("a", START + 1)
    other.close(), again.close()


def test_what_another_process_drops_stays_refused(tmp_path, clock):
    one = FileNonces(tmp_path / "nonces", clock)
    assert one.check_and_store("a", START)
    ahead = FileNonces(tmp_path / "nonces", Clock(START + 30 * SECOND))  # its clock is wrong
    assert len(ahead) == 0
    assert refused(one.check_and_store, "a", START).reason == GONE
    assert one.check_and_store("a", START + 2 * SECOND)
    one.close(), ahead.close()


def test_a_damaged_file_is_replaced_and_what_it_could_hold_is_refused(tmp_path, clock, caplog):
    path = tmp_path / "nonces"
    path.write_bytes(b"x" * 5000)
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").write_bytes(b"x")
    store = FileNonces(path, clock)
    assert store.floor == START + 2 * SECOND
    assert refused(store.check_and_store, "a", START + 2 * SECOND - 1).reason == EARLY
    assert store.check_and_store("a", START + 2 * SECOND)
    record, = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"{path} is damaged (file is not a database) and set aside as {path}.damaged"
    assert Path(f"{path}.damaged").read_bytes() == b"x" * 5000
    store.close()


def spoil_page(path):
    with open(path, "r+b") as file:
        for page in range(1, os.path.getsize(path) // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 64)


def in_sql(text):
    def spoil(path):
        with sqlite3.connect(path) as db:
            db.executescript(text)
        db.close()

    return spoil


DAMAGE = {
    "pages": spoil_page, "cut off": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "no columns": in_sql("DROP TABLE nonces; CREATE TABLE nonces (other TEXT)"),
    "a view": in_sql("DROP TABLE floor; CREATE VIEW floor AS SELECT 1 AS one, 'x' AS nonce"),
    "text for a number": in_sql("UPDATE floor SET nonce = 'never'"),
    "nothing for a number": in_sql("UPDATE floor SET nonce = NULL"),
    "nonces of text": in_sql("INSERT INTO nonces VALUES ('x', 'a')"),
    "an index": in_sql("DROP TABLE floor; CREATE INDEX floor ON nonces (hotkey)"),
    "refused for ever": in_sql(f"INSERT INTO dropped VALUES (0, {2**63 - 1})"),
    "refused since 1970": in_sql(f"INSERT INTO dropped VALUES (0, {START + HOUR})"),
    "refused backwards": in_sql(f"INSERT INTO dropped VALUES ({START + HOUR}, {START})"),
    "refused before 1970": in_sql(f"INSERT INTO dropped VALUES ({-HOUR}, {START})"),
    "a floor in 200 years": in_sql(f"UPDATE floor SET nonce = {200 * 365 * 24 * HOUR}"),
    "a floor before 1970": in_sql("UPDATE floor SET nonce = -1"),
    "nonces in 200 years": in_sql(f"INSERT INTO nonces VALUES ({2**63 - 1}, 'a')"),
    "nonces before 1970": in_sql("INSERT INTO nonces VALUES (-1, 'a')"),
    "callers of text": in_sql("INSERT INTO callers VALUES (1, x'00')"),
    "callers in 200 years": in_sql(f"INSERT INTO callers VALUES ({2**40}, 'a')"),
    "schema": in_sql("PRAGMA writable_schema = on; UPDATE sqlite_master SET sql = 'CREATE TABLE x' WHERE name = 'nonces'"),
}  # fmt: skip


REASONS = {"no columns": "the table nonces is another one", "text for a number": "the table floor holds something else",
           "refused for ever": "the table dropped holds impossible times", "callers of text": "the table callers holds something else",
           "callers in 200 years": "the table callers holds impossible times"}  # fmt: skip


def filled(path, clock):
    with FileNonces(path, clock)._file.db as db:
        db.executemany("INSERT INTO nonces VALUES (?, ?)", [(START + i, "5" * 48) for i in range(1000)])
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


@pytest.mark.parametrize("what", DAMAGE)
def test_a_file_that_is_damaged_inside_is_set_aside_at_the_start(what, tmp_path, clock, caplog):
    path = tmp_path / "nonces"
    filled(path, clock)
    DAMAGE[what](path)
    for _ in range(2):  # the second start finds a sound file
        store = FileNonces(path, clock)
        assert refused(store.check_and_store, "5" * 48, START + 1).reason == EARLY
        clock.now += 2 * SECOND
        assert store.check_and_store("a", clock.now)
        store.close()
    record, = caplog.records
    assert "is damaged" in record.getMessage() and Path(f"{path}.damaged").exists()
    assert "None" not in record.getMessage() and REASONS.get(what, "") in record.getMessage()


def test_a_file_that_is_damaged_while_it_is_used_is_set_aside(tmp_path, clock, caplog):
    path = tmp_path / "nonces"
    filled(path, clock)
    store = FileNonces(path, clock)
    spoil_page(path)
    store._file.db.execute("PRAGMA cache_size = 0"), store._file.db.execute("PRAGMA shrink_memory")
    outcome = refused(store.check_and_store, "b", START + 500)
    assert outcome.reason == EARLY
    clock.now += 2 * SECOND
    assert store.check_and_store("b", clock.now) and "set aside" in caplog.text
    assert "log was deleted" not in caplog.text
    store.close()


@pytest.mark.parametrize("what", ["file", "log", "both", "folder", "replaced"])
def test_a_file_that_is_deleted_in_use_is_made_anew_with_what_it_held(what, tmp_path, clock, caplog):
    path = tmp_path / "state" / "nonces"
    one, other = FileNonces(path, clock), FileNonces(path, clock)
    assert one.check_and_store("a", START) and other.check_and_store("b", START)
    if what == "folder":
        shutil.rmtree(path.parent)
    if what in ("file", "both"):
        path.unlink()
    if what in ("log", "both"):
        Path(f"{path}-wal").unlink()
    if what == "replaced":  # by an older copy
        older = FileNonces(tmp_path / "older", clock)
        older.close()
        os.replace(tmp_path / "older", path)
        for end in ("-wal", "-shm"):
            Path(f"{path}{end}").unlink(missing_ok=True)
    stores = [one, other, FileNonces(path, clock)] if what in ("file", "folder") else [one, other]
    for store in stores:
        assert [store.check_and_store(who, START) for who in "ab"] == [False, False]
    assert one.check_and_store("c", START) and not other.check_and_store("c", START)
    for store in stores:
        store.close()
    again = FileNonces(path, clock)
    assert [again.check_and_store(who, START) for who in "abcd"] == [False, False, False, True]
    said = [record.getMessage() for record in caplog.records]
    assert again.floor == START and f"{path} was deleted or replaced while in use; it is made anew" in said
    if what == "log":
        assert f"{path} is damaged (its log was deleted) and set aside as {path}.damaged" in said
    again.close()


def test_what_was_just_written_into_a_lost_file_is_written_again(tmp_path, clock):
    path = tmp_path / "nonces"
    store = FileNonces(path, clock)
    add, store._file.add = store._file.add, lambda nonces, now: (add(nonces, now), path.unlink())[0]
    assert store.check_and_store("a", START) and not store.check_and_store("a", START)
    store.close()


def test_a_lost_file_of_which_nothing_is_known_is_made_anew_with_a_window_of_refusals(tmp_path, clock):
    path = tmp_path / "nonces"
    store = FileNonces(path, clock)
    assert store.check_and_store("a", START)
    store._file.db.close()
    path.unlink()
    assert refused(store.check_and_store, "a", START).reason == EARLY and store.floor == START + 2 * SECOND
    clock.now += 2 * SECOND
    assert store.check_and_store("a", clock.now)
    store.close()


def test_a_file_that_is_lost_again_and_again_is_given_up(tmp_path, clock, caplog):
    path = tmp_path / "nonces"
    store, tries = FileNonces(path, clock), []

    def lost():
        tries.append(1)
        raise FileNotFoundError("it is gone")

    store._file = SimpleNamespace(check_there=lost, again=lambda *_, **__: store._file, close=store._file.close)
    refusal = refused(store.check_and_store, "a", START)
    assert (refusal.status, refusal.kind, len(tries)) == (503, "nonces", 3)
    last = caplog.records[-1].getMessage()
    assert last == f"{path} cannot be used, requests are refused: it disappears again and again"
    store.close()


def test_a_closed_file_is_opened_again(tmp_path, clock):
    store = FileNonces(tmp_path / "nonces", clock)
    store.begin()  # it is open
    assert store.check_and_store("a", START)
    store.close()
    assert asyncio.run(store.problem()) == f"{store.path} is closed"
    store.begin()
    assert [asyncio.run(store.accept("a", START + i)) for i in range(2)] == [False, True]
    assert asyncio.run(store.problem()) == ""
    store.close()


def test_a_file_that_cannot_be_written_is_said_once_and_that_it_can_again(tmp_path, clock, caplog):
    store = FileNonces(tmp_path / "nonces", clock)
    for turn in range(2):
        store._file.db.execute("PRAGMA query_only = on")  # as good as a full disk
        for number in range(50):
            assert refused(store.check_and_store, "a", START + number).status == 503
        store._file.db.execute("PRAGMA query_only = off")
        assert store.check_and_store("a", START + 50 + turn)
    told = [(record.levelname, "refused" in record.getMessage()) for record in caplog.records]
    assert told == [("ERROR", True), ("WARNING", False)] * 2
    store.close()


def test_a_file_is_set_aside_with_its_log(tmp_path):
    path = tmp_path / "nonces"
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").write_text(f"old{end}")
    auth.set_aside(path, "a test")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {
        "nonces.damaged": "old", "nonces.damaged-wal": "old-wal"}  # fmt: skip


def test_only_damage_is_damage():
    assert auth.is_damage(sqlite3.DatabaseError("malformed"))
    assert not auth.is_damage(sqlite3.ProgrammingError("closed")) and not auth.is_damage(sqlite3.Error("other"))


def test_a_locked_file_does_not_hold_up_the_loop(tmp_path, clock, caplog):
    store = FileNonces(tmp_path / "nonces", clock)
    other = sqlite3.connect(tmp_path / "nonces", isolation_level=None)

    async def asked(patience):
        store._file.db.execute(f"PRAGMA busy_timeout = {1000 * patience}")
        other.execute("BEGIN EXCLUSIVE")
        waiting = [asyncio.ensure_future(store.accept("b", START + i)) for i in range(5)]
        if patience:
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not any(task.done() for task in waiting)
            other.execute("ROLLBACK")
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert asyncio.run(asked(10)) == [True] * 5
    assert {(error.status, error.kind) for error in asyncio.run(asked(0))} == {(503, "nonces")}
    other.execute("ROLLBACK")
    assert any(thread.name.startswith("nonces_") for thread in threading.enumerate())
    assert [asyncio.run(store.accept("a", START)) for _ in range(2)] == [True, False]
    other.close(), store.close()
    refusal = refused(lambda: asyncio.run(store.accept("a", START + 1)))
    assert (refusal.status, refusal.reason, refusal.kind) == (503, "the miner is stopping", "stopping")


def test_a_thread_that_cannot_be_started_costs_the_requests_of_that_moment(tmp_path, clock, monkeypatch):
    store = FileNonces(tmp_path / "nonces", clock)

    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        refusal = refused(lambda: asyncio.run(store.accept("a", START)))
    assert (refusal.status, refusal.kind) == (503, "nonces") and "cannot write" in asyncio.run(store.problem())
    assert [asyncio.run(store.accept("a", START)) for _ in range(2)] == [True, False]
    assert asyncio.run(store.problem()) == ""
    store.close()


def test_an_attempt_to_store_writes(tmp_path, clock, monkeypatch):
    "Otherwise a full disk would look mended as soon as nobody asks."
    store, now = FileNonces(tmp_path / "nonces", clock), [1000.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: now[0])
    store._file.db.execute("PRAGMA query_only = on")  # what is read still works
    assert refused(lambda: store.check_and_store("a", START)).status == 503

    def tried():
        now[0] += 6
        asyncio.run(store.problem())
        store._thread.submit(int).result()  # after the attempt
        return asyncio.run(store.problem())

    assert "cannot write" in tried()
    store._file.db.execute("PRAGMA query_only = off")
    assert tried() == ""
    store.close()


@pytest.mark.parametrize("hotkey, nonce", [("\ud800", START), ("a", 2**63)])
def test_what_cannot_be_written_down_costs_its_own_request_only(tmp_path, clock, hotkey, nonce):
    store = FileNonces(tmp_path / "nonces", clock)

    async def asked():
        with pytest.raises((ValueError, OverflowError)):
            await asyncio.wait_for(store.accept(hotkey, nonce), 20)
        return await asyncio.wait_for(store.accept("b", START), 20)

    assert asyncio.run(asked()) is True
    store.close()


def test_many_that_come_at_once_are_written_together(tmp_path, clock):
    store = FileNonces(tmp_path / "nonces", clock)
    batches, add = [], store._file.add

    def noting(nonces, now):
        batches.append(len(nonces))
        return add(nonces, now)

    store._file.add = noting

    async def asked():
        return await asyncio.gather(*(store.accept("a", START + i // 4) for i in range(400)))

    assert sum(asyncio.run(asked())) == 100 and sum(batches) == 400 and len(batches) < 200
    store.close()


# Clocks that are wrong ------------------------------------------------------------------------------------------------


def reopen(nonces, clock):
    "The store after a restart; in memory it knows nothing any more."
    if isinstance(nonces, MemoryNonces):
        return nonces
    nonces.close()
    return FileNonces(nonces.path, clock)


@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_that_was_ahead_locks_nobody_out_and_replays_stay_refused(nonces, clock, restart, caplog):
    assert nonces.check_and_store("a", START)
    clock.now += 2 * HOUR
    wrong = [clock.now + n * SECOND for n in (0, 1, 2)]
    assert all(nonces.check_and_store("a", nonce) for nonce in wrong)
    clock.now += 60 * SECOND
    assert nonces.check_and_store("a", clock.now)
    wrong.append(clock.now)
    clock.now = START + 5 * SECOND
    if restart:
        nonces = reopen(nonces, clock)
    assert nonces.check_and_store("a", clock.now)  # served at once
    assert refused(nonces.check_and_store, "a", START).reason == GONE  # dropped when the clock was ahead
    assert nonces.check_and_store("a", START + SECOND)
    warnings = [r.getMessage() for r in caplog.records if "has gone back by at least 72" in r.getMessage()]
    assert len(warnings) == 1 and "those that were accepted until now stay refused" in warnings[0]
    for nonce in wrong:  # the time comes at which they would be fresh
        clock.now = nonce
        try:
            assert not nonces.check_and_store("a", nonce)
        except Refusal as refusal:
            assert refusal.reason == GONE
    clock.now = wrong[2] + 30 * SECOND  # nothing was accepted then
    assert nonces.check_and_store("a", clock.now)
    nonces.close()


def test_a_store_that_was_made_when_the_clock_was_ahead_serves_at_once(tmp_path, clock):
    clock.now += 2 * HOUR
    for nonces in (MemoryNonces(clock), FileNonces(tmp_path / "nonces", clock)):
        clock.now = START + 2 * HOUR
        assert nonces.check_and_store("a", clock.now)
        clock.now = START
        nonces = reopen(nonces, clock)
        assert nonces.check_and_store("a", START) and nonces.floor == START
        clock.now += 2 * HOUR
        for nonce in (clock.now, clock.now - SECOND):  # from before it was made
            assert refused(nonces.check_and_store, "b", nonce).reason == GONE
        assert nonces.check_and_store("b", clock.now + SECOND)
        nonces.close()


@pytest.mark.parametrize("restart", [False, True])
def test_what_strangers_sign_while_the_clock_is_ahead_refuses_themselves_only(nonces, clock, restart, caplog):
    clock.now = START + 2 * HOUR
    for second in range(60):
        assert all(nonces.check_and_store(f"stranger {i}", clock.now) for i in range(2))
        clock.now += SECOND
    clock.now += 20 * SECOND
    assert nonces.check_and_store("stranger 0", clock.now)  # and what is older is dropped
    clock.now = START + 100 * SECOND
    if restart:
        nonces = reopen(nonces, clock)
    assert nonces.check_and_store("validator", clock.now)
    for second in range(0, 60, 7):
        clock.now = START + 2 * HOUR + second * SECOND
        assert nonces.check_and_store("validator", clock.now) and not nonces.check_and_store("validator", clock.now)
        for stranger in ("stranger 0", "stranger 1"):
            assert refused(nonces.check_and_store, stranger, clock.now).reason == GONE
        assert nonces.check_and_store("stranger 2", clock.now)
    nonces.close()


def test_traces_are_few_and_a_flood_spoils_its_own_seconds():
    traces = auth.Traces(limit=100)
    for second in range(40):
        traces.add(second, {"validator"})
    traces.add(20, {f"flood {i}" for i in range(70)})  # 110 pairs
    gone = [second for second in range(40) if traces.has("somebody", second * SECOND)]
    assert gone == [20] and all(traces.has("validator", second * SECOND) for second in range(40))
    assert traces.last == 40 * SECOND - 1 and not traces.has("validator", 40 * SECOND)
    for second in range(40, 110):
        traces.add(second, {"validator"})
    gone = [second for second in range(110) if traces.has("somebody", second * SECOND)]
    assert gone == [*range(34)] or gone == [*range(len(gone))] and 20 < len(gone) < 60  # the oldest
    assert all(traces.has("validator", second * SECOND) for second in range(110))
    assert auth.Traces().last == 0 and not auth.Traces().has("a", 0)


def test_a_file_forgets_who_asked_where_it_is_too_much(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(auth, "_PAIRS", 100)
    store = FileNonces(tmp_path / "nonces", clock)
    for second in range(60):
        clock.now = START + second * SECOND
        count = 90 if second == 30 else 1
        assert all(store.check_and_store(f"a{i}", clock.now) for i in range(count))
    clock.now += 20 * SECOND
    assert store.check_and_store("a0", clock.now)
    for second, free in ((29, True), (30, False), (31, True)):
        clock.now = START + second * SECOND
        assert refused(store.check_and_store, "a0", clock.now).reason == GONE
        assert (taken(store, "b", clock.now) is True) == free
    store.close()


def taken(store, *nonce):
    try:
        return store.check_and_store(*nonce)
    except Refusal:
        return False


def test_a_file_of_an_earlier_format_refuses_everybody_in_what_it_dropped(tmp_path, clock):
    path = tmp_path / "nonces"
    FileNonces(path, clock).close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE callers")
        db.execute("INSERT INTO dropped VALUES (?, ?)", (START + HOUR, START + HOUR + 9 * SECOND))
    db.close()
    store = FileNonces(path, clock)
    clock.now += HOUR + 5 * SECOND
    assert refused(store.check_and_store, "a", clock.now).reason == GONE
    clock.now += 5 * SECOND
    assert store.check_and_store("a", clock.now)
    store.close()


def test_what_was_forgotten_is_copied_into_a_file_that_is_made_anew(tmp_path, clock):
    path = tmp_path / "nonces"
    store = FileNonces(path, clock)
    assert store.check_and_store("a", START)
    clock.now += 60 * SECOND
    assert store.check_and_store("a", clock.now)
    path.unlink()
    clock.now = START
    assert refused(store.check_and_store, "a", START).reason == GONE and store.check_and_store("b", START)
    store.close()


@pytest.mark.parametrize("behind, slack", [(HOUR, None), (5 * SECOND, SECOND)])
def test_a_request_from_before_a_start_with_the_clock_behind_is_refused(clock, behind, slack):
    steady = Clock(7)
    clock.now = START - behind
    nonces = MemoryNonces(clock, steady)
    nonces._slack = slack or nonces._slack  # that of the machine's clock
    assert nonces.check_and_store("b", clock.now)
    clock.now, steady.now = START + 2 * SECOND, 7 + 2 * SECOND  # two seconds after the start it is set right
    recorded = START - SECOND  # accepted before the restart
    assert refused(nonces.check_and_store, "a", recorded).reason == EARLY
    assert nonces.check_and_store("a", START) and nonces.check_and_store("a", clock.now)  # nobody else waits
    clock.now, steady.now = START + 60 * SECOND, 7 + 60 * SECOND
    assert nonces.check_and_store("a", clock.now - 9 * SECOND) and nonces.floor == START


def test_a_clock_that_jumps_does_not_refuse_what_is_known(clock):
    steady = Clock(7)
    nonces = MemoryNonces(clock, steady)
    clock.now, steady.now = START + HOUR, 7 + HOUR
    assert nonces.check_and_store("a", clock.now)
    clock.now += HOUR  # ahead: it has been there for an hour all the same
    assert nonces.floor == START and nonces.check_and_store("a", clock.now - 9 * SECOND)
    clock.now -= HOUR
    assert refused(nonces.check_and_store, "a", clock.now).reason == GONE and nonces.floor == START
    assert nonces.check_and_store("b", clock.now)


def test_a_part_of_a_second_is_not_forgotten(nonces, clock):
    nonce = START + 7 * SECOND // 10
    assert nonces.check_and_store("a", nonce)
    clock.now += 10 * SECOND + SECOND // 2
    assert nonces.check_and_store("b", clock.now) and not nonces.check_and_store("a", nonce)  # fresh, and known


def test_the_last_moment_of_a_second_is_forgotten_with_it(nonces, clock):
    nonce = START + SECOND - 1
    assert nonces.check_and_store("a", nonce)
    clock.now += 30 * SECOND
    assert nonces.check_and_store("a", clock.now)
    clock.now = nonce + SECOND
    assert refused(nonces.check_and_store, "a", nonce).reason == GONE


def test_a_beginning_two_seconds_ahead_is_kept(clock):
    nonces = MemoryNonces(Clock(START + 2 * SECOND))
    nonces.clock = clock
    assert refused(nonces.check_and_store, "a", START).reason == EARLY and nonces.floor == START + 2 * SECOND


def test_the_log_says_once_by_how_much_the_clock_has_gone_back(caplog):
    watch = auth.ClockWatch()
    watch.look(START, START + 3 * SECOND)
    assert caplog.records == []
    for latest in (HOUR, HOUR, 0, HOUR):
        watch.look(START, START + latest)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("has gone back by at least 3600 s;" in text for text in said)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_file_that_knows_only_its_beginning_or_what_it_forgot_tells_of_a_clock_that_was_ahead(tmp_path, clock, dropped, caplog):
    clock.now += 0 if dropped else 2 * HOUR
    store = FileNonces(tmp_path / "nonces", clock)
    if dropped:
        clock.now += 2 * HOUR
        assert store.check_and_store("a", clock.now)
        FileNonces(tmp_path / "nonces", Clock(clock.now + 60 * SECOND)).close()
        assert len(store) == 0
    store.close()
    clock.now = START
    FileNonces(tmp_path / "nonces", clock).close()
    assert "has gone back by at least 7200 s" in caplog.text


def test_a_file_of_the_released_format_with_a_floor_ahead_is_opened(tmp_path, clock):
    path = tmp_path / "nonces"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE nonces (nonce INTEGER, hotkey TEXT, PRIMARY KEY (nonce, hotkey)) WITHOUT ROWID")
        db.execute("CREATE TABLE floor (one INTEGER PRIMARY KEY CHECK (one = 1), nonce INTEGER)")
        db.execute("INSERT INTO floor VALUES (1, ?)", (START + 2 * HOUR,))
        db.execute("INSERT INTO nonces VALUES (?, 'a')", (START + 2 * HOUR + SECOND,))
    db.close()
    store = FileNonces(path, clock)
    assert store.check_and_store("a", START)
    clock.now += 2 * HOUR + SECOND
    assert not store.check_and_store("a", clock.now)
    store.close()


def test_a_request_from_ahead_waits_for_its_time_and_is_refused_after_a_restart():
    gate, nonce = Gatekeeper(ME), time.time_ns() + SECOND // 4
    caller = gate.check(raw(signed(nonce)), BODY, "POST", "/Prompting")
    asyncio.run(gate.accept(caller))
    assert time.time_ns() >= nonce
    reborn = Gatekeeper(ME)
    again = reborn.check(raw(signed(nonce)), BODY, "POST", "/Prompting")
    assert refused(lambda: asyncio.run(reborn.accept(again))).reason == EARLY
    nonce = time.time_ns() + SECOND // 4
    reborn.verify(raw(signed(nonce)), BODY, "POST", "/Prompting")
    assert time.time_ns() >= nonce


def test_spans_within_a_second_become_one():
    near = Spans([(10 * SECOND, 11 * SECOND)])
    near.add(8 * SECOND, 9 * SECOND + 1)
    assert list(near) == [(8 * SECOND, 11 * SECOND)]
    far = Spans([(0, SECOND)])
    far.add(2 * SECOND + 1, 3 * SECOND)
    assert list(far) == [(0, SECOND), (2 * SECOND + 1, 3 * SECOND)]
    assert len(list(Spans((i * HOUR, i * HOUR) for i in range(1100)))) == 1024


def test_spans_are_few_and_cover_what_was_added():
    spans = Spans([(50 * SECOND, 51 * SECOND), (0, SECOND)], limit=3)
    assert list(spans) == [(0, SECOND), (50 * SECOND, 51 * SECOND)] and spans.last == 51 * SECOND
    spans.add(2 * SECOND, 3 * SECOND)  # a second apart is close together
    assert list(spans) == [(0, 3 * SECOND), (50 * SECOND, 51 * SECOND)]
    spans.add(20 * SECOND, 20 * SECOND), spans.add(24 * SECOND, 24 * SECOND)  # one too many
    assert list(spans) == [(0, 3 * SECOND), (20 * SECOND, 24 * SECOND), (50 * SECOND, 51 * SECOND)]
    spans.add(2 * SECOND, 60 * SECOND)
    assert list(spans) == [(0, 60 * SECOND)]
    inside = [0 in spans, 60 * SECOND in spans, 60 * SECOND + 1 in spans, -1 in spans, 1 in Spans()]
    assert inside == [True, True, False, False, False] and Spans().last == 0


def test_a_file_that_cannot_be_opened_is_an_error_and_stays(tmp_path, clock):
    path = tmp_path / "nonces"
    path.mkdir()
    with pytest.raises(sqlite3.OperationalError):
        FileNonces(path, clock)
    assert path.is_dir()


def test_processes_that_open_a_new_file_at_once_wait_for_each_other(tmp_path, clock, monkeypatch):
    locked, connect = 3 * [True], sqlite3.connect

    class Busy(sqlite3.Connection):
        def executescript(self, script):
            if locked and locked.pop():
                raise sqlite3.OperationalError("database is locked")
            return super().executescript(script)

    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **more, factory=Busy))
    store = FileNonces(tmp_path / "nonces", clock)
    assert locked == [] and store.check_and_store("a", START)
    store.close()
    monkeypatch.setattr(auth, "_PATIENCE", 0.1)
    locked += 1000 * [True]
    with pytest.raises(sqlite3.OperationalError, match="is locked"):
        FileNonces(tmp_path / "nonces", clock)


def test_what_cannot_be_stored_is_not_accepted(tmp_path, clock, caplog):
    store = FileNonces(tmp_path / "nonces", clock)
    store._file.db.execute("PRAGMA query_only = on")  # as good as a full disk
    refusal = refused(store.check_and_store, "a", START)
    assert (refusal.status, refusal.kind) == (503, "nonces")
    assert refusal.reason == "this miner cannot write down what it accepts"
    assert refusal.__suppress_context__
    record, = caplog.records
    assert record.getMessage().startswith(f"{store.path} cannot be used, requests are refused: attempt to write")
    store.close()


def test_stores_follow_the_clock_of_the_machine_by_default(tmp_path):
    for store in (MemoryNonces(), FileNonces(tmp_path / "nonces")):
        assert abs(store.clock() - time.time_ns()) < 60 * SECOND
        assert store.check_and_store("a", time.time_ns())
        store.close()


# Requests -------------------------------------------------------------------------------------------------------------


def signed(nonce=START, receiver=ME, path="/Prompting", **more):
    return sign_request(VALIDATOR.hotkey, BODY, path=path, receiver=receiver, nonce=nonce) | more


def raw(headers):
    return [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]


def test_a_request_is_signed_as_bittensor_signs_it():
    ours, theirs = signed(), http_auth.sign(
        VALIDATOR, method="POST", path="/Prompting", body=BODY, receiver_ss58=ME, nonce_ns=START)  # fmt: skip
    signature = ours.pop("X-Bittensor-Signature")
    del theirs["X-Bittensor-Signature"]
    assert ours == {**theirs, "X-Bittensor-Crypto": "sr25519"}
    assert signature.startswith("0x") and len(bytes.fromhex(signature[2:])) == 64


@pytest.fixture
def gate(clock):
    return Gatekeeper(ME, clock=clock)


def test_a_caller_is_who_signed(gate):
    caller = gate.verify(raw(signed()), BODY, "POST", "/Prompting")
    assert caller == Terminal(hotkey=CALLER, nonce=START, version="btauth/1")


def test_the_store_that_is_given_is_used(clock):
    nonces = MemoryNonces(clock)
    for expected in (None, "ReplayedRequest"):
        gate = Gatekeeper(ME, nonces, clock)
        if expected:
            assert refused(gate.verify, raw(signed()), BODY, "POST", "/Prompting").kind == expected
        else:
            gate.verify(raw(signed()), BODY, "POST", "/Prompting")


@pytest.mark.parametrize("headers, call, reason", [
    (signed(), {"method": "GET"}, "BadSignature: "), (signed(), {"path": "/Other"}, "BadSignature: "),
    (signed(), {"body": BODY + b" "}, "BadSignature: "), (signed(receiver=CALLER), {}, "WrongReceiver: "),
    (signed(START + 3 * SECOND), {}, "StaleRequest: "), ({}, {}, "MalformedAuth: missing"),
    (signed() | {"X-Bittensor-Nonce": "9" * 5000}, {}, "MalformedAuth: X-Bittensor-Nonce is not"),
    (signed() | {"X-Bittensor-Hotkey": "\xe4"}, {}, "MalformedAuth: "),
])  # fmt: skip
def test_a_request_that_does_not_prove_its_sender_is_refused(gate, headers, call, reason):
    call = {"body": BODY, "method": "POST", "path": "/Prompting"} | call
    with pytest.raises(Refusal) as refusal:
        gate.verify(raw(headers), **call)
    value = refusal.value
    assert (value.status, value.reason.startswith(reason)) == (401, True), value.reason
    assert value.kind == reason.split(":")[0] and value.__suppress_context__


@pytest.mark.parametrize("error", [ValueError("not a number"), OverflowError("not a number")])
def test_what_the_store_cannot_hold_is_malformed(clock, error):
    class Store:
        def check_and_store(self, hotkey_ss58, nonce_ns):
            raise error

    refusal = refused(Gatekeeper(ME, Store(), clock).verify, raw(signed()), BODY, "POST", "/Prompting")
    assert (refusal.status, refusal.kind, refusal.reason) == (401, "MalformedAuth", "MalformedAuth: not a number")


def test_in_an_event_loop_the_same_is_accepted_and_refused(clock):
    gate = Gatekeeper(ME, clock=clock)
    for hotkey in (CALLER, ME):  # a nonce belongs to its hotkey
        caller = Terminal(hotkey=hotkey, nonce=START)
        assert asyncio.run(gate.accept(caller)) is caller
        refusal = refused(lambda: asyncio.run(gate.accept(caller)))
        reason = "ReplayedRequest: this nonce was already accepted from this hotkey"
        assert (refusal.status, refusal.kind, refusal.reason) == (401, "ReplayedRequest", reason)


@pytest.mark.parametrize("error", [ValueError("not a number"), OverflowError("not a number")])
def test_what_the_store_or_the_protocol_cannot_read_is_malformed(clock, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    async def fail_later(hotkey, nonce):
        raise error

    gate = Gatekeeper(ME, SimpleNamespace(accept=fail_later), clock)
    monkeypatch.setattr(http_auth, "verify", fail)
    for call in (lambda: asyncio.run(gate.accept(Terminal(hotkey=CALLER, nonce=START))),
                 lambda: gate.check(raw(signed()), BODY, "POST", "/Prompting")):  # fmt: skip
        refusal = refused(call)
        assert (refusal.status, refusal.kind, refusal.reason) == (401, "MalformedAuth", "MalformedAuth: not a number")


@pytest.mark.parametrize("ahead, waits", [(0, []), (1, [1e-9]), (SECOND // 2, [0.5]), (-SECOND, [])])
def test_a_nonce_from_ahead_is_waited_for(clock, monkeypatch, ahead, waits):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(time, "sleep", slept.append)
    gate = Gatekeeper(ME, SimpleNamespace(accept=_always, check_and_store=lambda hotkey, nonce: True), clock)
    caller = Terminal(hotkey=CALLER, nonce=clock() + ahead)
    gate.store(caller)
    asyncio.run(gate.accept(caller))
    assert slept == waits * 2


async def _always(hotkey, nonce):
    return True


@pytest.mark.parametrize("caller, given", [(Terminal(hotkey=CALLER, nonce=START), (CALLER, START)), (Terminal(), ("", 0))])
def test_the_store_is_told_hotkey_and_nonce(clock, caller, given):
    told = []

    async def accept(*pair):
        told.append(pair)
        return True

    nonces = SimpleNamespace(accept=accept, check_and_store=lambda *pair: told.append(pair) or True)
    gate = Gatekeeper(ME, nonces, clock)
    asyncio.run(gate.accept(caller)), gate.store(caller)
    assert told == [given, given]


def test_a_hotkey_that_is_too_long_is_refused_before_it_is_read(gate, monkeypatch):
    monkeypatch.setattr(http_auth, "verify", None)
    refusal = refused(gate.verify, raw(signed() | {"X-Bittensor-Hotkey": "5" * 65}), BODY, "POST", "/Prompting")
    reason = "MalformedAuth: invalid hotkey address or signature encoding"
    assert (refusal.status, refusal.kind, refusal.reason) == (401, "MalformedAuth", reason)


def test_headers_are_decoded_by_name():
    headers = [(b"accept", b"\xe4"), (b"x-bittensor-nonce", b"1")]
    assert auth.decode_headers(headers) == {"accept": "ä", "x-bittensor-nonce": "1"}
    assert auth.decode_headers(headers, b"x-bittensor-") == {"x-bittensor-nonce": "1"}


def test_a_request_without_a_caller_claims_none():
    assert claimed_hotkey([(b"accept", b"x")]) == ""


@pytest.mark.parametrize("name", ["hotkey", "nonce", "signature", "receiver", "version", "crypto", "anything"])
def test_a_header_that_appears_twice_is_refused(gate, name):
    twice = [*raw(signed()), *[(f"x-bittensor-{name}".encode(), b"x")] * (2 if name == "anything" else 1)]
    refusal = refused(gate.verify, twice, BODY, "POST", "/Prompting")
    assert (refusal.kind, refusal.reason) == ("MalformedAuth", "MalformedAuth: an X-Bittensor header appears twice")


def test_other_headers_may_appear_twice(gate):
    assert gate.verify([*raw(signed()), (b"accept", b"a"), (b"accept", b"b")], BODY, "POST", "/Prompting").hotkey == CALLER


def test_a_refusal_says_what_it_was_given():
    plain, full = Refusal(500, "broken"), Refusal(429, "too many", "quota", ((b"retry-after", b"1"),))
    assert (plain.status, plain.reason, plain.kind, plain.headers, str(plain)) == (500, "broken", "other", (), "broken")
    assert (full.status, full.reason, full.kind, full.headers) == (429, "too many", "quota", ((b"retry-after", b"1"),))


@pytest.mark.parametrize("sender, receiver", [(0, None), (None, 2), (2, 0)])
def test_the_same_key_under_another_prefix_is_the_same_caller(gate, sender, receiver):
    spelt = lambda address, prefix: address if prefix is None else ss58_encode(ss58_decode(address), prefix)
    signer = SimpleNamespace(ss58_address=spelt(CALLER, sender), crypto_type=1, sign=VALIDATOR.hotkey.sign)
    headers = sign_request(signer, BODY, path="/Prompting", receiver=spelt(ME, receiver), nonce=START)
    assert gate.verify(raw(headers), BODY, "POST", "/Prompting").hotkey == CALLER
    assert claimed_hotkey(raw(headers)) == signer.ss58_address
    assert refused(gate.verify, raw(signed()), BODY, "POST", "/Prompting").kind == "ReplayedRequest"


# Answers --------------------------------------------------------------------------------------------------------------

ANSWER = b'{"completion": "Lima."}'
QUESTION = {"caller": CALLER, "path": "/Prompting", "nonce": START}


def test_an_answer_is_signed_for_one_question():
    signature = sign_answer(MINER.hotkey, ANSWER, **QUESTION)
    assert SIGNATURE == "x-prompting-signature" and signature.startswith("sr25519 0x")
    assert answer_fits(signature, ANSWER, miner=ME, **QUESTION)
    assert answer_fits(signature.replace("0x", ""), ANSWER, miner=ME, **QUESTION)
    spaced = signature[:20] + " " + signature[20:]  # as hexadecimal digits may be written
    assert answer_fits(spaced, ANSWER, miner=ME, **QUESTION)
    for other in ({"caller": ME}, {"path": "/Other"}, {"nonce": START + 1}, {"miner": CALLER}):
        assert answer_fits(signature, ANSWER, **{"miner": ME, **QUESTION, **other}) is False
    assert answer_fits(signature, ANSWER + b" ", miner=ME, **QUESTION) is False


def test_a_key_of_the_other_scheme_signs_requests_and_answers(gate):
    other = Keypair.create_from_uri("//miner", crypto_type=CRYPTO_ED25519)
    headers = sign_request(other, BODY, path="/Prompting", receiver=ME, nonce=START)
    assert gate.verify(raw(headers), BODY, "POST", "/Prompting").hotkey == other.ss58_address
    signature = sign_answer(other, ANSWER, **QUESTION)
    assert signature.startswith("ed25519 0x") and answer_fits(signature, ANSWER, miner=other.ss58_address, **QUESTION)
    wrong = signature.replace("ed25519", "sr25519")
    assert not answer_fits(wrong, ANSWER, miner=other.ss58_address, **QUESTION)


def test_the_signed_line_of_an_answer():
    payload = http_auth.build_payload(scheme="sr25519", method="ANSWER", path="/Prompting", body=ANSWER, nonce_ns=START,
                                      sender_ss58=ME, receiver_ss58=CALLER)  # fmt: skip
    by_hand = f"sr25519 0x{MINER.hotkey.sign(payload).hex()}"
    assert answer_fits(by_hand, ANSWER, miner=ME, **QUESTION)


def test_a_stream_is_signed_by_its_digest():
    "The body of a stream is not kept, and what is signed is the same."
    whole, digest = b"Lima.", hashlib.sha256(b"Lima.")
    assert answer_fits(sign_answer(MINER.hotkey, digest, **QUESTION), whole, miner=ME, **QUESTION)


@pytest.mark.parametrize("signature", ["", " ", "sr25519", "sr25519 0x", "none 0x00", "sr25519 0x" + "00" * 64,
                                       "sr25519 0xgg", "ed25519 0x" + "00" * 64, "sr25519  0x00", "\ud800"])  # fmt: skip
def test_what_is_no_signature_does_not_fit(signature):
    assert answer_fits(signature, ANSWER, miner=ME, **QUESTION) is False


def test_freshness_is_that_of_the_protocol():
    assert (auth.MAX_AGE, auth.MAX_SKEW) == (10, 2)
