"""The request queue: order, bounds and ageing, slots and their holders, and handlers of every kind."""

import asyncio
import gc
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompting_nb.network import queue as queue_module
from prompting_nb.network.queue import QueueFull, Slot, Threads, WorkQueue, apart, is_stream, work

SECONDS = 30  # longest wait for something that must happen


def run(test):
    "Run a coroutine function as a test, in an event loop of its own."

    def wrapped():
        asyncio.run(asyncio.wait_for(test(), SECONDS))

    wrapped.__name__ = test.__name__
    return wrapped


async def turns():
    "Let all tasks do what they can do now."
    for _ in range(5):
        await asyncio.sleep(0)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def start(queue, priority):
    return asyncio.ensure_future(queue.slot(priority))


# The queue ------------------------------------------------------------------------------------------------------------


def test_defaults():
    queue = WorkQueue(3, 7)
    assert (queue.workers, queue.limit, queue.ageing, queue.clock) == (3, 7, 5.0, time.monotonic)
    assert (queue.running, queue.waiting, queue.full) == (0, 0, False)


@run
async def test_slots_are_given_at_once_while_there_are_any():
    queue = WorkQueue(workers=2, limit=1)
    slots = [await queue.slot(0), await queue.slot(0)]
    assert (queue.running, queue.waiting, queue.full) == (2, 0, False)
    third = start(queue, 0)
    await turns()
    assert (queue.running, queue.waiting, queue.full) == (2, 1, True) and not third.done()
    slots[0].release()
    assert queue.waiting == 0  # it has the slot, before its task goes on
    assert isinstance(await third, Slot) and queue.running == 2
    slots[1].release()
    third.result().release()
    assert queue.running == 0
    for slot in (await queue.slot(0), await queue.slot(0)):
        slot.release()


@run
async def test_a_full_queue_refuses_unless_a_lower_priority_waits():
    queue = WorkQueue(workers=1, limit=2)
    busy = await queue.slot(0)
    older, newer = start(queue, 1), start(queue, 1)
    await turns()
    for priority in (0, 1):
        with pytest.raises(QueueFull, match="^2 requests waiting already$"):
            queue.check(priority)
        with pytest.raises(QueueFull, match="^2 requests waiting already$"):
            await queue.slot(priority)
    assert queue.check(1.5) is None and queue.waiting == 2  # `check` changes nothing
    higher = start(queue, 1.5)
    await turns()
    with pytest.raises(QueueFull, match="^a request of higher priority took the place$"):
        await newer  # of equal ones the newest
    assert queue.waiting == 2 and not older.done()
    busy.release()
    await turns()
    assert higher.done() and not older.done()
    higher.result().release()
    (await older).release()
    assert (queue.running, queue.waiting) == (0, 0)


@run
async def test_a_slot_that_is_freed_as_a_waiting_request_is_cancelled_goes_to_the_next():
    queue = WorkQueue(workers=1, limit=3)
    busy = await queue.slot(0)
    gone, also_gone, next_one = start(queue, 3), start(queue, 2), start(queue, 1)
    await turns()
    gone.cancel()
    also_gone.cancel()
    busy.release()  # before their tasks have noticed
    (await next_one).release()
    assert (queue.running, queue.waiting) == (0, 0)
    busy, last = await queue.slot(0), start(queue, 0)
    await turns()
    last.cancel()
    busy.release()
    assert (queue.running, queue.waiting) == (0, 0)


@run
async def test_the_place_of_a_request_that_is_cancelled_in_this_moment_is_free_for_a_higher_one():
    queue = WorkQueue(workers=1, limit=1)
    busy, low = await queue.slot(0), start(queue, 1)
    await turns()
    low.cancel()
    asyncio.get_running_loop().call_later(0.01, busy.release)
    (await queue.slot(2)).release()  # it asks before the task of the other has noticed
    assert low.cancelled() and (queue.running, queue.waiting) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), workers=st.integers(1, 3), limit=st.integers(0, 4))
