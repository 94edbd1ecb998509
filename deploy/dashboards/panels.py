"""What all dashboards have in common: variables, links between them, and how panels look.

A dashboard is built from rows of panels; 24 columns are a row's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as dashboard_builder
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.builders.stat import Panel as StatPanel
from grafana_foundation_sdk.builders.table import Panel as TablePanel
from grafana_foundation_sdk.builders.timeseries import Panel as GraphPanel
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from services.runtime import metrics
from services.runtime.metric_spec import MetricSpec

TAG = "infinite-llm"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
REFRESH = "15s"
_LETTERS = "ABCDEFGHIJ"
# Grafana's names of units.
Unit = Literal["short", "none", "s", "decbytes", "Bps", "percentunit", "reqps", "cps", "tok/s", "blocks", "tokens"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel.

    Attributes:
        legend: what its series are called; ``{{label}}`` stands for a label's value.
    """

    expr: str
    legend: str


@dataclass(slots=True)
class Page:
    """A dashboard that grows row by row.

    Args:
        name: of its file, and the end of its uid.
        about: what it is for, in a sentence or two.
        variables: beside the data source and the cluster.
    """

    name: str
    title: str
    about: str
    variables: Sequence[dashboard_builder.QueryVariable] = ()
    _builder: dashboard_builder.Dashboard = field(init=False)
    _panels: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._builder = (
            dashboard_builder.Dashboard(f"infinite-llm / {self.title}")
            .uid(f"infinite-llm-{self.name}")
            .description(self.about)
            .tags([TAG])
            .timezone("browser")
            .editable()
            .tooltip(model.DashboardCursorSync.CROSSHAIR)
            .time("now-1h", "now")
            .refresh(REFRESH)
            .link(
                dashboard_builder.DashboardLink("infinite-llm")
                .type(model.DashboardLinkType.DASHBOARDS)
                .tags([TAG])
                .include_vars(True)
                .keep_time(True)
            )
            .with_variable(dashboard_builder.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(choice("cluster", "Cluster", metrics.BUILD_INFO, "cluster").multi(False).all_value(".*"))
        )
        for variable in self.variables:
            self._builder.with_variable(variable)

    def row(self, title: str) -> None:
        self._builder.with_row(dashboard_builder.Row(title).id(self._next_id()))

    def stat(self, title: str, about: str, unit: Unit, query: str, width: int = 4, legend: str = "") -> None:
        """One number, as large as there is room, over its history."""
        panel = (
            StatPanel()
            .unit(unit)
            .color_mode(common.BigValueColorMode.NONE)
            .graph_mode(common.BigValueGraphMode.AREA)
            .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))
        )
        self._add(panel, title, about, [Query(query, legend or title)], width, height=4)

    def graph(
        self,
        title: str,
        about: str,
        unit: Unit,
        *queries: Query,
        width: int = 12,
        stacked: bool = False,
        top: float = 0,
    ) -> None:
        """Lines over time.

        Args:
            stacked: areas on top of each other instead, for parts of a whole.
            top: upper end of the axis; 0 follows the data.
        """
        panel = (
            GraphPanel()
            .unit(unit)
            .min(0)
            .line_width(1)
            .fill_opacity(40 if stacked else 8)
            .show_points(common.VisibilityMode.NEVER)
            .tooltip(
                common_builder.VizTooltipOptions()
                .mode(common.TooltipDisplayMode.MULTI)
                .sort(common.SortOrder.DESCENDING)
            )
            .legend(
                common_builder.VizLegendOptions()
                .display_mode(common.LegendDisplayMode.TABLE)
                .placement(common.LegendPlacement.BOTTOM)
                .show_legend(True)
                .calcs(["mean", "max", "lastNotNull"])
            )
        )
        if stacked:
            panel.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
        if top:
            panel.max(top)
        self._add(panel, title, about, queries, width, height=9)

    def table(self, title: str, about: str, unit: Unit, query: str, hidden: Sequence[str], width: int = 12) -> None:
        """The latest value of each series, its labels as columns.

        Args:
            hidden: columns, labels among them, that say nothing here.
        """
        panel = (
            TablePanel()
            .unit(unit)
            .with_transformation(
                model.DataTransformerConfig(
                    id_val="organize", options={"excludeByName": dict.fromkeys(("Time", "__name__", *hidden), True)}
                )
            )
        )
        self._add(panel, title, about, [Query(query, "")], width, height=9, instant=True)

    def build(self) -> model.Dashboard:
        return self._builder.build()

    def _add(
        self,
        panel: StatPanel | GraphPanel | TablePanel,
        title: str,
        about: str,
        queries: Sequence[Query],
        width: int,
        height: int,
        instant: bool = False,
    ) -> None:
        panel.id(self._next_id()).title(title).description(about).datasource(SOURCE).span(width).height(height)
        for letter, query in zip(_LETTERS, queries, strict=False):
            target = prometheus.Dataquery().expr(query.expr).ref_id(letter).datasource(SOURCE)
            if instant:
                target.instant().format(PromQueryFormat.TABLE)
            else:
                target.range().legend_format(query.legend)
            panel.with_target(target)
        self._builder.with_panel(panel)

    def _next_id(self) -> int:
        self._panels += 1
        return self._panels


def choice(name: str, label: str, spec: MetricSpec, of: str, *matchers: str) -> dashboard_builder.QueryVariable:
    """A choice among the values that a metric's label ``of`` has; all of them at first."""
    chosen = f"{{{','.join(matchers)}}}" if matchers else ""
    return (
        dashboard_builder.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": f"label_values({spec.name}{chosen}, {of})", "refId": f"variable-{name}"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .all_value(".+")
        .multi(True)
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )
