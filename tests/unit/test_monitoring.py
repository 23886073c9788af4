"""The dashboard asks for metrics that exist, and Prometheus finds the engines that are rendered."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
VLLM_LABELS = {"model_name", "engine"}  # of each of its series
SCRAPED = {"job", "instance", "le"}  # which Prometheus adds, and histograms have

promql = pytest.importorskip("promql_parser")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded = json.loads((DEPLOY / "grafana" / "mixquant.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """The labels of every time series that mixquant and vLLM export, by name."""
    return {**of_mixquant(), **of_vllm()}


def of_mixquant() -> dict[str, set[str]]:
    """From the objects that export them."""
    pytest.importorskip("starlette")
    from mixquant.engines.vllm import counters
    from mixquant.serve import attempts, front

    families = counters._Collector().collect()
    found = {f"{family.name}_total": set(family._labelnames) for family in families}
    for counter in (front.REQUESTS, attempts.ROUTED):
        found[f"{counter._name}_total"] = set(counter._labelnames)
    return found


def of_vllm() -> dict[str, set[str]]:
    """From its sources, which give each metric a name, a kind and labels."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    root = Path(spec.origin).parent
    files = [root / "v1" / "metrics" / "loggers.py", *root.rglob("nixl/stats.py")]
    found: dict[str, set[str]] = {}
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(f.read_text())) for f in files):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        given = {one.arg: one.value for one in node.keywords}
        if not isinstance(name := given.get("name"), ast.Constant):
            continue
        more = {
            one.value
            for one in ast.walk(given.get("labelnames", ast.List([])))
            if isinstance(one, ast.Constant) and isinstance(one.value, str)
        }
        suffixes = {
            "_gauge_cls": [""],
            "_counter_cls": ["_total"],
            "_histogram_cls": ["_bucket", "_sum", "_count"],
        }
        for suffix in suffixes.get(node.func.attr, []):
            found[f"{name.value!s}{suffix}"] = VLLM_LABELS | more
    return found


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """As Grafana sends them: with its variables replaced."""
    return [
        target["expr"].replace("$__rate_interval", "5m").replace("$job", ".*")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def nodes(parsed: Any) -> list[Any]:
    """A parsed expression and all of its parts."""
    found: list[Any] = []
    promql.walk(parsed, found.append)
    return found


def problems(text: str, series: dict[str, set[str]]) -> list[str]:
    """What of an expression names no series, or no label of its series."""
    try:
        parsed = promql.parse(text)
    except ValueError as error:
        return [str(error)]
    found = []
    parts = nodes(parsed)
    selected = [one for one in parts if isinstance(one, promql.VectorSelector)]
    rated = {
        one.args[0].vector_selector.name
        for one in parts
        if isinstance(one, promql.Call) and one.func.name == "rate"
    }
    for one in selected:
        known = series.get(one.name)
        if known is None:
            found.append(f"no metric {one.name}")
            continue
        asked = {matcher.name for matcher in one.matchers.matchers}
        found += [f"{one.name} has no label {label}" for label in asked - known - SCRAPED]
        counts = one.name.endswith(("_total", "_bucket", "_sum", "_count"))
        if counts != (one.name in rated):
            found.append(f"{one.name} {'without a' if counts else 'is no counter, but has a'} rate")
    labels = set().union(SCRAPED, *(series.get(one.name, set()) for one in selected))
    for one in parts:
        if isinstance(one, promql.AggregateExpr) and one.modifier is not None:
            by = set(one.modifier.labels)
            found += [f"no series has the label {label}" for label in by - labels]
    return found


def test_vllms_metrics_are_found_in_its_sources() -> None:
    found = of_vllm()
    assert len(found) > 50
    assert found["vllm:kv_cache_usage_perc"] == VLLM_LABELS
    assert "vllm:prompt_tokens_total" in found and "vllm:prompt_tokens" not in found
    assert "vllm:nixl_xfer_time_seconds_bucket" in found
    assert found["vllm:request_success_total"] == VLLM_LABELS | {"finished_reason"}


def test_every_expression_names_metrics_that_exist(
    dashboard: dict[str, Any], series: dict[str, set[str]]
) -> None:
    texts = expressions(dashboard)
    assert len(texts) > 15
    assert {text: found for text in texts if (found := problems(text, series))} == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rate(mixquant_row_total[5m])", "no metric mixquant_row_total"),
        ('rate(mixquant_rows_total{phse="prefill"}[5m])', "mixquant_rows_total has no label phse"),
        ("sum by (phase) (rate(mixquant_passes_total[5m]))", "no series has the label phase"),
        ("sum(mixquant_rows_total)", "mixquant_rows_total without a rate"),
        ("rate(vllm:kv_cache_usage_perc[5m])", "is no counter, but has a rate"),
        ("rate(mixquant_rows_total[5m]", "unclosed"),
        ("sum(rate(mixquant_rows_total[5m])) / sum(rate(a_total[5m]))", "no metric a_total"),
        ("histogram_quantile(0.5, sum by (le) (rate(a_bucket[5m])))", "no metric a_bucket"),
    ],
)
def test_a_wrong_expression_is_found(series: dict[str, set[str]], text: str, problem: str) -> None:
    """Or the test above would hold for anything."""
    assert any(problem in one for one in problems(text, series)), problems(text, series)


