"""vLLM's front end of several replicas (``data_parallel_size``): calls of this package reach all of them, all
of them answer, and a reload is committed by all of them or by none.

vLLM sends every call to every replica and returns the first one's answer. Replicas of a model without experts
know nothing of each other: each would decide for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..errors import ReloadError
from ..ranks.joint import JointReload
from ..ranks.votes import NOT_EVERY_RANK, vote_timeout

RELOAD = "reload_weights"
OF_ALL = frozenset({"reload_status", "verify_checkpoint", "abort_weight_update"})
"""Calls whose answers are put one after the other."""
OF_FIRST = frozenset({"export_checkpoint"})
"""Calls that one replica answers for all: they serve the same, and would write the same files."""


def reaching_all_replicas(original: Callable[..., Any]) -> Callable[..., Any]:
    """The client's ``collective_rpc_async``; calls that are not of this package stay vLLM's."""

    async def collective_rpc_async(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        one = _Replicas(self, method, timeout, args)
        if method in OF_FIRST:
            return await one.call(0, kwargs)
        if method in OF_ALL:
            answers = await asyncio.gather(*(one.call(i, kwargs) for i in range(one.count)))
            return [answer for of_one in answers for answer in of_one]
        if method == RELOAD and "together" not in (kwargs or {}):
            # Shielded: if the caller goes away, the replicas still need the store in which they vote.
            return await asyncio.shield(asyncio.ensure_future(one.reload(kwargs or {})))
        return await original(self, method, timeout, args, kwargs)

    return collective_rpc_async


class _Replicas:
    """One call to the replicas of a client."""

    def __init__(self, client: Any, method: Any, timeout: float | None, args: tuple[Any, ...]) -> None:
        self._client = client
        self._call = (method, timeout, args)
        self.count = len(client.core_engines)

    async def call(self, replica: int, kwargs: dict[str, Any] | None) -> list[Any]:
        """The answers of the ranks of one replica."""
        engine = self._client.core_engines[replica]
        call = (*self._call, kwargs)
        found: list[Any] = await self._client._call_utility_async("collective_rpc", *call, engine=engine)
        return found

    async def reload(self, kwargs: dict[str, Any]) -> list[Any]:
        """Reload all replicas, or none.

        Raises:
            ReloadError: names the replicas that failed; all serve what they served before.

        """
        parallel = self._client.vllm_config.parallel_config
        names = [f"replica {number}" for number in self._client.engine_ranks_managed]
        joint = JointReload(dict.fromkeys(names, parallel.world_size), vote_timeout())
        # The replicas number themselves, from the first of this client's.
        option = joint.option(
            names[0], parallel.data_parallel_master_ip, self._client.engine_ranks_managed[0]
        )
        asked = kwargs | {"together": option}

        async def one(replica: int) -> list[Any]:
            try:
                return await self.call(replica, asked)
            except BaseException as error:
                joint.refuse(names[replica], error)
                raise

        found = await asyncio.gather(*(one(i) for i in range(self.count)), return_exceptions=True)
        failed = {name: x for name, x in zip(names, found, strict=True) if isinstance(x, BaseException)}
        if failed:
            raise _failure(failed)
        return [answer for of_one in found if isinstance(of_one, list) for answer in of_one]


def _failure(failed: dict[str, BaseException]) -> BaseException:
    for error in failed.values():
        if not isinstance(error, Exception):
            return error
    causes = {name: error for name, error in failed.items() if NOT_EVERY_RANK not in str(error)} or failed
    return ReloadError("\n".join(f"{name}: {error}" for name, error in causes.items()))
