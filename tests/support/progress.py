"""What is told of a measurement's progress."""

from __future__ import annotations


def check_progress(seen: list[tuple[float, int, float | None]], total: int) -> None:
    """It goes forward within the first batch, ends with all, and has no result before a batch is done."""
    done = [done for done, _, _ in seen]
    assert 0 < done[0] < total and done == sorted(set(done)) and done[-1] == total
    assert {of for _, of, _ in seen} == {total}
    without = [value is None for _, _, value in seen]
    assert without[0] and not without[-1] and without == sorted(without, reverse=True)
