"""A reload that fails, anywhere, leaves the engine it found: `tests.faults` in three real engines."""

from collections.abc import Iterator

import pytest

from tests import faults
from tests.faults import ENGINES, KINDS, Kind, Lab
from tests.processor import packs_bf16
from tests.zoo import case_named

MOST = 13
"""Places of each kind; `python -m tests.faults` tries all of them."""
GROWTH = 64 << 20
"""Bytes that a process may have grown by after some thousand failed reloads of models of 1 MB."""


@pytest.fixture(scope="module", params=ENGINES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with faults.lab_of(case_named(request.param), tmp_path_factory.mktemp("faults"), MOST) as lab:
        yield lab


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_engine_survives_at_every_place(lab: Lab, kind: Kind) -> None:
    """Value, object and address of every tensor, answers, files and threads; then a good reload is right."""
    result = lab.try_kind(kind)
    if not result.tried and "block k of the pool" in kind.name and not packs_bf16():
        pytest.skip("nothing of this model needs staging on this processor")
    assert result.tried > 0
    assert result.survived == result.tried, "\n".join(result.reasons[:5])
    lab.assert_good_reloads()


def test_a_spread_has_both_ends() -> None:
    """Where there are more places than are tried."""
    assert faults.spread(list(range(50)), 12)[::11] == [0, 49]
    assert len(set(faults.spread(list(range(50)), 12))) == 12
    assert faults.spread([1, 2], 12) == [1, 2]


def test_nothing_is_kept_of_reloads_that_failed(lab: Lab) -> None:
    """No session is alive, and the process is not larger than after the first good reloads."""
    assert faults.left_behind(lab.belongings) == ""
    assert faults.sessions_alive() == 0
    grown = faults.settled() - lab.resident
    assert grown < GROWTH, f"grown by {grown >> 20} MiB in {lab.trials} reloads"
