"""The ranks of one restore: each step ends well on all of them, or the model of none is changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ...errors import RanksDisagreeError, ReloadError, SourceError
from ...interrupts import held, let_through
from ...ranks.votes import Vote, vote_among
from .layout import UNTOUCHED

MIXED = "The model holds a mixture of old and new weights: restore it again before it is used."

Found = TypeVar("Found")


class Coordinator:
    """Runs a step on this rank and waits for the others; no collective is entered.

    Args:
        group: process group; None for all processes, or for the only one.
        timeout: seconds that a rank waits for the others.

    """

    def __init__(self, group: Any, timeout: float) -> None:
        import torch.distributed as dist

        self.rank = 0
        self._votes: Iterator[Vote | None] = itertools.repeat(None)
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            vote = vote_among("restore", ranks, self.rank)
            vote.vote_timeout = timeout
            self._votes = iter([vote, vote.following()])

    def agree(self, prepare: Callable[[], Found]) -> Found:
        """Run a step that changes nothing.

        Raises:
            RanksDisagreeError: it failed on another rank.

        """
        vote = next(self._votes)
        with held():
            found = _prepared(vote, prepare)
            _decide(vote)
        if vote is not None and vote.postponed is not None:
            raise vote.postponed
        return found

    def commit(self, prepare: Callable[[], int], commit: Callable[[], None]) -> tuple[int, ...]:
        """Run a step that changes nothing, and ``commit`` once it has ended well on all ranks.

        Ctrl-C is raised before the one or after the other, never between the decision and its end.

        Args:
            prepare: gives a number that all ranks are told.
            commit: can fail only for reasons that nobody foresees; then this rank holds a mixture.

        Returns:
            The number of every rank.

        Raises:
            RanksDisagreeError: ``prepare`` failed on another rank.

        """
        vote = next(self._votes)
        with held():
            number = _prepared(vote, prepare)
            if vote is not None:
                vote.note(str(number))
            _decide(vote)
            try:
                commit()
            except Exception as error:
                raise ReloadError(f"Committing failed with {_brief(error)}. {MIXED}") from error
            numbers = (number,) if vote is None else tuple(map(int, vote.notes()))
        if vote is not None and vote.postponed is not None:
            raise vote.postponed
        return numbers


def _prepared(vote: Vote | None, prepare: Callable[[], Found]) -> Found:
    """What a step gives; if it fails or is interrupted, the other ranks are told."""
    try:
        try:
            with let_through():
                return prepare()
        except SourceError as error:
            if UNTOUCHED in str(error):
                raise
            raise SourceError(f"{error} {UNTOUCHED}") from error.__cause__
        except ReloadError:
            raise
        except Exception as error:
            raise ReloadError(f"Restoring failed with {_brief(error)}. {UNTOUCHED}") from error
    except BaseException as error:
        if vote is not None:
            vote(error)
        raise


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _decide(vote: Vote | None) -> None:
    """Be ready, and wait for the others."""
    if vote is None:
        return
    try:
        vote(None)
    except RanksDisagreeError as error:
        summary = f"Not every rank can restore this checkpoint, so none does. {UNTOUCHED}"
        reasons = [f"rank {rank}: {reason}" for rank, reason in sorted(error.reasons.items())]
        raise RanksDisagreeError("\n  ".join([summary, *reasons]), error.reasons) from None