def test_no_slot_is_lost_whatever_happens_in_one_moment(data, workers, limit):
    "Requests come, are cancelled and let go of their slots, several of them before any task has had a turn."
    asked, held = [], []

    def collect():
        for asking in [a for a in asked if a.done()]:
            asked.remove(asking)
            if not asking.cancelled() and asking.exception() is None:
                held.append(asking.result())
            elif not asking.cancelled():
                assert isinstance(asking.exception(), QueueFull)

    async def test():
        queue = WorkQueue(workers, limit)
        for kind in data.draw(st.lists(st.sampled_from("acrt"), max_size=40)):
            if kind == "a":
                asked.append(start(queue, data.draw(st.integers(0, 3))))
            elif kind == "c" and asked:
                asked[data.draw(st.integers(0, len(asked) - 1))].cancel()
            elif kind == "r" and held:
                held.pop(data.draw(st.integers(0, len(held) - 1))).release()
            elif kind == "t":
                await turns()
            collect()
            assert queue.running <= workers
        while asked or held:
            while held:
                held.pop().release()
            await turns()
            collect()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(asyncio.wait_for(test(), SECONDS))


@run
async def test_two_requests_that_come_at_once_displace_two_others():
    queue = WorkQueue(workers=1, limit=2)
    busy = await queue.slot(0)
    low = [start(queue, 1), start(queue, 2)]
    await turns()
    high = [start(queue, 3), start(queue, 4)]
    assert [type(error) for error in await asyncio.gather(*low, return_exceptions=True)] == [QueueFull] * 2
    assert queue.waiting == 2
    busy.release()
    (await high[1]).release()
    (await high[0]).release()


@run
async def test_a_queue_without_places_refuses_every_priority():
    queue = WorkQueue(workers=1, limit=0)
    busy = await queue.slot(0)
    with pytest.raises(QueueFull, match="^0 requests waiting already$"):
        await queue.slot(99)
    busy.release()
    (await queue.slot(-1)).release()


async def order(count, ageing, seconds):
    "Positions at which requests are served that come before `count` of a higher priority."
    now, served = [100.0], []
    queue = WorkQueue(1, 99, ageing, clock=lambda: now[0])

    async def serve(name, priority):
        slot = await queue.slot(priority)
        served.append(name)
        now[0] += seconds
        slot.release()

    busy = await queue.slot(0)
    tasks = [asyncio.ensure_future(serve("low", 0)), asyncio.ensure_future(serve("low too", 0))]
    tasks += [asyncio.ensure_future(serve(str(i), 9)) for i in range(count)]
    await turns()
    busy.release()
    await asyncio.gather(*tasks)
    return [served.index(name) + 1 for name in ("low", "low too")]


@run
async def test_every_fourth_slot_goes_to_the_one_who_has_waited_longest():
    assert await order(12, ageing=5.0, seconds=1.0) == [8, 12]
    assert await order(12, ageing=3.0, seconds=1.0) == [4, 8]  # after three seconds exactly
    assert await order(12, ageing=3.1, seconds=1.0) == [8, 12]
    assert await order(12, ageing=99.0, seconds=1.0) == [13, 14]


@run
async def test_a_cancelled_request_gives_its_place_or_its_slot_back():
    queue = WorkQueue(workers=1, limit=1)
    busy = await queue.slot(0)
    gone = start(queue, 9)
    await turns()
    gone.cancel()
    await turns()
    assert gone.cancelled() and (queue.waiting, queue.running) == (0, 1)
    late = start(queue, 0)
    await turns()
    busy.release()  # gives the slot to `late` ...
    late.cancel()  # ... who is gone before it hears of it
    await turns()
    assert late.cancelled() and (queue.waiting, queue.running) == (0, 0)
    busy = await queue.slot(0)
    displaced = start(queue, 0)
    await turns()
    start(queue, 1)
    await asyncio.sleep(0)  # displaces it ...
    displaced.cancel()  # ... in the same moment
    await turns()
    assert displaced.cancelled() and queue.waiting == 1


@run
async def test_cancelled_requests_leave_nothing_behind():
    queue = WorkQueue(workers=1, limit=50)
    busy = await queue.slot(0)
    stay = [start(queue, priority) for priority in (3, 1, 2)]
    for _ in range(500):
        gone = start(queue, 5)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    assert queue.waiting == 3 and len(queue._line._heap) <= 2 * 3 + 17
    served = []
    for _ in range(3):
        busy.release()
        await turns()
        done = next(request for request in stay if request.done() and request not in served)
        served.append(done)
        busy = done.result()
    assert served == [stay[0], stay[2], stay[1]]


