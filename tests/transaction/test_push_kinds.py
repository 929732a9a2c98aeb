"""When a push through ``model.load_weights`` is over, by names alone."""

from reload_plugin.transaction.push_kinds import PushKind, PushKinds

ALL = frozenset("abcd")


def seen(*kinds: str) -> PushKinds:
    known = PushKinds()
    for names in kinds:
        known.learn(PushKind(frozenset(names), whole=names == "abcd"))
    return known


def expected(known: PushKinds, at_start: frozenset[str] = ALL) -> frozenset[str]:
    return known.expected(lambda: at_start)


def test_the_first_push_is_measured_by_the_engines_own_checkpoint() -> None:
    assert expected(seen()) == ALL


def test_without_a_checkpoint_the_first_push_does_not_end_by_its_names() -> None:
    assert expected(seen(), frozenset()) == frozenset()


def test_later_ones_are_measured_by_the_last_push_only() -> None:
    assert expected(seen("abcd"), frozenset("x")) == ALL
    assert expected(seen("abcd", "ab")) == frozenset("ab")
    assert expected(seen("ab", "abcd")) == ALL, "ab may be the beginning of the larger one"


def test_a_part_of_a_larger_push_is_half_of_it_unless_it_came_alone_before() -> None:
    assert seen("abcd").is_half(set("ab"))
    assert not seen("abcd", "ab").is_half(set("ab"))
    assert seen("abcd", "ab").is_half(set("a"))
    assert not seen("ab").is_half(set("abc"))
    assert not seen().is_half(set("a")), "nothing was pushed before: it may be all there is"


def test_what_comes_right_after_a_push_belongs_to_it() -> None:
    known = seen("abcd")
    known.extend_last({"head"})
    assert expected(known) == {*"abcd", "head"}
    assert known.last is not None
    assert known.last.whole


def test_what_is_missing_is_told_by_the_smallest_larger_push() -> None:
    assert seen("abcd", "abc").missing({"a"}) == ["b", "c"]
    assert seen("ab").missing(set("ab")) == []
