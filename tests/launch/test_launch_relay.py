"""What the relay tells the driver of its workers, and the workers of its orders."""

import threading
from unittest.mock import Mock

import pytest
import ray

from bdkd_dist.engine.control import Wish
from bdkd_dist.launch import relay as relay_module
from bdkd_dist.launch import watch
from bdkd_dist.launch.relay import Beat, Relay


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(relay_module, "time", made)
    return made


def beat(rank: int, done: int = 0, group: str = "first") -> Beat:
    return Beat(group, rank, 2, f"node{rank}", f"host{rank}", 100 + rank, done)


def test_a_group_is_complete_when_every_rank_was_heard(clock: Clock) -> None:
    relay = Relay()
    assert not relay.workers().complete
    relay.beat(beat(1))
    assert not relay.workers().complete
    relay.beat(beat(0))
    assert relay.workers().complete
    relay.forget_workers()
    assert not relay.workers().complete


def test_it_is_idle_since_any_rank_has_done_something_more(clock: Clock) -> None:
    relay = Relay()
    relay.beat(beat(0))
    clock.now_s = 5
    relay.beat(beat(1))
    clock.now_s = 7
    relay.beat(beat(0))
    workers = relay.workers()
    assert (workers.idle_s, workers.silent_s, workers.begun) == (2, 0, False)
    relay.beat(beat(0, done=1))
    clock.now_s = 30
    relay.beat(beat(1))
    clock.now_s = 31
    workers = relay.workers()
    assert (workers.idle_s, workers.silent_s, workers.begun) == (24, 1, True)


def test_ranks_of_a_group_that_was_lost_or_followed_by_another_are_told_to_leave(clock: Clock) -> None:
    relay = Relay()
    assert relay.beat(beat(0)) == set()
    assert relay.is_current("first")
    relay.forget_workers()
    assert relay.beat(beat(0)) == {"leave"}
    assert relay.beat(beat(0, group="second")) == set()
    assert relay.beat(beat(1)) == {"leave"}
    assert relay.workers().beats.keys() == {0}
    assert not relay.is_current("first")


def test_every_rank_is_told_an_order_once_and_to_stop_always(clock: Clock) -> None:
    relay = Relay()
    relay.beat(beat(0))
    relay.beat(beat(1))
    relay.order("checkpoint")
    assert relay.beat(beat(1)) == {"checkpoint"}
    assert relay.beat(beat(1)) == set()
    relay.request_stop()
    assert relay.beat(beat(0)) == {"checkpoint", "stop"}
    assert relay.beat(beat(0)) == {"stop"}
    assert relay.beat(beat(0, group="second")) == {"stop"}


def test_an_order_is_awaited_until_rank_0_followed_it_or_is_lost(clock: Clock) -> None:
    relay = Relay()
    relay.order("checkpoint")  # nobody is there
    assert not relay.is_awaited("checkpoint")
    relay.beat(beat(0))
    relay.order("checkpoint")
    assert relay.is_awaited("checkpoint")
    relay.done("checkpoint")
    assert not relay.is_awaited("checkpoint")
    relay.order("checkpoint")
    relay.forget_workers()
    assert not relay.is_awaited("checkpoint")


def test_a_rank_whose_connection_broke_hears_again(monkeypatch: pytest.MonkeyPatch) -> None:
    broke, gone = ray.exceptions.ActorUnavailableError("the connection broke", None), RuntimeError("the driver is gone")
    monkeypatch.setattr(watch, "BEAT_S", 0.01)
    monkeypatch.setattr(watch, "ray", Mock(get=Mock(side_effect=[broke, {"stop"}, gone]), exceptions=ray.exceptions))
    before = set(threading.enumerate())
    control = watch.Watch(Mock(), 0, 1)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert watch.ray.get.call_count == 3
    assert control.wish() == Wish.STOP
