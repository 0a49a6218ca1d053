"""The files of `deploy/`: the board asks for metrics that exist, probes for routes that exist, nothing runs as root."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.telemetry.scripted_engine import ScriptedEngine
from zif.serving.http.health import health_routes
from zif.serving.http.settings import serve_setting_fields
from zif.serving.telemetry import names
from zif.serving.telemetry.metrics import ServerMetrics

DEPLOY = Path(__file__).resolve().parents[4] / "deploy"
BOARD = json.loads((DEPLOY / "grafana/zif.json").read_text())
ATTACHED = {"model_name", "engine", "instance", "le"}
"""Labels that every metric has here, or gets where it is scraped."""


def resources() -> dict[str, dict[str, Any]]:
    folder = DEPLOY / "kubernetes"
    loaded = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))]
    return {resource["kind"]: resource for resource in loaded}


def pod() -> dict[str, Any]:
    return resources()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


def flags() -> dict[str, str]:
    return dict(given.removeprefix("--").split("=", 1) for given in container()["args"] if given.startswith("--"))


def queries() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def exposed() -> dict[str, set[str]]:
    """Return the own labels of every exposed series, by its name as it is scraped."""
    series: dict[str, set[str]] = {}
    for name in (value for value in vars(names).values() if isinstance(value, names.Name)):
        suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}[name.kind.value]
        series |= {f"{names.PREFIX}{name.name}{suffix}": set(name.labels) for suffix in suffixes}
    return series


@pytest.mark.parametrize("query", queries())
def test_the_board_asks_for_metrics_and_labels_that_exist(query: str) -> None:
    asked = re.findall(r"zif:[a-z0-9_]+", query)
    assert asked
    series = exposed()
    assert [name for name in asked if name not in series] == []
    labels = set(re.findall(r"([a-z_]+)=~?\"", query)) | set(re.findall(r"by \(([a-z_]+)\)", query))
    assert labels <= ATTACHED.union(*(series[name] for name in asked))


def test_the_table_of_series_is_what_is_scraped() -> None:
    metrics = ServerMetrics(ScriptedEngine(), phases=lambda: {"loading weights": 1.0})
    for counter in (metrics.successes, metrics.rejections):
        counter.add("x")
    metrics.http_requests.add("x", "x", "x")
    scraped = set(re.findall(r"^(zif:[a-z0-9_]+)", metrics.render().decode(), re.MULTILINE))
    assert scraped == set(exposed())


def test_rates_are_taken_of_counters_only() -> None:
    for query in queries():
        for name in re.findall(r"rate\((zif:[a-z0-9_]+)", query):
            assert name.endswith(("_total", "_bucket")), query


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)


def test_the_end_has_time_for_the_drain() -> None:
    pre_stop_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = int(flags()["drain-s"])
    assert pod()["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s + 10


def test_probes_ask_routes_that_are_there_and_public() -> None:
    public = {route.path for route in health_routes() if route.scope.value == "public"}
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {probe["httpGet"]["path"] for probe in probes.values()} <= public
    assert probes["liveness"]["httpGet"]["path"] == "/livez", "a hung engine restarts by itself; the pod stays"
    readiness = probes["readiness"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 10
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 1800


def test_flags_are_settings_of_the_server() -> None:
    known = {declared.name.replace("_", "-") for declared in serve_setting_fields()}
    assert set(flags()) <= known
    assert set(re.findall(r'"--([a-z-]+)"', (DEPLOY / "Dockerfile").read_text().split("CMD")[-1])) <= known


def test_nothing_runs_as_root_or_writes_where_it_should_not() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["automountServiceAccountToken"] is False
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = [mount["mountPath"] for mount in container()["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    users = re.findall(r"^USER (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert users == [f"{pod()['securityContext']['runAsUser']}:{pod()['securityContext']['runAsGroup']}"]


def test_mounts_volumes_ports_and_labels_fit_together() -> None:
    volumes = {volume["name"] for volume in pod()["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes
    (port,) = container()["ports"]
    assert str(port["containerPort"]) == flags()["port"]
    found = resources()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    for kind, key in (
        ("PodDisruptionBudget", "selector"),
        ("PodMonitor", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert found[kind]["spec"][key]["matchLabels"] == labels
    listed = set(found["Kustomization"]["resources"])
    assert listed | {"podmonitor.yaml", "kustomization.yaml"} == {p.name for p in (DEPLOY / "kubernetes").iterdir()}


def test_the_image_copies_what_is_there_and_is_not_ignored() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    root = DEPLOY.parent
    allowed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert [path for path in allowed if not (root / path).exists()] == []
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert any(path == source or path.startswith(f"{source}/") for path in allowed), source
    assert not re.search(r"^ADD |curl |wget |--trusted-host|--index-url", text, re.MULTILINE)
