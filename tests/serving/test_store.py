"""Stored responses are found by their id until newer ones need the room."""

from __future__ import annotations

from mlx_optiq_ext.serving._store import ResponseStore, Stored


def make(number: int, size: int = 0) -> Stored:
    item = {"id": f"msg_{number}", "text": "x" * size}
    return Stored({"id": f"resp_{number}", "output": [item]}, [])


def test_what_is_kept_is_a_copy() -> None:
    store = ResponseStore()
    stored = make(1)
    store.add(stored)
    stored.response["output"].clear()
    found = store.get("resp_1")
    assert found is not None
    assert found.history == [{"id": "msg_1", "text": ""}]
    found.response["output"].clear()
    assert store.get("resp_1") == make(1)


def test_what_was_not_used_for_longest_goes_first() -> None:
    store = ResponseStore(max_bytes=3500)
    for number in (1, 2, 3):
        store.add(make(number, 1000))
    assert store.get("resp_1") is not None
    store.add(make(4, 1000))
    assert store.get("resp_2") is None
    assert store.get("resp_1") is not None
    assert store.num_bytes <= 3500


def test_what_is_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(max_bytes=500)
    store.add(make(1, 1000))
    assert len(store) == 0
    assert store.num_bytes == 0


def test_what_is_old_goes() -> None:
    now = [0.0]
    store = ResponseStore(max_age=10.0, clock=lambda: now[0])
    store.add(make(1))
    now[0] = 9.0
    store.add(make(2))
    assert store.get("resp_1") is not None
    now[0] = 11.0
    assert store.get("resp_1") is None
    assert store.get("resp_2") is not None
    assert len(store) == 1


def test_what_is_removed_is_gone() -> None:
    store = ResponseStore()
    store.add(make(1))
    assert store.remove("resp_1")
    assert not store.remove("resp_1")
    assert store.get("resp_1") is None
    assert store.num_bytes == 0


def test_an_item_is_found_by_its_id() -> None:
    store = ResponseStore()
    store.add(make(1))
    assert store.find_item("msg_1") == {"id": "msg_1", "text": ""}
    assert store.find_item("msg_2") is None
    assert store.find_item("resp_1") is None


def test_an_item_is_found_as_long_as_any_response_holds_it() -> None:
    store = ResponseStore(max_bytes=3500)
    first = make(1, 1000)
    store.add(first)
    item = first.response["output"][0]
    store.add(Stored({"id": "resp_2", "output": []}, [item, {"id": 7}, {"id": None}]))
    assert store.remove("resp_1")
    assert store.find_item("msg_1") == item
    store.add(make(3, 1000))
    store.add(make(4, 1000))
    store.add(make(5, 1000))
    assert store.get("resp_2") is None
    assert store.find_item("msg_1") is None


class Unread(str):
    """Text that nobody may search."""

    def __contains__(self, part: str) -> bool:
        raise AssertionError("it was searched")


def test_a_full_store_finds_an_item_without_reading_the_others() -> None:
    store = ResponseStore()
    for number in range(200):
        store.add(make(number, 1000))
    for name, entry in list(store._entries.items()):
        if name != "resp_7":
            store._entries[name] = entry._replace(text=Unread(entry.text))
    assert store.find_item("msg_7") is not None
    assert store.find_item("msg_none") is None
