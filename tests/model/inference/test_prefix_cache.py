from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from timeviper_model.config import PRESETS, parse_transv_plan
from timeviper_model.inference.memory import prefix_entry_bytes
from timeviper_model.inference.prefill import PrefixEntry
from timeviper_model.inference.prefix_cache import PrefixCache
from timeviper_model.layers.cache import SavedSlot


def entry(num_bytes: int) -> PrefixEntry:
    keys = torch.zeros(1, num_bytes, 1, dtype=torch.int8)
    return PrefixEntry(
        num_tokens=1, slot=SavedSlot(mamba={}, attention={0: (keys, keys[:, :0])}), sources={}, waiting=None
    )


def put(cache: PrefixCache, key: str, num_bytes: int) -> None:
    lease = cache.lease(key)
    lease.publish(entry(num_bytes))
    lease.release()


def holds(cache: PrefixCache, key: str) -> bool:
    lease = cache.lease(key)
    lease.release()
    return lease.entry is not None


def test_the_least_recently_used_entry_is_evicted() -> None:
    cache = PrefixCache(100)
    for key in "abc":
        put(cache, key, 30)
    assert holds(cache, "a")
    put(cache, "d", 60)
    assert (len(cache), cache.num_bytes, cache.num_evictions) == (2, 90, 2)
    assert [holds(cache, key) for key in "abcd"] == [True, False, False, True]
    assert (cache.num_hits, cache.num_misses) == (3, 6)


def test_an_entry_in_use_stays_and_one_that_does_not_fit_is_not_stored() -> None:
    cache = PrefixCache(100)
    put(cache, "a", 60)
    using = cache.lease("a")
    put(cache, "b", 30)
    put(cache, "c", 50)
    assert (len(cache), cache.num_bytes, cache.num_evictions) == (2, 90, 0)
    using.release()
    using.release()  # twice is once
    put(cache, "c", 50)
    assert [holds(cache, key) for key in "abc"] == [False, True, True]


def test_one_request_computes_while_others_wait_and_another_takes_over() -> None:
    cache = PrefixCache(100)
    first = cache.lease("a")
    assert cache.is_computing("a")
    with pytest.raises(RuntimeError, match="another request is computing"):
        cache.lease("a")
    first.release()
    assert not cache.is_computing("a")
    second = cache.lease("a")
    assert second.entry is None
    first.release()  # a late end of the first takes nothing from the second
    assert cache.is_computing("a")
    second.publish(entry(10))
    assert not cache.is_computing("a")
    assert holds(cache, "a")


def test_evicted_entries_come_back_from_host_memory() -> None:
    """Before, the video was read again."""
    cache = PrefixCache(100, max_host_bytes=120)
    for key in "abcd":
        put(cache, key, 50)
    assert (len(cache), cache.num_bytes, cache.num_host_entries, cache.num_host_bytes) == (2, 100, 2, 100)
    assert cache.shared_bytes("a") == 0  # it has nothing but a slot
    assert holds(cache, "a")  # c, the oldest on the device, makes room
    assert (len(cache), cache.num_bytes, cache.num_host_entries, cache.num_host_bytes) == (2, 100, 2, 100)
    assert (cache.num_hits, cache.num_host_hits) == (1, 1)
    assert cache.drop_idle() == 2  # a and d push out b and c
    assert (len(cache), cache.num_host_bytes) == (0, 100)
    assert [holds(cache, key) for key in "bcad"] == [False, False, True, True]
    put(small := PrefixCache(100, max_host_bytes=40), "large", 50)
    assert (small.drop_idle(), small.num_host_entries) == (1, 0)


def test_an_entry_in_host_memory_serves_a_request_while_others_leave_it_no_room() -> None:
    cache = PrefixCache(100, max_host_bytes=100)
    put(cache, "a", 60)
    put(cache, "b", 60)
    using = cache.lease("b")
    guest = cache.lease("a")
    assert guest.entry is not None
    assert (len(cache), cache.num_host_entries, cache.num_evictions) == (1, 1, 1)
    guest.release()
    using.release()
    assert holds(cache, "a")
    assert cache.num_host_hits == 2


@pytest.mark.parametrize(
    ("plan", "gigabytes"),
    [
        (
            "uni_7_0.5-attn_39_0.9",
            0.98 + 0.33 + 0.72 + 0.10 + 0.49,
        ),  # KV of 3 blocks, transfer, hidden, SSM of 19, site
        ("uni_7_0.5", 1.31 + 0.33 + 0.14),  # KV of 4 blocks, transfer, SSM of 27
        ("", 2.62 + 0.14),
        ("attn_14_0.5", 1.43 + 0.33 + 0.66 + 0.04),  # hidden, score keys, transfer, SSM of 8
    ],
)
def test_bytes_of_the_9b_at_ten_thousand_frames(plan: str, gigabytes: float) -> None:
    config = replace(PRESETS["9b"], transv=parse_transv_plan(plan))
    needed = prefix_entry_bytes(config, 8, 160_000, dtype=torch.bfloat16)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.01)
