"""Grafana dashboards as code: ``python -m deploy.dashboards`` writes the JSON that the monitoring component deploys."""
