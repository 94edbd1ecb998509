"""``python -m deploy.dashboards``: write every dashboard's JSON where the monitoring component takes it from."""

from __future__ import annotations

from deploy.dashboards.generate import DIRECTORY, generated

for name, text in generated().items():
    (DIRECTORY / name).write_text(text)
