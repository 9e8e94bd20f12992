"""Prometheus and Grafana examples use only metrics and labels that the command really prints."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.metrics_answers import answer, task
from z4j_bare.monitoring.openmetrics import LIVE, Snapshot, families_of, render

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"

#: Labels that Prometheus and the histograms add.
TARGET_LABELS = {"instance", "job", "le"}

RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def series():
    """The labels of each sample that the command prints, by name."""
    row = task(started=1, failed={"KeyError": 1}, delays={0.5: 1})
    text = render(families_of([Snapshot(answer(tasks=[row]), LIVE)]))
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def check(expression, series):
    """Check the syntax of an expression, and that its metrics and labels exist."""
    expression = expression.replace("$__rate_interval", "5m")
    promql_parser.parse(expression)
    names = set(re.findall(r"\b(?:celery|z4j)_\w+", expression))
    assert names
    assert names <= series.keys()
    known = set.union(*(series[name] for name in names)) | TARGET_LABELS
    used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    for words in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression):
        used |= {word.strip() for word in words.split(",")}
    assert used <= known


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_uses_printed_metrics(rule, series):
    """The expression is valid PromQL, and the summary names only labels of its result."""
    check(rule["expr"], series)
    assert rule["labels"]["severity"] in {"warning", "critical"}
    labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    kept = re.search(r"by \(([^)]*)\)", rule["expr"])
    names = re.findall(r"\b(?:celery|z4j)_\w+", rule["expr"])
    assert labels <= ({word.strip() for word in kept[1].split(",")} if kept else series[names[0]])


@pytest.mark.parametrize("expression", QUERIES)
def test_panel_uses_printed_metrics(expression, series):
    """Every query of the dashboard is valid and finds series."""
    check(expression.replace("$project", ".*").replace("$worker", ".*"), series)


def test_variables_of_dashboard_use_printed_metrics(series):
    """Each variable reads an existing label of an existing metric."""
    names = []
    for variable in DASHBOARD["templating"]["list"][1:]:
        metric, label = re.fullmatch(
            r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["query"]["query"]
        ).groups()
        assert label in series[metric]
        names.append(variable["name"])
    assert {name for text in QUERIES for name in re.findall(r'"\$(\w+)"', text)} == set(names)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_unknown_metric_is_noticed(series):
    """The check fails for a metric, a label or a syntax that does not exist."""
    for expression in (
        "celery_task_done_total",
        'celery_worker_up{queue="x"}',
        "sum by (color) (celery_worker_up)",
    ):
        with pytest.raises(AssertionError):
            check(expression, series)
    with pytest.raises(ValueError, match=r"."):
        check("sum by (worker) celery_worker_up > >", series)


def test_scrape_configuration_names_rules_and_address():
    """The configuration loads the rules, and its address is that of the service."""
    found = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert found["rule_files"] == ["prometheus-rules.yml"]
    (job,) = (each for each in found["scrape_configs"] if each["job_name"] == "z4j")
    (target,) = job["static_configs"][0]["targets"]
    assert f"--listen {target}\n" in (DEPLOY / "z4j-metrics.service").read_text()


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on the package index")
def test_promtool_accepts_configuration():
    """Prometheus' own tool accepts the configuration with the rules."""
    for words in (("config", "prometheus.yml"), ("rules", "prometheus-rules.yml")):
        done = subprocess.run(
            ["promtool", "check", *words],
            cwd=DEPLOY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