@run
async def test_a_slot_is_free_when_its_last_holder_lets_go():
    queue = WorkQueue(workers=1, limit=1)
    slot = await queue.slot(0)
    slot.hold()
    slot.hold()
    for running in (1, 1, 0):
        slot.release()
        assert queue.running == running


def test_work_that_ends_when_it_is_cancelled_is_not_logged(caplog, monkeypatch):
    monkeypatch.setattr(queue_module, "_MARGIN", SECONDS)

    async def ends():
        try:
            await asyncio.sleep(SECONDS)
        finally:
            for _ in range(5):
                time.sleep(0.002)  # as other requests do, each in a turn of the loop
                await asyncio.sleep(0)

    async def test():
        queue = WorkQueue(1, 1)
        slot = await queue.slot(0)
        task = asyncio.ensure_future(apart(ends(), slot))
        await turns()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        slot.release()
        queue.outlive(slot, queue.clock())
        await until(lambda: not queue.running)

    asyncio.run(test())
    assert not caplog.records


def test_work_that_goes_on_after_its_time_is_counted_and_logged(caplog):
    held = "work goes on although its time is up: {} of 2 workers are held by such"
    every = "all 2 workers are held by work whose time is up; no request is answered until one of them ends"
    free = "a worker is free again, requests are worked on"

    def said():
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    async def test():
        now, looks = [100.0], []
        queue = WorkQueue(2, 5, clock=lambda: now[0])
        one, two = await queue.slot(0), await queue.slot(0)
        asyncio.get_running_loop().call_later = lambda seconds, *call: looks.append((seconds, *call))
        queue.outlive(one, 103.0)
        queue.outlive(two, 99.0)
        assert looks == [(pytest.approx(3.051), queue._look, one), (pytest.approx(0.051), queue._look, two)]
        assert (queue.stuck, queue.running) == (0, 2)  # it may be about to end
        now[0] = 100.049
        queue._look(two)  # the timer was early: it is set again
        assert looks[2:] == [(pytest.approx(0.002), queue._look, two)] and said() == []
        now[0] = 100.051
        assert (queue.stuck, queue.running) == (1, 2)
        queue._look(two)
        assert said() == [("WARNING", held.format(1))]
        now[0] = 103.051
        assert queue.stuck == 2
        queue._look(one)
        assert said() == [("WARNING", held.format(2)), ("ERROR", every)]
        queue._look(one)
        assert said() == [("WARNING", held.format(2))]  # the error is said once
        one.release()
        assert said() == [("WARNING", free)] and (queue.stuck, queue.running) == (1, 1)
        queue._look(one)  # it has ended
        two.release()
        assert said() == [] and (queue.stuck, queue.running) == (0, 0)
        queue.outlive(two, 99.0)  # nobody holds it
        assert len(looks) == 3 and queue.stuck == 0
        for slot in (await queue.slot(0), await queue.slot(0)):
            queue.outlive(slot, 0.0)
        now[0] += 0.051
        queue._look(slot)
        assert said() == [("WARNING", held.format(2)), ("ERROR", every)]  # again, since one was free in between

    asyncio.run(test())


# Threads --------------------------------------------------------------------------------------------------------------


def names(prefix):
    return sorted(t.name for t in threading.enumerate() if t.name.startswith(prefix))


def test_threads_are_daemons_started_when_they_are_needed():
    threads, free = Threads(limit=2, name="pool"), threading.Event()
    assert (threads.limit, threads.name, names("pool")) == (2, "pool", [])
    assert threads.submit(lambda a, b: a + b, 1, 2).result(SECONDS) == 3
    end = time.monotonic() + SECONDS
    while not threads._free and time.monotonic() < end:
        time.sleep(0.001)  # the first thread is idle again
    waiting = [threads.submit(free.wait, SECONDS)]
    assert names("pool") == ["pool-0"]  # it is used again
    waiting += [threads.submit(free.wait, SECONDS) for _ in range(3)]
    assert names("pool") == ["pool-0", "pool-1"]
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("pool"))
    free.set()
    assert [future.result(SECONDS) for future in waiting] == [True] * 4
    threads.close(SECONDS)
    assert names("pool") == []


