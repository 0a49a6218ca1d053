"""The Helm chart, as far as it can be judged without Helm: its values, its blocks, and what is left without actions.

What is left is the manifest with every option on, each inserted value a word: it must be YAML, and what matters for
safety must be what `deploy/kubernetes` has. Where `helm` is installed, it renders the chart too.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[4] / "deploy"
CHART = DEPLOY / "helm/zif"
TEMPLATES = sorted((CHART / "templates").iterdir())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
SAME = ("securityContext", "automountServiceAccountToken", "enableServiceLinks")


def actions(text: str) -> list[str]:
    return ACTION.findall(text)


def paths(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the path of every value that is not a mapping with entries."""
    for key, value in values.items():
        path = f"{before}{key}"
        if isinstance(value, dict) and value:
            yield from paths(value, f"{path}.")
        else:
            yield path


def without_actions(path: Path) -> dict[str, Any]:
    lines = [line for line in path.read_text().splitlines() if not re.fullmatch(r"\s*\{\{-.*\}\}", line)]
    manifest: dict[str, Any] = yaml.safe_load(ACTION.sub("x", "\n".join(lines)))
    return manifest


def manifest(kind: str) -> dict[str, Any]:
    found = [without_actions(path) for path in TEMPLATES if path.suffix == ".yaml"]
    return next(each for each in found if each["kind"] == kind)


def plain(kind: str) -> dict[str, Any]:
    found = [yaml.safe_load(path.read_text()) for path in (DEPLOY / "kubernetes").glob("*.yaml")]
    return next(each for each in found if each["kind"] == kind)


def test_templates_use_the_values_that_there_are_and_all_of_them() -> None:
    used = {
        name
        for path in TEMPLATES
        for action in actions(path.read_text())
        for name in re.findall(r"\.Values\.([\w.]+)", action)
    }
    known = set(paths(VALUES))
    groups = {path[: dot.start()] for path in known for dot in re.finditer(r"\.", path)}
    assert used - known - groups == set(), "a template asks for a value that values.yaml does not have"
    unused = {path for path in known if not any(path == name or path.startswith(f"{name}.") for name in used)}
    assert unused == set(), "values.yaml has a value that no template uses"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_blocks_begin_and_end(path: Path) -> None:
    text, depth = path.read_text(), 0
    assert text.count("{{") == text.count("}}") == len(actions(text))
    for action in actions(text):
        depth += action.split()[0] in ("if", "with", "range", "define")
        depth -= action == "end"
        assert depth >= 0
    assert depth == 0


def test_the_pod_is_as_guarded_as_that_of_the_manifests() -> None:
    chart, given = manifest("Deployment"), plain("Deployment")
    pod, plain_pod = chart["spec"]["template"]["spec"], given["spec"]["template"]["spec"]
    assert {key: pod[key] for key in SAME} == {key: plain_pod[key] for key in SAME}
    (container,), (plain_container,) = pod["containers"], plain_pod["containers"]
    assert container["securityContext"] == plain_container["securityContext"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == plain_container[probe]["httpGet"]
    places = [
        {(mount["name"], mount.get("readOnly")) for mount in c["volumeMounts"]} for c in (container, plain_container)
    ]
    assert places[0] == places[1]
    assert {volume["name"] for volume in pod["volumes"]} == {volume["name"] for volume in plain_pod["volumes"]}
    flags = [{arg.partition("=")[0] for arg in c["args"] if arg.startswith("--")} for c in (container, plain_container)]
    assert flags[0] == flags[1]
    assert manifest("NetworkPolicy")["spec"]["egress"] == plain("NetworkPolicy")["spec"]["egress"] == []


def test_numbers_are_those_of_the_manifests() -> None:
    (container,) = plain("Deployment")["spec"]["template"]["spec"]["containers"]
    for name in ("startup", "liveness", "readiness"):
        assert VALUES[name].items() <= container[f"{name}Probe"].items()
    assert VALUES["resources"] == container["resources"]
    assert f"--drain-s={VALUES['drainSeconds']}" in container["args"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(VALUES["preStopSeconds"])]
    assert VALUES["graceSeconds"] >= 10


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_helm_renders_every_option() -> None:
    options = "podMonitor.enabled=true,model.claimName=c,model.subPath=s,image.tag=1,extraArgs={--max-model-len=64}"
    command = ["helm", "template", "t", str(CHART), "--set", options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    kinds = {each["kind"] for each in yaml.safe_load_all(done.stdout)}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"}
