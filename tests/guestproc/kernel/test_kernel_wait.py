"""Completions and wait queues: no wake is lost, none is left behind, and every wait ends."""

from __future__ import annotations

import pytest

from emu.errors import DeadlinePassed, MachineStopping
from guestproc.kernel.actors import Actor
from guestproc.kernel.wait import COMPLETED_FOR_ALL, Completion, WaitQueue, new_waiter, wake_chain
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Crowd, Lone, meddle


def completion(lone: Lone | Crowd, gpa: int = FREE_GPA) -> Completion:
    """The completion at `gpa`."""
    return Completion(lone.ram, gpa, "answer")


def test_what_is_done_already_is_not_waited_for() -> None:
    """A completion remembers: the waiter that comes later passes without sleeping."""
    lone = Lone()
    event = completion(lone)
    event.complete(lone.actor)

    event.wait(lone.actor)

    assert event.done == 0
    assert lone.waiters.in_use == 0


def test_each_complete_lets_one_waiter_through() -> None:
    """The count goes up by one with each, and down by one with each waiter."""
    lone = Lone()
    event = completion(lone)
    event.complete(lone.actor)
    event.complete(lone.actor)

    assert [event.try_wait() for _ in range(3)] == [True, True, False]


def test_complete_all_lets_everybody_through_until_reinit() -> None:
    """Nobody takes the count of `complete_all` down; `reinit_completion` does."""
    lone = Lone()
    event = completion(lone)
    event.complete_all(lone.actor)
    event.complete(lone.actor)

    assert [event.try_wait() for _ in range(3)] == [True] * 3
    assert event.done == COMPLETED_FOR_ALL
    event.reinit()
    assert not event.try_wait()


def test_the_completer_posts_the_waiter() -> None:
    """A waiter that has announced itself is taken out and posted exactly once."""
    lone = Lone()
    event, other = completion(lone), lone.new_actor(2)
    lone.hooks.meanwhile.append(lambda: event.complete(other))

    event.wait(lone.actor)

    assert lone.hooks.woken == [lone.actor.number]
    assert (event.done, event.waiters(lone.waiters)) == (0, [])
    assert lone.waiters.in_use == 0


def test_a_wake_for_no_reason_ends_no_wait() -> None:
    """A token left over from an earlier wait makes the waiter look, and sleep again."""
    lone = Lone()
    event = completion(lone)
    lone.hooks.meanwhile.extend([lambda: None, lambda: None])

    assert not event.wait_timeout(lone.actor, SECOND_NS)


def test_a_wait_ends_at_its_deadline_and_leaves_nothing() -> None:
    """The waiter takes its announcement back: a later complete posts nobody and is remembered."""
    lone = Lone()
    event = completion(lone)
    start = lone.hooks.time_ns

    with pytest.raises(DeadlinePassed, match="answer: no answer within 2 s"):
        event.wait(lone.actor, 2 * SECOND_NS)

    assert lone.hooks.time_ns == start + 2 * SECOND_NS
    assert lone.waiters.in_use == 0
    assert event.complete(lone.actor) == 0
    assert event.done == 1


def test_a_waiter_that_gives_up_leaves_the_others_waiting() -> None:
    """Giving up wakes the rest of the chain, who look, and are still woken by the complete that comes."""
    lone = Lone()
    event, early = completion(lone), lone.new_actor(2)
    later: list[bool] = []

    def early_one_gives_up() -> None:
        assert event.waiters(lone.waiters) == [lone.actor.number]
        later.append(event.wait_timeout(early, SECOND_NS))
        assert lone.hooks.woken == [lone.actor.number]

    lone.hooks.meanwhile.extend([early_one_gives_up])
    # The first waiter sleeps; inside its sleep the second one comes and runs into its deadline.
    assert not event.wait_timeout(lone.actor, 5 * SECOND_NS)

    assert later == [False]
    assert lone.waiters.in_use == 0


def test_the_waiters_are_posted_oldest_first() -> None:
    """As the kernel's queue of waiters."""
    lone = Lone()
    event, other = completion(lone), lone.new_actor(2)

    def second_comes() -> None:
        lone.hooks.meanwhile.append(lambda: event.complete_all(lone.actor))
        event.wait(other)

    lone.hooks.meanwhile.append(second_comes)
    event.wait(lone.actor)

    assert lone.hooks.woken == [lone.actor.number, other.number]


