"""Lists of records and the hash of instances, against Python's own lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestproc.kernel.lists import GuidHash, ListHead, RecordList, list_head, list_link
from guestproc.kernel.records import Blob, Ram, Record, Table, Word

TABLE_GPA = 0x1000
HEAD_GPA = 0x100
BUCKETS_GPA = 0x200


class Node(Record):
    """A record that may be on a list and in a hash."""

    link = list_link("lock")
    other_link = list_link("lock")
    children = list_head("lock")
    chain = Word(4, "lock")
    guid = Blob(16, "lock")


class World:
    """Eight nodes and a list of them."""

    def __init__(self, nodes: int = 8, buckets: int = 4) -> None:
        self.ram = Ram(bytearray(1 << 14))
        self.table = Table(self.ram, "nodes", Node, TABLE_GPA, nodes)
        self.nodes = [node for node in (self.table.alloc() for _ in range(nodes)) if node is not None]
        self.list = RecordList(ListHead(self.ram, HEAD_GPA, "list"), self.table, "link")
        self.hash = GuidHash(self.ram, BUCKETS_GPA, buckets, self.table, "guid", "chain")


def test_records_come_in_the_order_of_appending() -> None:
    """`list_add_tail`, walked from the head."""
    world = World()
    assert world.list.empty and world.list.first() is None

    for node in world.nodes[:3]:
        world.list.append(node)

    assert list(world.list) == world.nodes[:3]
    assert (len(world.list), world.list.first()) == (3, world.nodes[0])


def test_the_record_just_given_may_be_taken_off() -> None:
    """`list_for_each_entry_safe`: the walk goes on behind it."""
    world = World()
    for node in world.nodes:
        world.list.append(node)

    for node in world.list:
        world.list.remove(node)

    assert world.list.empty


def test_one_record_may_be_on_two_lists_by_two_links() -> None:
    """Each link belongs to one kind of list; the heads may lie in records, too."""
    world = World()
    parent, child = world.nodes[0], world.nodes[1]
    children = RecordList(parent.children, world.table, "other_link")
    world.list.append(child)
    children.append(child)

    world.list.remove(child)

    assert list(children) == [child]
    assert children.contains(child) and not world.list.contains(child)


def test_putting_on_twice_and_taking_off_twice_are_noticed() -> None:
    """A record knows whether it is on a list."""
    world = World()
    world.list.append(world.nodes[0])
    with pytest.raises(AssertionError, match="on a list already"):
        world.list.append(world.nodes[0])

    world.list.remove(world.nodes[0])
    with pytest.raises(AssertionError, match="is not on list"):
        world.list.remove(world.nodes[0])


def test_a_record_freed_while_on_a_list_is_noticed_by_the_walk() -> None:
    """The list still names it, and its generation is gone."""
    world = World()
    world.list.append(world.nodes[0])
    world.table.free(world.nodes[0])

    with pytest.raises(AssertionError, match="stale"):
        list(world.list)
    with pytest.raises(AssertionError, match="stale"):
        world.list.remove(world.nodes[0])


@given(st.lists(st.integers(0, 7), max_size=60))
def test_a_list_matches_a_model(choices: list[int]) -> None:
    """Each choice puts a node on, or takes it off when it is on: the order is that of a Python list."""
    world = World()
    model: list[Node] = []
    for choice in choices:
        node = world.nodes[choice]
        if node in model:
            world.list.remove(node)
            model.remove(node)
        else:
            world.list.append(node)
            model.append(node)
        assert list(world.list) == model
        assert world.list.empty == (not model)


def test_all_records_of_one_guid_are_found() -> None:
    """A primary and its sub-channels have one instance; other GUIDs in the bucket are passed over."""
    world = World(buckets=1)
    for number, node in enumerate(world.nodes):
        node.guid = bytes([number % 3]) * 16
        world.hash.add(node)

    found = list(world.hash.find(bytes([1]) * 16))

    assert {node.index for node in found} == {1, 4, 7}
    assert not list(world.hash.find(bytes([9]) * 16))


@given(st.lists(st.integers(0, 7), max_size=60))
def test_the_hash_matches_a_model(choices: list[int]) -> None:
    """Each choice adds or removes a node; every GUID finds exactly the nodes that are in."""
    world = World()
    for number, node in enumerate(world.nodes):
        node.guid = bytes([number // 2]) + bytes(15)
    inside: set[int] = set()
    for choice in choices:
        if choice in inside:
            world.hash.remove(world.nodes[choice])
        else:
            world.hash.add(world.nodes[choice])
        inside ^= {choice}
        for guid in range(4):
            found = {node.index for node in world.hash.find(bytes([guid]) + bytes(15))}
            assert found == {number for number in inside if number // 2 == guid}


def test_removing_what_is_not_in_the_hash_is_noticed() -> None:
    """The chain of its GUID does not lead to it."""
    world = World()

    with pytest.raises(AssertionError, match="not in the hash"):
        world.hash.remove(world.nodes[0])
