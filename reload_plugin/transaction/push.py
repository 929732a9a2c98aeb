"""One live push: while it is under way, and after it failed."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from ..errors import SessionError
from .push_intake import PushIntake

SOURCE = "model.load_weights"


class LivePush:
    """One push that is under way.

    Args:
        intake: takes its weights.
        expected: names that end it when all have come; empty if nothing is known.

    """

    gives_way = True
    failed: str | None = None

    def __init__(self, intake: PushIntake, expected: AbstractSet[str]) -> None:
        self.intake = intake
        self.names: set[str] = set()
        """Names of the weights so far."""
        self.repeats = False
        """Whether a name came in more than one call."""
        self._expected = bool(expected)
        self._waiting = set(expected)

    def takes_alone(self, name: str) -> bool:
        """Whether nothing but loading is to be done for this weight: it is new and not the last."""
        waiting = len(self._waiting)
        return name not in self.names and (waiting > 1 or (waiting == 1 and name not in self._waiting))

    def note(self, names: list[str]) -> None:
        """These came in a call."""
        before = len(self.names)
        self.names.update(names)
        self.repeats = self.repeats or len(self.names) < before + len(names)
        self._waiting.difference_update(names)

    @property
    def is_over(self) -> bool:
        """Whether all expected names have come."""
        return self._expected and not self._waiting

    def describe(self) -> str:
        """Source, who opened it, how many weights arrived."""
        return f"{SOURCE}, {self.intake.opened_by}, {len(self.names)} weights so far"

    def abort(self) -> None:
        """Drop what was loaded."""
        self.intake.abort()


class FailedPush:
    """A push of which a call raised: what follows of it is refused until it begins anew.

    A framework may swallow the error and go on with the next weights. Those alone would make a mixture.
    """

    def __init__(self, names: set[str], error: BaseException) -> None:
        self.names = names
        """Names that came until then, and those that were refused since."""
        self.error = error
        self.told_before_forward_pass = False
        """Whether the other ranks, which may have it open still, were told at a forward pass."""

    def refusal(self) -> SessionError:
        """The error for what still comes of it."""
        return SessionError(
            f"An earlier call of this push failed with {type(self.error).__name__}: {self.error}\n"
            "Send all of its weights again, from the first."
        )