def test_threads_carry_every_error_and_go_on():
    threads = Threads(limit=1, name="errors")

    def fail(error):
        raise error

    for error, kind, text in (
        (ValueError("no"), ValueError, "no"),
        (StopIteration(), RuntimeError, "StopIteration"),
        (SystemExit("bye"), SystemExit, "bye"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ):
        raised = threads.submit(fail, error).exception(SECONDS)
        assert (type(raised), str(raised)) == (kind, text)
    assert threads.submit(int, "7").result(SECONDS) == 7 and names("errors") == ["errors-0"]
    threads.close()


@run
async def test_a_thread_that_cannot_be_started_costs_no_slot():
    queue, threads = WorkQueue(1, 4), Threads(2, "few")
    none = patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))

    for _ in range(2):
        slot = await queue.slot(0)
        with none, pytest.raises(RuntimeError, match="start new thread"):
            await work(lambda synapse: synapse, 1, slot, threads)
        slot.release()
        assert queue.running == 0
    slot = await queue.slot(0)
    assert await work(lambda synapse: synapse, 1, slot, threads) == 1
    hangs, free = threading.Event(), threading.Event()
    busy = threads.submit(lambda: hangs.set() or free.wait(10))
    await asyncio.to_thread(hangs.wait, 10)
    with none:
        waits = threads.submit(int)  # for the thread that there is
    free.set()
    assert (await asyncio.wrap_future(waits), await asyncio.wrap_future(busy)) == (0, True)
    threads.close()  # no thread that never ran is waited for


def test_after_a_shortage_there_are_as_many_threads_as_are_needed():
    threads, all_here = Threads(8, "short"), threading.Barrier(8)
    threads.submit(int).result(SECONDS)
    with patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert [future.result(SECONDS) for future in [threads.submit(int) for _ in range(20)]] == [0] * 20
    together = [threads.submit(all_here.wait, SECONDS) for _ in range(8)]
    assert sorted(future.result(SECONDS) for future in together) == [*range(8)]
    threads.close()


def test_cancelled_work_is_not_started():
    threads, free, started = Threads(limit=1, name="cancelled"), threading.Event(), []
    first = threads.submit(free.wait, SECONDS)
    second = threads.submit(started.append, "second")
    third = threads.submit(started.append, "third")
    assert second.cancel()
    free.set()
    assert first.result(SECONDS) and third.result(SECONDS) is None
    assert started == ["third"]
    threads.close()


def test_close_does_not_wait_for_a_thread_that_hangs():
    threads, free = Threads(limit=2, name="hangs"), threading.Event()
    hanging = [threads.submit(free.wait, SECONDS) for _ in range(2)]
    began = time.monotonic()
    threads.close(0.1)
    assert 0.1 <= time.monotonic() - began < SECONDS / 2
    assert len(names("hangs")) == 2
    free.set()
    assert [future.result(SECONDS) for future in hanging] == [True, True]
    end = time.monotonic() + SECONDS
    while names("hangs") and time.monotonic() < end:
        time.sleep(0.001)
    assert names("hangs") == []  # both were told to end


def test_close_gives_all_threads_together_a_moment():
    threads, waited = Threads(limit=2, name="moment"), []
    threads._threads = [SimpleNamespace(join=waited.append)] * 2
    threads.close(-1.0)  # it is over already
    assert waited == [0.0, 0.0]
    with patch.object(queue_module, "time", SimpleNamespace(monotonic=iter([7.0, 7.0, 7.125]).__next__)):
        threads.close()
    assert waited[2:] == [pytest.approx(0.2), pytest.approx(0.075)]


# Handlers -------------------------------------------------------------------------------------------------------------


class Place:
    "A slot, threads, and how many hold the slot."

    def __init__(self):
        self.queue, self.threads = WorkQueue(1, 1), Threads(2, "handlers")

    async def __aenter__(self):
        self.slot = await self.queue.slot(0)
        return self

    async def __aexit__(self, *_):
        self.slot.release()
        await asyncio.wait_for(until(lambda: self.queue.running == 0), SECONDS)  # every holder has let go
        self.threads.close()

    @property
    def holders(self):
        return self.slot._holders

    def work(self, fn, synapse="x"):
        return work(fn, synapse, self.slot, self.threads)


