"""Whose turn it is to add to dq, against a walk that counts."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from ring_core.key_tiles import ITEM, WALK, make_schedule
from ring_core.segment import Table
from ring_core.testing.direct import backward_plans, causal_keys, key_batches, random_keys
from ring_cute.hopper.backward_order import turns_of

TABLES = {
    "causal": causal_keys(700, 700, causal=True),
    "offset": causal_keys(333, 300, causal=True, offset=-33),
    "own batch entries": key_batches(64).tables[0],
    **{f"random {seed}": random_keys(seed, 64).tables[0] for seed in range(8)},
    **{case.name: case.tables[0] for case in backward_plans(64)},
}


@pytest.mark.parametrize(("block", "tile_keys"), [(64, 128), (96, 128), (64, 64)])
@pytest.mark.parametrize("name", TABLES)
def test_turns_count_the_blocks_before(name: str, block: int, tile_keys: int) -> None:
    table: Table = TABLES[name]
    schedule = make_schedule(table, tile_keys=tile_keys, block=block)
    given = schedule.items if schedule.every_batch else schedule.for_batch(3)
    items, turns = turns_of(given, schedule.walk, block)
    np.testing.assert_array_equal(np.delete(items, 1, axis=1), np.delete(given, 1, axis=1))
    added: dict[tuple[int, int], int] = defaultdict(int)
    for values in items.tolist():
        item = dict(zip(ITEM, values, strict=True))
        w, b = item["walk_start"], -1
        for n in range(item["blocks"]):
            row = dict(zip(WALK, schedule.walk[w].tolist(), strict=True))
            b = row["blocks"] - 1 if b < 0 else b
            i = row["i_lo"] + b * block
            rows = range(row["q_start"] + i, row["q_start"] + min(i + block, row["q_len"]))
            touched = sorted({r // block for r in rows})
            own = turns[values[1] + n].tolist()
            assert own[: len(touched)] == [added[item["batch"], stretch] for stretch in touched]
            assert own[len(touched) :] == [-1] * (2 - len(touched))
            assert touched[0] == (row["q_start"] + i) // block, "where the kernel looks"
            for stretch in touched:
                added[item["batch"], stretch] += 1
            b -= 1
            if b < 0:
                w = row["next"]