def test_a_waiter_that_comes_during_the_complete_is_woken() -> None:
    """It announced itself after the completer looked: the swap fails, and takes it out the second time."""
    lone = Lone()
    event, theirs, other = completion(lone), completion(lone), lone.new_actor(2)
    meddle(event, "_word", lambda: theirs._announce(new_waiter(other, "answer")))

    assert event.complete(lone.actor) == 1

    assert lone.hooks.woken == [other.number]
    assert event.done == 1


def test_who_was_let_through_under_a_lock_is_woken_behind_it() -> None:
    """Between the two the waiter sleeps on, or gives up: its record is freed by the wake, and nobody is posted."""
    lone = Lone()
    event, patient, hasty = completion(lone), lone.new_actor(2), lone.new_actor(3)
    waiters = [new_waiter(actor, "answer") for actor in (patient, hasty)]
    for waiter in waiters:
        event._announce(waiter)

    chain = event.let_through()
    assert lone.hooks.woken == []
    event.retract(hasty, waiters[1])
    wake_chain(lone.actor, chain)

    assert lone.hooks.woken == [patient.number]
    assert event.done == 1
    event.retract(patient, waiters[0])
    assert lone.waiters.in_use == 0


def test_a_complete_just_before_the_announcement_is_seen() -> None:
    """The waiter looked when the count was 0; announcing itself fails, and it passes without sleeping."""
    lone = Lone()
    event, theirs, other = completion(lone), completion(lone), lone.new_actor(2)
    meddle(event, "_word", lambda: theirs.complete(other))

    assert event.wait_timeout(lone.actor, SECOND_NS)

    assert (lone.hooks.woken, event.done, lone.waiters.in_use) == ([], 0, 0)


def test_one_complete_lets_one_of_two_through() -> None:
    """Both looked when the count was 1; the second swap fails."""
    lone = Lone()
    event, theirs = completion(lone), completion(lone)
    event.complete(lone.actor)
    meddle(event, "_word", lambda: theirs.try_wait())

    assert not event.try_wait()
    assert event.done == 0


def test_a_completion_may_be_freed_as_soon_as_it_is_seen_done() -> None:
    """After its swap the completer touches the object no more: here it is overwritten in the post itself."""
    lone = Lone()
    event, other = completion(lone), lone.new_actor(2)
    poison = bytes([0x6B]) * 8

    def freed_by_the_waiter(actor: int) -> None:
        assert event.done == 1
        lone.ram.octets[FREE_GPA : FREE_GPA + 8] = poison

    completer = Actor(other.number, lone.hooks, lone.waiters)
    completer.wake = freed_by_the_waiter  # type: ignore[misc]

    def complete() -> None:
        assert event.complete(completer) == 1

    lone.hooks.meanwhile.append(complete)
    event.wait(lone.actor)

    assert lone.ram.words32(FREE_GPA, 1)[0] == 0x6B6B6B6B


def test_a_waiter_leaves_when_the_machine_stops() -> None:
    """No wait outlives the machine, and none leaves its announcement."""
    lone = Lone()
    for wait in (
        completion(lone).wait,
        lambda actor: WaitQueue(lone.ram, FREE_GPA + 8, "queue").wait_until(actor, lambda: False),
    ):
        lone.hooks.stop = False
        lone.hooks.meanwhile.append(lambda: setattr(lone.hooks, "stop", True))
        with pytest.raises(MachineStopping):
            wait(lone.actor)
    assert lone.waiters.in_use == 0


def test_nobody_waits_for_more_than_the_pool_has_records() -> None:
    """The waiter records are a bound; the actor that finds none is named."""
    lone = Lone()
    event = completion(lone)
    while lone.waiters.alloc() is not None:
        pass

    with pytest.raises(AssertionError, match="a1 waits for answer: all 64 waiter records are used"):
        event.wait(lone.actor)


def test_a_condition_that_holds_already_is_not_announced() -> None:
    """`wait_event` looks first."""
    lone = Lone()
    queue = WaitQueue(lone.ram, FREE_GPA, "queue")

    queue.wait_until(lone.actor, lambda: True)

    assert lone.ram.u64(FREE_GPA).load() == 0


