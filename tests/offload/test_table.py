"""A core of the table of ``python -m tests.dispatched --table``."""

from __future__ import annotations

import pytest

from tests.dispatched_table import COLUMNS, MIXTURE, RIGHT, WRONG, outcomes


@pytest.mark.parametrize(
    ("tied", "situation"),
    [
        (True, "dispatch_model, mixed"),
        (False, "from_pretrained, all index"),
        (True, "cpu_offload, nested hooks"),
    ],
)
def test_ours_is_right_in_every_column(tied: bool, situation: str) -> None:
    found = {column: (own, ours) for column, own, ours in outcomes(tied, situation)}
    assert {column: ours for column, (_, ours) in found.items()} == dict.fromkeys(COLUMNS, RIGHT)
    assert found["edit in place"][0] != RIGHT, "what it is compared with does not have the defect any more"
    assert found["reload"][0] == WRONG
    assert found["missing name"][0] in (MIXTURE, WRONG, RIGHT)