def where(_=None):
    return threading.current_thread().name


@run
async def test_plain_functions_run_in_a_thread_and_others_in_the_loop():
    async def coroutine(synapse):
        return synapse, where()

    def generator(synapse):
        yield where()

    async def agenerator(synapse):
        yield where()

    here = where()
    async with Place() as place:
        assert (await place.work(where)).startswith("handlers-")
        assert await place.work(coroutine, "asked") == ("asked", here)
        assert await place.work(lambda synapse: coroutine(synapse), "asked") == ("asked", here)
        plain, other = await place.work(generator), await place.work(agenerator)
        assert is_stream(plain) and is_stream(other) and not is_stream([]) and not is_stream(iter("a"))
        [piece] = [piece async for piece in plain]
        assert piece.startswith("handlers-")
        assert [piece async for piece in other] == [here]
        await until(lambda: place.holders == 1)


@run
async def test_handlers_in_the_loop_need_no_thread():
    free = threading.Event()

    async def coroutine(synapse):
        return synapse

    def generator(synapse):
        yield synapse

    async def agenerator(synapse):
        yield synapse

    async with Place() as place:
        hanging = [place.threads.submit(free.wait, SECONDS) for _ in range(2)]
        assert await place.work(coroutine) == "x"
        assert [piece async for piece in await place.work(agenerator)] == ["x"]
        stream = await place.work(generator)  # its steps need one
        free.set()
        assert [piece async for piece in stream] == ["x"]
        assert [future.result(SECONDS) for future in hanging] == [True, True]


@run
async def test_a_plain_function_whose_caller_is_gone_holds_the_slot():
    free, started = threading.Event(), threading.Event()

    def hang(_):
        started.set()
        free.wait(SECONDS)

    async with Place() as place:
        asking = asyncio.ensure_future(place.work(hang))
        await until(started.is_set)
        assert place.holders == 2
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled() and place.holders == 2
        free.set()
        await until(lambda: place.holders == 1)


@run
async def test_a_coroutine_is_cancelled_with_its_caller_and_holds_the_slot_until_it_ends():
    cancelled, let_go = asyncio.Event(), asyncio.Event()

    async def stubborn(_):
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        cancelled.set()
        await let_go.wait()

    async with Place() as place:
        asking = asyncio.ensure_future(place.work(stubborn))
        await turns()
        assert place.holders == 2
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled()
        await cancelled.wait()
        assert place.holders == 2
        let_go.set()
        await until(lambda: place.holders == 1)


@run
async def test_a_coroutine_that_cancels_itself_ends_its_request():
    async def give_up(_):
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    async with Place() as place:
        with pytest.raises(RuntimeError, match="^the work has cancelled itself$"):  # its request was not cancelled
            await place.work(give_up)
        await until(lambda: place.holders == 1)


def test_a_coroutine_that_fails_after_its_caller_has_left_is_forgotten(caplog):
    "Nobody waits for its error, which is no error of the event loop's."
    let_go = asyncio.Event()

    async def fail_later(_):
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await let_go.wait()
        raise SystemExit("too late")

    async def test():
        async with Place() as place:
            asking = asyncio.ensure_future(place.work(fail_later))
            await turns()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            let_go.set()
            await until(lambda: place.holders == 1)

    run(test)()
    gc.collect()
    assert not caplog.records


def leave(_=None):
    raise SystemExit("bye")


async def leave_in_the_loop(_):
    raise SystemExit("bye")


async def interrupt(_):
    raise KeyboardInterrupt


def leave_later(_):
    yield "a"
    leave()


async def leave_later_in_the_loop(_):
    yield "a"
    leave()


def number(_):
    yield 1


