"""All dashboards, as the files that Grafana reads."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards import cluster, data_plane, instance, kv_memory, planner

DIRECTORY = Path(__file__).parents[1] / "k8s" / "components" / "monitoring" / "dashboards"


def generated() -> dict[str, str]:
    """The JSON of every dashboard, by its file's name."""
    pages = [module.page() for module in (cluster, kv_memory, instance, planner, data_plane)]
    return {f"{page.name}.json": json.dumps(page.build(), cls=JSONEncoder, indent=1) + "\n" for page in pages}
