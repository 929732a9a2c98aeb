"""Every error says all it knows, in a form that survives the way from a worker to the caller."""

import pickle
import re

import pytest

from reload_plugin import errors
from reload_plugin.errors import SHOWN, ReloadError, WeightsError, weights_error

KINDS = ("missing", "unexpected", "duplicate", "misshapen")


def subclasses(cls: type) -> list[type]:
    """A class and all that derive from it in the module of errors."""
    below = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return [cls] + [found for sub in below for found in subclasses(sub)]


ALL = subclasses(ReloadError)


def drawn_tree() -> dict[str, str | None]:
    """Class -> its base, as the module's docstring draws them."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"[ │├└─]*([A-Z]\w+Error)\b", line)
        if found is None:
            continue
        depth, name = found.start(1), found[1]
        path = [entry for entry in path if entry[0] < depth]
        parents[name] = path[-1][1] if path else None
        path.append((depth, name))
    return parents


def test_the_tree_is_as_drawn() -> None:
    real = {cls.__name__: cls.__base__.__name__ if cls is not ReloadError else None for cls in ALL}
    assert drawn_tree() == real


def test_one_except_clause_catches_them_all() -> None:
    assert all(issubclass(cls, ReloadError) for cls in ALL)
    assert issubclass(ReloadError, RuntimeError)


def test_every_error_has_a_docstring() -> None:
    assert all(cls.__doc__ for cls in ALL)


def offenders(count: int, kind: str = "weight") -> dict[str, str]:
    return {f"{kind}.{index:03}": f"reason {index}" for index in range(count)}


def example(cls: type[ReloadError]) -> ReloadError:
    if issubclass(cls, WeightsError):
        return cls("what happened", **{kind: offenders(2, kind) for kind in KINDS})
    return cls("what happened")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", ALL)
def test_every_error_survives_pickling_with_all_it_knows(cls: type[ReloadError], protocol: int) -> None:
    before = example(cls)
    after = pickle.loads(pickle.dumps(before, protocol))
    assert type(after) is cls
    assert str(after) == str(before) == "what happened"
    assert vars(after) == vars(before)


def test_an_error_made_for_many_offenders_survives_pickling() -> None:
    before = weights_error("a source", "So what.", missing=offenders(50), misshapen=offenders(3))
    after = pickle.loads(pickle.dumps(before))
    assert str(after) == str(before)
    assert vars(after) == vars(before)


@pytest.mark.parametrize("kind", KINDS)
def test_offenders_of_one_kind_give_the_precise_class(kind: str) -> None:
    error = weights_error("a source", "So what.", **{other: {} for other in KINDS} | {kind: offenders(1)})
    assert type(error).__name__ == f"{kind.capitalize()}WeightsError"
    assert getattr(error, kind) == offenders(1)
    assert not any(getattr(error, other) for other in KINDS if other != kind)


def test_offenders_of_several_kinds_give_one_error_with_all() -> None:
    found = {kind: offenders(2, kind) for kind in KINDS}
    error = weights_error("a source", "So what.", **found)
    assert type(error) is WeightsError
    assert vars(error) == found | {"nonfinite": {}}
    assert all(f"2 {kind}: " in str(error) for kind in KINDS)
    assert all(name in str(error) for names in found.values() for name in names)


@pytest.mark.parametrize("count", [1, SHOWN, SHOWN + 1, 5000])
def test_the_text_is_capped_and_the_attributes_are_complete(count: int) -> None:
    error = weights_error("a source", "So what.", missing=offenders(count))
    text = str(error)
    assert error.missing == offenders(count)
    assert f"{count} missing: " in text
    assert text.count("reason") == min(count, SHOWN)
    assert (f"and {count - SHOWN} more (see .missing)" in text) == (count > SHOWN)
    assert len(text) < 1000


def test_the_text_begins_with_the_source_and_ends_with_what_is_served() -> None:
    lines = str(weights_error("a source", "So what.", missing=offenders(1))).splitlines()
    assert "a source" in lines[0]
    assert lines[-1] == "So what."


def test_offenders_come_in_order_and_without_empty_reasons() -> None:
    text = str(weights_error("a source", "So what.", missing={"b": "", "a": "why"}))
    assert "a (why), b." in text


def test_an_error_keeps_its_own_copy_of_the_offenders() -> None:
    found = offenders(1)
    error = weights_error("a source", "So what.", missing=found)
    found.clear()
    assert error.missing == offenders(1)