def test_a_condition_that_comes_true_between_look_and_sleep_is_seen() -> None:
    """The waiter looks again after announcing itself: the change in between needs no post."""
    lone = Lone()
    queue = WaitQueue(lone.ram, FREE_GPA, "queue")
    looks: list[bool] = []

    def condition() -> bool:
        looks.append(queue.announced())
        return len(looks) == 2

    queue.wait_until(lone.actor, condition)

    assert looks == [False, True]
    assert lone.waiters.in_use == 0 and not queue.announced()


def test_waking_makes_the_waiters_look_again() -> None:
    """`wake_all` posts everybody; who finds the condition false sleeps on."""
    lone = Lone()
    queue, other = WaitQueue(lone.ram, FREE_GPA, "queue"), lone.new_actor(2)
    ready: list[int] = []

    def change_and_wake() -> None:
        ready.append(1)
        assert queue.wake_all(other) == 1

    lone.hooks.meanwhile.extend([lambda: queue.wake_all(other), change_and_wake])
    queue.wait_until(lone.actor, lambda: bool(ready))

    assert lone.hooks.woken == [lone.actor.number] * 2
    assert lone.waiters.in_use == 0


def test_waking_nobody_is_cheap_and_harmless() -> None:
    """With no chain there is nothing to take out."""
    lone = Lone()

    assert WaitQueue(lone.ram, FREE_GPA, "queue").wake_all(lone.actor) == 0


def ping_pong(rounds: int) -> None:
    """Two processes complete and wait in turn; a wake that is lost runs into the deadline."""
    crowd = Crowd(2)
    there, back = completion(crowd), completion(crowd, FREE_GPA + 64)

    def ping(actor: Actor) -> None:
        for _ in range(rounds):
            there.complete(actor)
            back.wait(actor, 20 * SECOND_NS)

    def pong(actor: Actor) -> None:
        for _ in range(rounds):
            there.wait(actor, 20 * SECOND_NS)
            back.complete(actor)

    crowd.run(ping, pong)
    assert (there.done, back.done, crowd.waiters.in_use) == (0, 0, 0)


def test_no_wake_between_two_processes_is_lost() -> None:
    """Every complete is met by a wait, whichever comes first."""
    ping_pong(1_000)


@pytest.mark.soak
def test_no_wake_between_two_processes_is_lost_for_long() -> None:
    """The same, long enough for the rare orders."""
    ping_pong(50_000)


def share(rounds: int) -> None:
    """Two processes wait on one completion with time-outs that often pass, a third completes it."""
    crowd = Crowd(3)
    event = completion(crowd)
    passed = crowd.ram.u64(FREE_GPA + 64)

    def waiter(actor: Actor) -> None:
        while passed.load() < rounds:
            if event.wait_timeout(actor, 200_000 * (1 + actor.number % 2 * 20)):
                passed.fetch_add(1)

    def completer(actor: Actor) -> None:
        for sent in range(rounds):
            event.complete(actor)
            while passed.load() + 4 < sent:
                actor.yield_processor()

    crowd.run(waiter, waiter, completer)
    assert passed.load() == rounds
    assert (event.done, crowd.waiters.in_use) == (0, 0)


def test_as_many_pass_as_were_let_through() -> None:
    """With several waiters that give up and come back, no complete is lost or used twice."""
    share(400)


@pytest.mark.soak
def test_as_many_pass_as_were_let_through_for_long() -> None:
    """The same, long enough for the rare orders."""
    share(20_000)


def test_a_condition_changed_by_another_process_is_seen() -> None:
    """Store, fence, look for waiters against announce, fence, look: one of the two sees the other."""
    crowd = Crowd(2)
    turn = crowd.ram.u32(FREE_GPA)
    queue = WaitQueue(crowd.ram, FREE_GPA + 64, "turns")
    rounds = 300

    def part(actor: Actor) -> None:
        mine = actor.number & 1
        for number in range(mine, 2 * rounds, 2):

            def my_turn(number: int = number) -> bool:
                return turn.load() == number

            queue.wait_until(actor, my_turn, 20 * SECOND_NS)
            turn.store(number + 1)
            queue.wake_all(actor)

    crowd.run(part, part)
    assert turn.load() == 2 * rounds
    assert crowd.waiters.in_use == 0
