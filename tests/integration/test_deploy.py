"""What is in deploy/: rules and panels find data in a real Prometheus, manifests fit their schemas, files agree."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from serving import serving, tiny_core
from test_server_metrics import planning

from dspark.server.service import ServerConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus is not installed: rules and dashboards are NOT checked; apt-get install prometheus",
)
MANIFESTS = [path for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) if path.stem != "prometheus-adapter"]
CUSTOM = ("keda", "kustomization")  # kinds that Kubernetes itself does not know


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_prometheus", DEPLOY / "check_prometheus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_prometheus
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"]
)
def test_promtool_accepts(command):
    ran = subprocess.run(["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_prometheus
def test_every_rule_and_panel_finds_data_under_load(tiny_pair, check):
    with serving(planning(tiny_core(tiny_pair), "cheap"), ServerConfig(name="tiny")) as running:
        assert not check.empty_queries(running.url, seconds=120)


def test_every_alert_has_a_test_and_a_summary():
    rules = [
        rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]
    ]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one.get("exp_alerts")}
    assert fired == set(alerts) and all(rule["annotations"]["summary"] for rule in alerts.values())


def test_dashboards_and_rules_read_only_metrics_that_exist(check):
    guide = (DEPLOY.parent / "docs" / "guides" / "metrics.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `(dspark_\w+)` \|", guide, re.M))
    queries = [*check.rule_queries().values(), *check.panel_queries().values()]
    for name in ("prometheus-adapter", "keda"):
        queries += re.findall("uery: (.*)$|^ +(/ .*)$", (DEPLOY / "kubernetes" / f"{name}.yaml").read_text(), re.M)
    for name in re.findall(r"\bdspark_[a-z0-9_]+[a-z]\b", " ".join(map(str, queries))):
        assert {name, re.sub(r"_(bucket|sum|count)$", "", name)} & known, name


def test_dashboards_are_provisioned_from_the_source_they_name():
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        board = json.loads(path.read_text(encoding="utf-8"))
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids)) and board["uid"]
        sources = {target["datasource"]["uid"] for panel in board["panels"] for target in panel.get("targets", ())}
        assert sources == {source["uid"]}
        assert all(panel["description"] for panel in board["panels"] if panel["type"] != "row")


@pytest.mark.parametrize("path", [path for path in MANIFESTS if path.stem not in CUSTOM], ids=lambda path: path.stem)
def test_manifests_fit_kubernetes_schemas(path):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is missing: manifests NOT checked"
    )
    for document in yaml.safe_load_all(path.read_text()):
        validate.validate(document, validate.latest_version(), strict=True)


def test_manifests_belong_together():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in MANIFESTS}
    assert set(found["kustomization"]["resources"]) == {f"{name}.yaml" for name in found if name not in CUSTOM}
    labels = found["deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["service"]["spec"]["selector"] == labels
    for name, key in (("disruption", "selector"), ("network", "podSelector")):
        assert found[name]["spec"][key]["matchLabels"] == labels
    (container,) = found["deployment"]["spec"]["template"]["spec"]["containers"]
    grace = int(container["args"][container["args"].index("--grace") + 1])
    assert found["deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > grace + 5
    name = found["deployment"]["metadata"]["name"]
    assert (
        found["autoscaler"]["spec"]["scaleTargetRef"]["name"] == found["keda"]["spec"]["scaleTargetRef"]["name"] == name
    )


def test_the_scaled_object_has_what_keda_needs():
    scaled = yaml.safe_load((DEPLOY / "kubernetes" / "keda.yaml").read_text())
    assert (scaled["apiVersion"], scaled["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    assert 1 <= scaled["spec"]["minReplicaCount"] <= scaled["spec"]["maxReplicaCount"]
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["type"] == "prometheus" and float(trigger["metadata"]["threshold"]) > 0
        assert {"serverAddress", "query", "threshold"} <= set(trigger["metadata"])


def test_compose_mounts_what_is_there():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (scraped,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped["dns_sd_configs"][0]["names"] == ["server"] and "server" in services
    for service in services.values():
        for mount in service.get("volumes", ()):
            if mount.startswith("."):
                assert (DEPLOY / mount.partition(":")[0]).exists(), mount
    assert (DEPLOY.parent / services["server"]["build"]["dockerfile"]).is_file()


def test_the_image_starts_what_the_command_line_knows(capsys):
    from dspark.cli.main import main

    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    entry = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT "))
    given = yaml.safe_load((DEPLOY / "kubernetes" / "deployment.yaml").read_text())
    args = given["spec"]["template"]["spec"]["containers"][0]["args"]
    assert entry[0] == "dspark" and main([*entry[1:], *args, "--port", "0", "--log-level", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err  # all options were read
    user = next(line.split()[1] for line in lines if line.startswith("USER"))
    assert int(user) == given["spec"]["template"]["spec"]["securityContext"]["runAsUser"] > 0
