"""The prefix tree: keys, and who is evicted first; against a plain model of it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_server.engine.radix import PRIORITY_S, PrefixTree, block_key, root_key


def insert(tree: PrefixTree, path: str, now: float, tenant: str = "t", priority: float = 0) -> None:
    """Add the block "ab" below "a"; keys are the paths themselves."""
    parent = path[:-1].encode() or None
    tree.insert(path.encode(), parent, path, tenant=tenant, now=now, priority=priority)


def evicted(tree: PrefixTree, **which: object) -> list[str]:
    found = []
    while node := tree.evict(**which):  # type: ignore[arg-type]
        found.append(str(node.payload))
    return found


def test_keys_are_stable_and_depend_on_all_that_came_before() -> None:
    root = root_key(b"model", "alice")
    assert root.hex() == "0548ab0dcaddfcb44302a06031d5b564"
    first = block_key(root, range(16))
    assert first.hex() == "cd179695ee3af118f8e3d60e38c9ca42"
    others = {
        root_key(b"model", "bob"),
        root_key(b"other", "alice"),
        block_key(root_key(b"model", "bob"), range(16)),
        block_key(first, range(16)),
        block_key(root, range(1, 17)),
    }
    assert len(others | {root, first}) == 7


def test_leaves_go_first_and_of_them_the_one_unused_longest() -> None:
    tree = PrefixTree()
    for now, path in enumerate(["a", "ab", "abc", "abd", "x"]):
        insert(tree, path, now)
    assert tree.find(b"abc", 10)
    assert evicted(tree) == ["abd", "x", "abc", "ab", "a"]
    assert len(tree) == 0


def test_a_parent_is_as_fresh_as_its_last_child_was() -> None:
    tree = PrefixTree()
    insert(tree, "a", 0)
    insert(tree, "b", 5)
    insert(tree, "ab", 6)
    assert evicted(tree) == ["b", "ab", "a"]


def test_priority_is_soft() -> None:
    tree = PrefixTree()
    insert(tree, "a", 0, priority=1)
    insert(tree, "b", PRIORITY_S - 1)
    insert(tree, "c", PRIORITY_S + 1)
    assert evicted(tree) == ["b", "a", "c"]


def test_of_one_tenant_only_and_before_a_moment_only() -> None:
    tree = PrefixTree()
    insert(tree, "a", 1, tenant="alice")
    insert(tree, "b", 2, tenant="bob")
    insert(tree, "c", 3, tenant="bob")
    assert (tree.count("alice"), tree.count("bob"), tree.count("carol")) == (1, 2, 0)
    assert evicted(tree, tenant="carol") == []
    assert evicted(tree, tenant="bob", before=3) == ["b"]
    assert evicted(tree, before=1) == []
    assert evicted(tree) == ["a", "c"]
    assert tree.count("bob") == 0


def test_a_block_without_its_parent_or_twice_is_refused() -> None:
    tree = PrefixTree()
    insert(tree, "a", 0)
    with pytest.raises(KeyError):
        insert(tree, "a", 0)
    with pytest.raises(KeyError):
        insert(tree, "xy", 0)
    assert len(tree) == 1


@given(st.integers(0, 10_000))
def test_against_a_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    tree = PrefixTree()
    used: dict[str, float] = {}
    for now in range(60):
        action = rng.random()
        path = rng.choice([*used, ""]) + rng.choice("abc")
        if action < 0.5:
            if path not in used:
                insert(tree, path, now)
                used[path] = now
        elif action < 0.7:
            node = tree.find(path.encode(), now)
            assert (node is not None) == (path in used)
            if path in used:
                used[path] = now
        else:
            leaves = [p for p in used if not any(q != p and q.startswith(p) for q in used)]
            gone = tree.evict()
            if not leaves:
                assert gone is None
                continue
            assert gone
            name = str(gone.payload)
            assert name in leaves
            assert used[name] == min(used[leaf] for leaf in leaves)
            stamp = used.pop(name)
            if name[:-1]:
                used[name[:-1]] = max(used[name[:-1]], stamp)
        assert len(tree) == len(used) == tree.count("t")
        assert all(p.encode() in tree for p in used)