@pytest.mark.parametrize("handler, kind, text", [
    (leave, RuntimeError, "SystemExit: bye"), (leave_in_the_loop, RuntimeError, "SystemExit: bye"),
    (interrupt, RuntimeError, "KeyboardInterrupt: "), (leave_later, RuntimeError, "SystemExit: bye"),
    (leave_later_in_the_loop, RuntimeError, "SystemExit: bye"), (lambda _: 1 / 0, ZeroDivisionError, "division by zero"),
    (number, TypeError, "a piece of the completion is int instead of str"),
    (lambda _: next(iter(())), RuntimeError, "StopIteration"),
])  # fmt: skip
def test_errors_of_handlers(handler, kind, text):
    async def test():
        async with Place() as place:
            with pytest.raises(kind) as raised:
                [piece async for piece in await place.work(handler)]
            assert (type(raised.value), str(raised.value)) == (kind, text)

    run(test)()


@run
async def test_pieces_are_made_one_by_one_and_empty_ones_left_out():
    made = []

    def generator(_):
        for piece in ("a", "", "b", "c"):
            made.append(piece)
            yield piece

    async with Place() as place:
        stream = await place.work(generator)
        assert made == [] and place.holders == 1
        assert await anext(stream) == "a" and made == ["a"]
        assert place.holders >= 2  # until it is closed
        assert await anext(stream) == "b" and made == ["a", "", "b"]
        assert [piece async for piece in stream] == ["c"]
        await until(lambda: place.holders == 1)


@run
async def test_a_generator_whose_caller_is_gone_is_closed_after_its_step():
    started, free, closed = threading.Event(), threading.Event(), threading.Event()

    def endless(_):
        try:
            yield "a"
            started.set()
            free.wait(SECONDS)
            yield "b"
            yield "c"
        finally:
            closed.set()

    async with Place() as place:
        stream = await place.work(endless)
        assert await anext(stream) == "a"
        asking = asyncio.ensure_future(anext(stream))
        await until(started.is_set)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled() and not closed.is_set() and place.holders == 3
        free.set()
        await until(closed.is_set)
        await until(lambda: place.holders == 1)


@run
async def test_an_async_generator_is_closed_with_its_stream():
    closed = asyncio.Event()

    async def endless(_):
        try:
            while True:
                yield "more"
        finally:
            closed.set()

    async with Place() as place:
        stream = await place.work(endless)
        assert await anext(stream) == "more"
        await stream.aclose()
        await until(closed.is_set)


@run
async def test_a_generator_that_never_waits_lets_others_have_a_turn_at_every_piece():
    turns = 0

    async def busy(_):
        for _ in range(20):
            yield "more"

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with Place() as place:
        stream, seen = await place.work(busy), []
        other = asyncio.ensure_future(others())
        async for _ in stream:
            seen.append(turns)
        other.cancel()
    assert len(seen) == 20 and len(set(seen)) == 20


@run
async def test_pieces_of_an_async_generator_are_made_when_they_are_asked_for():
    made = []

    async def generator(_):
        for piece in ("a", "", "b", "c"):
            made.append(piece)
            yield piece

    async with Place() as place:
        stream = await place.work(generator)
        assert made == [] and place.holders == 1
        assert await anext(stream) == "a"
        await turns()
        assert made == ["a"] and place.holders == 2  # until it has ended
        assert await anext(stream) == "b" and made == ["a", "", "b"]
        assert [piece async for piece in stream] == ["c"]
        assert place.holders == 1  # at once, before the request goes on


@pytest.mark.parametrize("how", ["goes on", "goes on and yields", "hangs in its finally", "fails in its finally", "never began"])
@pytest.mark.parametrize("where", ["making", "made"])
def test_an_async_generator_holds_the_slot_until_it_has_ended(how, where, caplog):
    let_go, begun, ended = asyncio.Event(), asyncio.Event(), []

    async def wait():
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    async def generator(_):
        try:
            if where == "made":
                yield "first"
            begun.set()
            if how == "goes on":
                await wait()
            elif how == "goes on and yields":
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            else:
                await asyncio.Event().wait()
            yield "second"
            ended.append("went on after it was left")
        finally:
            if how == "hangs in its finally":
                await wait()
            if how == "fails in its finally":
                raise SystemExit("an exit would end the event loop")

    async def test():
        async with Place() as place:
            stream = await place.work(generator)
            if where == "made":
                assert await anext(stream) == "first"
                await stream.aclose()
            else:
                asking = asyncio.ensure_future(anext(stream))
                await (asyncio.sleep(0) if how == "never began" else begun.wait())
                asking.cancel()
                await asyncio.wait([asking], timeout=SECONDS)
                assert asking.cancelled()
            await turns()
            held = how == "hangs in its finally" or (how == "goes on" and where == "making")
            assert place.holders == 1 + held
            gc.collect()  # what nobody refers to
            let_go.set()
            await until(lambda: place.holders == 1)
        assert not ended

    run(test)()
    failed = how == "fails in its finally" and where == "made"
    assert ["while it was closed" in record.getMessage() for record in caplog.records] == [True] * failed


