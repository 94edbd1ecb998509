"""Who is in the cluster, as a gateway sees it, and where Prometheus finds everybody's metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.runtime.membership import Kind, Member, Membership


class Members:
    """All processes of the cluster, kept up by watching membership.

    ``tasks`` end only with an error; whoever made this cancels them.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._by_kind: dict[Kind, Mapping[str, Member]] = {kind: {} for kind in get_args(Kind)}
        self.tasks = [asyncio.create_task(self._watch(kind), name=f"members {kind}") for kind in self._by_kind]

    def of(self, kind: Kind) -> Mapping[str, Member]:
        """Those of one kind, by id."""
        return self._by_kind[kind]

    def targets_route(self) -> Route:
        """``GET /metrics/targets``: every member's metrics, for ``http_sd_configs`` of a Prometheus."""

        async def targets(request: Request) -> Response:
            return JSONResponse(
                [
                    {"targets": [member.metrics_address], "labels": {"service": kind, "member": member_id}}
                    for kind, members in self._by_kind.items()
                    for member_id, member in sorted(members.items())
                    if member.metrics_address
                ]
            )

        return Route("/metrics/targets", targets)

    async def _watch(self, kind: Kind) -> None:
        async for members in self._membership.watch(kind):
            self._by_kind[kind] = members