def test_label_values_are_those_that_the_code_counts(dashboard: dict[str, Any]) -> None:
    from mixquant.engines.vllm.counters import PASSES, ROWS

    known = {
        "phase": {phase for phase, _ in ROWS},
        "precision": {precision for _, precision in ROWS},
        "kind": set(PASSES),
    }
    asked = re.findall(r'(phase|precision|kind)="([^"]*)"', " ".join(expressions(dashboard)))
    assert asked
    for label, value in asked:
        assert value in known[label]


def test_every_metric_of_mixquant_is_shown(dashboard: dict[str, Any]) -> None:
    texts = " ".join(expressions(dashboard))
    assert [name for name in of_mixquant() if name not in texts] == []


def test_the_jobs_to_choose_from_are_those_of_metrics_that_exist(
    dashboard: dict[str, Any],
) -> None:
    (variable,) = (one for one in dashboard["templating"]["list"] if one["name"] == "job")
    query = variable["query"]["query"]
    assert query == variable["definition"]
    names = re.fullmatch(r'label_values\(\{__name__=~"(.*)"\}, job\)', query)
    assert names is not None
    assert set(names[1].split("|")) <= set(of_mixquant())


def test_panels_are_said_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
        for target in panel["targets"]:
            assert 'job=~"$job"' in target["expr"]
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$__rate_interval" in target["expr"] or "rate(" not in target["expr"]


# --- Kubernetes --------------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


def rendered(**values: Any) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    from mixquant.serve import render_kubernetes
    from mixquant.serve.description import Deployment

    deployment = Deployment.from_values({"model": "Qwen/Qwen3-8B", **values})
    return list(yaml.safe_load_all(render_kubernetes.render(deployment, "registry.example/m:1")))


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for one in selector.get("matchExpressions", []):
        assert set(one) == {"key", "operator", "values"} and one["operator"] == "In"
    return all(labels.get(key) == value for key, value in selector["matchLabels"].items()) and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"mixquant-colocated"}),
        ({"prefill": 2, "decode": 1}, {"mixquant-prefill", "mixquant-decode"}),
    ],
)
def test_prometheus_scrapes_each_engine_once(values: dict[str, Any], expected: set[str]) -> None:
    spec = manifest("servicemonitor.yaml")["spec"]
    (endpoint,) = spec["endpoints"]
    (keep,) = endpoint["relabelings"]
    assert keep["sourceLabels"] == ["__meta_kubernetes_service_name"] and keep["action"] == "keep"
    objects = rendered(**values)
    scraped = [
        one
        for one in objects
        if one["kind"] == "Service"
        and selects(spec["selector"], one["metadata"]["labels"])
        and re.fullmatch(keep["regex"], one["metadata"]["name"])
    ]
    assert {one["metadata"]["name"] for one in scraped} == expected
    for service in scraped:
        ports = {port["name"]: port for port in service["spec"]["ports"]}
        assert endpoint["port"] in ports
    assert endpoint["path"] == "/metrics"


def test_the_service_monitor_has_fields_that_the_operator_knows() -> None:
    """As of prometheus-operator 0.8x, whose schema has hundreds of fields more."""
    monitor = manifest("servicemonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == (
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
    )
    assert set(monitor) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert set(endpoint) == {"port", "path", "interval", "relabelings"}
    assert set(endpoint["relabelings"][0]) == {"sourceLabels", "regex", "action"}


def test_kubernetes_takes_the_network_policy_and_it_selects_the_engines() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    policy = manifest("networkpolicy.yaml")
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    (rule,) = policy["spec"]["ingress"]
    (port,) = rule["ports"]
    pods = [
        one["spec"]["template"]
        for one in rendered(prefill=1, decode=1)
        if one["kind"] in ("StatefulSet", "Deployment")
    ]
    chosen = [
        pod for pod in pods if selects(policy["spec"]["podSelector"], pod["metadata"]["labels"])
    ]
    assert len(pods) == 3 and len(chosen) == 2  # not the front
    for pod in chosen:
        ports = {one["name"] for one in pod["spec"]["containers"][0]["ports"]}
        assert port["port"] in ports