class Panic(BaseException):
    "What an extension in Rust raises where its code fails."


@pytest.mark.parametrize("raised", [Panic, GeneratorExit, KeyboardInterrupt])
def test_an_async_generator_that_raises_no_exception_of_the_usual_kind_gives_its_slot_back(raised):
    async def generator(_):
        yield "a"
        raise raised("failed")

    async def test():
        async with Place() as place:
            stream = await place.work(generator)
            assert await anext(stream) == "a"
            with pytest.raises(RuntimeError if raised is KeyboardInterrupt else raised, match="failed"):
                await anext(stream)
            assert place.holders == 1

    run(test)()


@pytest.mark.parametrize("where", ["coroutine", "generator", "thread", "step in a thread"])
def test_work_that_cancels_itself_is_an_error_of_the_handler(where):
    async def coroutine(_):
        raise asyncio.CancelledError

    async def generator(_):
        yield "a"
        raise asyncio.CancelledError

    def plain(_):
        raise asyncio.CancelledError

    def step(_):
        yield "a"
        raise asyncio.CancelledError

    handler = dict(zip(("coroutine", "generator", "thread", "step in a thread"), (coroutine, generator, plain, step)))[where]

    async def test():
        async with Place() as place:
            with pytest.raises(RuntimeError, match="cancelled itself|CancelledError"):
                [piece async for piece in await place.work(handler)]

    run(test)()


@run
async def test_an_awaitable_may_be_awaited_apart_without_a_slot():
    let_go, ended = asyncio.Event(), []

    async def value(result):
        return result

    async def stubborn():
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await let_go.wait()
        ended.append(True)

    assert await apart(value(7)) == 7
    asking = asyncio.ensure_future(apart(stubborn()))
    await turns()
    asking.cancel()
    await asyncio.wait([asking], timeout=SECONDS)
    assert asking.cancelled() and not ended
    let_go.set()
    await until(lambda: ended)


@run
async def test_work_that_goes_on_after_its_request_is_kept_from_the_garbage_collector():
    slot = Slot(lambda: None)

    async def stubborn():
        with suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        await asyncio.get_running_loop().create_future()  # which refers to nobody but this task

    asking = asyncio.ensure_future(apart(stubborn(), slot))
    await turns()
    asking.cancel()
    await asyncio.wait([asking], timeout=SECONDS)
    slot.release()  # the request's own hold
    del asking
    gc.collect()
    await turns()
    assert slot.held


@run
async def test_work_that_is_cancelled_before_it_begins_gives_its_slot_back():
    slot, begun = Slot(lambda: None), []

    class Late:
        def __await__(self):
            begun.append(True)
            yield

    before = asyncio.all_tasks()
    asking = asyncio.ensure_future(apart(Late(), slot))
    await asyncio.sleep(0)  # the task for the work exists, and waits for its first turn
    for task in asyncio.all_tasks() - before:
        task.cancel()
    await asyncio.wait([asking], timeout=SECONDS)
    await turns()
    slot.release()
    assert not slot.held and not begun


def test_a_thread_that_ends_after_its_loop_is_no_error(caplog):
    free, started = threading.Event(), threading.Event()
    threads = Threads(1, "after")

    def hang(_):
        started.set()
        free.wait(SECONDS)

    async def ask():
        slot = await WorkQueue(1, 1).slot(0)
        asking = asyncio.ensure_future(work(hang, None, slot, threads))
        await until(started.is_set)
        asking.cancel()

    asyncio.run(ask())
    free.set()
    assert threads.submit(int, "7").result(SECONDS) == 7  # the thread is well
    threads.close()
    assert caplog.records == []  # of the pool, which logs what a callback raises
