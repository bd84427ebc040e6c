"""deploy/helm: Helm's own engine lints and renders the chart, Kubernetes' schemas are asked, and ours for what is the
Prometheus operator's, and the pod has what compose.yaml gives each container. None of it has run on a cluster."""

from __future__ import annotations

import copy
import json
import re
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from elasticmoe.cli import container
from elasticmoe.common.http.keys import read_key
from elasticmoe.common.private import read_secret
from scripts import chart, reference
from tests.unit.operator_schemas import SCHEMAS
from tests.unit.test_compose import MOUNTS, SERVICES

helm = pytest.importorskip("helm_python", reason="Helm's engine has no wheel for this machine")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

MODEL = {"model": {"volume": {"persistentVolumeClaim": {"claimName": "models"}}}}
FULL: dict[str, Any] = MODEL | {
    "settings": {"devices": "host:4", "replicas": 2, "rank_stall_s": 2.5, "pin_cores": True, "kv_bytes": 1 << 36},
    "apiKey": {"existingSecret": "keys"},
    "adminToken": {"existingSecret": "mine", "key": "token"},
    "allowedHosts": ["llm.example.com"],
    "adminService": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"adminFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}],
    "persistence": {"enabled": False},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "x"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "imagePullSecrets": [{"name": "registry"}],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
}
OUTSIDE_STORE = MODEL | {"store": {"existingSecret": "valkey"}}
VERSIONS = ("1.30", "1.34", "1.37")


@cache
def loaded() -> Any:
    return helm.Chart.load(chart.CHART)


def rendered(values: dict[str, Any], name: str = "demo", of: Any = None) -> list[dict[str, Any]]:
    """Every resource of our chart, or of another one. Raises HelmError."""
    found = of or loaded()
    found.validate_schema(values)
    files = found.render(values, name=name, namespace="serving")
    documents = [yaml.safe_load_all(text) for path, text in files.items() if not path.endswith("NOTES.txt")]
    return [one for parts in documents for one in parts if one]


def of_kind(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    (found,) = [one for one in rendered(values) if one["kind"] == kind]
    return found


def pod(values: dict[str, Any]) -> dict[str, Any]:
    return dict(of_kind("StatefulSet", values)["spec"]["template"]["spec"])


def containers(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in pod(values)["containers"]}


def test_the_chart_passes_helms_linter() -> None:
    report = helm.lint(chart.CHART, MODEL, strict=True)
    assert report["errors"] == []
    assert [one for one in report["messages"] if one["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [MODEL, FULL, OUTSIDE_STORE], ids=["least", "full", "store elsewhere"])
def test_kubernetes_takes_what_it_makes(values: dict[str, Any], version: str) -> None:
    resources = rendered(values)
    for one in resources:
        if one["kind"] in SCHEMAS:
            jsonschema.validate(one, SCHEMAS[one["kind"]])
            continue
        if "claims" in str(one) and version == "1.30":
            continue  # dynamic resource allocation had another form then
        kubernetes_validate.validate(one, version, strict=True)
    kinds = {"StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    extra = set(SCHEMAS) if values is FULL else {"Secret"}
    assert {one["kind"] for one in resources} == kinds | extra
    assert len({(one["kind"], one["metadata"]["name"]) for one in resources}) == len(resources)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ServiceMonitor", ("spec", "endpoints", 0, "interval"), 5),
        ("ServiceMonitor", ("spec", "endpoints", 0, "interval"), "5 seconds"),
        ("ServiceMonitor", ("spec", "endpoints", 0, "targetLabel"), "deployment"),
        ("ServiceMonitor", ("spec", "endpoints", 0, "relabelings", 0, "sourceLabels"), "__meta_kubernetes_pod_name"),
        ("ServiceMonitor", ("spec", "endpoints", 1, "authorization", "credentials"), {"name": "mine"}),
        ("ServiceMonitor", ("spec", "endpoints"), []),
        ("ServiceMonitor", ("apiVersion",), "monitoring.coreos.com/v1alpha1"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "for"), "a minute"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "expr"), None),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "labels"), {"severity": 1}),
        ("PrometheusRule", ("metadata", "labels"), {"release": True}),
        ("PrometheusRule", ("spec",), {}),
    ],
)
def test_the_operators_schemas_refuse_what_the_operator_would(kind: str, path: tuple[Any, ...], value: Any) -> None:
    made = copy.deepcopy(of_kind(kind, FULL))
    place = made
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made, SCHEMAS[kind])


def test_prometheus_finds_the_ports_that_it_is_to_scrape() -> None:
    monitor = of_kind("ServiceMonitor", FULL)["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    services = [
        one for one in rendered(FULL) if one["kind"] == "Service" and wanted <= one["metadata"]["labels"].items()
    ]
    ports = [port["name"] for one in services for port in one["spec"]["ports"]]
    assert sorted(one["port"] for one in monitor["endpoints"]) == sorted(ports) == ["admin", "http"]


def test_the_alerts_are_those_of_the_code_and_are_left_out_unless_asked_for() -> None:
    made = of_kind("PrometheusRule", FULL)
    assert made["metadata"]["labels"]["release"] == "prometheus"
    assert made["spec"] == json.loads(reference.rules())
    assert "PrometheusRule" not in {one["kind"] for one in rendered(MODEL)}


def test_braces_in_alerts_are_left_to_prometheus(tmp_path: Path) -> None:
    shutil.copytree(chart.CHART, tmp_path / "elasticmoe")
    path = tmp_path / "elasticmoe" / "files" / "alerts.json"
    rules = json.loads(path.read_text())
    rules["groups"][0]["rules"][0]["annotations"]["summary"] = said = (
        '{{ $labels.code }}: {{ printf "%.1f" $value }} a second'
    )
    path.write_text(json.dumps(rules))
    (made,) = [
        one for one in rendered(FULL, of=helm.Chart.load(tmp_path / "elasticmoe")) if one["kind"] == "PrometheusRule"
    ]
    assert made["spec"]["groups"][0]["rules"][0]["annotations"]["summary"] == said
    assert made["spec"] == rules


def test_the_notes_name_the_web_page_with_the_token_of_the_secret() -> None:
    for values, secret, key in ((MODEL, "demo-elasticmoe-admin", "admin-token"), (FULL, "mine", "token")):
        (notes,) = [
            text
            for path, text in loaded().render(values, name="demo", namespace="serving").items()
            if path.endswith("NOTES.txt")
        ]
        assert "http://127.0.0.1:8100/#token=$TOKEN" in notes
        assert f"TOKEN=$(kubectl --namespace serving get secret {secret} " in notes
        assert f"jsonpath='{{.data.{key}}}' | base64 --decode)" in notes
        assert notes.index("TOKEN=$(") < notes.index("#token=$TOKEN")


def test_the_schema_is_that_of_the_settings() -> None:
    assert chart.SCHEMA.read_text() == chart.schema(), "run `make docs`"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"replica": 2}}, "replica"),
        ({"settings": {"replicas": 0}}, "replicas"),
        ({"settings": {"port": 9000}}, "port"),
        ({"settings": {"pin_cores": "yes"}}, "pin_cores"),
        ({"settings": {"log_level": "loud"}}, "log_level"),
        ({"settings": {"devices": "gpu"}}, "devices"),
        ({"settings": {"store_url": "redis://:secret@valkey"}}, "store_url"),
        ({"drainSeconds": -1}, "drainSeconds"),
        ({"hosts": 0}, "hosts"),
        ({"hosts": "two"}, "hosts"),
        ({"apiKey": {"existingsecret": "keys"}}, "existingsecret"),
        ({"netwrokPolicy": {"enabled": False}}, "netwrokPolicy"),
        ({"image": {"tag": 20241127}}, "tag"),
    ],
)
def test_a_value_that_is_wrong_is_refused_by_its_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(helm.HelmError, match=said):
        rendered(MODEL | changes)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(helm.HelmError, match=r"model\.volume: say where the checkpoint is"):
        rendered({})
    with pytest.raises(helm.HelmError, match=r"needs adminService\.enabled"):
        rendered(MODEL | {"serviceMonitor": {"enabled": True}})
    with pytest.raises(helm.HelmError, match=r"needs networkPolicy\.adminFrom"):
        rendered(MODEL | {"adminService": {"enabled": True}})


def test_each_container_mounts_what_compose_gives_it() -> None:
    parts = {
        "sockets": ("run", "sockets"),
        "store": ("state", "store"),
        **{f"state-{name}": ("state", name) for name in ("hmm", "worker", "scaler")},
        **{f"secrets-{name}": ("state", f"secrets/{name}") for name in ("store", "scaler", "router")},
        "model": ("model", None),
    }
    found = containers(MODEL)
    assert set(found) == set(SERVICES) - {"init"}
    for name, one in found.items():
        mounts = {(mount["name"], mount.get("subPath"), mount["mountPath"]) for mount in one["volumeMounts"]}
        wanted = {(*parts[source], target) for source, target in MOUNTS[name]}
        logs = {("run", "logs", "/run/elasticmoe/logs")} if name == "router" else set()  # the setting `history`
        assert mounts == wanted | logs | {("run", f"tmp/{name}", "/tmp")}, name
        read_only = {mount["mountPath"] for mount in one["volumeMounts"] if mount.get("readOnly")}
        assert read_only == {target for source, target in MOUNTS[name] if source in READ_ONLY}, name
        assert one["command"] == SERVICES[name]["command"]
        assert set(one["resources"]) == {"requests", "limits"}
        assert "memory" in one["resources"]["limits"]


READ_ONLY = {"secrets-scaler", "secrets-router", "model"}


def test_no_container_has_a_right() -> None:
    for values in (MODEL, FULL):
        spec = pod(values)
        assert not spec["automountServiceAccountToken"]
        assert not spec["enableServiceLinks"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
        for one in (*spec["initContainers"], *spec["containers"]):
            context = one["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_settings_reach_all_processes_as_they_are_written() -> None:
    for one in containers(FULL).values():
        env = {entry["name"]: entry["value"] for entry in one["env"]}
        assert env["ELASTICMOE_DEPLOYMENT"] == "serving.demo"  # two releases may have one store
        assert env["ELASTICMOE_DEVICES"] == "host:4"
        assert env["ELASTICMOE_RANK_STALL_S"] == "2.5"
        assert env["ELASTICMOE_PIN_CORES"] == "true"
        assert env["ELASTICMOE_KV_BYTES"] == str(1 << 36)  # not 6.87e+10
        assert len(env) == len(one["env"])
    env = {entry["name"]: entry["value"] for entry in containers(FULL)["router"]["env"]}
    assert env["ELASTICMOE_ALLOWED_HOSTS"].split(",") == [
        "localhost",
        *(f"demo-elasticmoe{rest}" for rest in ("", ".serving", ".serving.svc", ".serving.svc.cluster.local")),
        "llm.example.com",
    ]
    assert env["ELASTICMOE_API_KEY_FILE"] == "/keys/api-key"


def test_a_store_elsewhere_leaves_the_own_one_out_and_may_be_reached() -> None:
    assert set(containers(OUTSIDE_STORE)) == set(containers(MODEL)) - {"store"}
    for name, one in containers(OUTSIDE_STORE).items():
        told = [entry["valueFrom"]["secretKeyRef"] for entry in one["env"] if "valueFrom" in entry]
        assert told == ([{"name": "valkey", "key": "url"}] if name in ("scaler", "router") else []), name
    assert of_kind("NetworkPolicy", OUTSIDE_STORE)["spec"]["policyTypes"] == ["Ingress"]
    assert of_kind("NetworkPolicy", MODEL)["spec"]["egress"] == []


def test_several_pods_are_as_many_deployments_or_as_many_as_an_autoscaler_wants() -> None:
    assert of_kind("StatefulSet", MODEL)["spec"]["replicas"] == 1
    assert of_kind("StatefulSet", MODEL | {"hosts": 3})["spec"]["replicas"] == 3
    assert "replicas" not in of_kind("StatefulSet", MODEL | {"hosts": None})["spec"]
    for hosts in (2, None):
        with pytest.raises(helm.HelmError, match="cannot share one store"):
            rendered(OUTSIDE_STORE | {"hosts": hosts})
    endpoints = of_kind("ServiceMonitor", FULL)["spec"]["endpoints"]
    assert [one["relabelings"] for one in endpoints] == 2 * [
        [{"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "deployment"}]
    ]


def test_the_example_for_keda_scales_the_charts_pods() -> None:
    folder = chart.CHART.parents[1] / "keda"
    scaled = yaml.safe_load((folder / "scaledobject.yaml").read_text())["spec"]
    values = yaml.safe_load((folder / "values.yaml").read_text())
    resources = {one["kind"]: one for one in rendered(MODEL | values, name="moe")}
    made = resources["StatefulSet"]
    name = made["metadata"]["name"]
    assert scaled["scaleTargetRef"] == {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": name}
    assert "replicas" not in made["spec"]
    assert [one["port"] for one in resources["ServiceMonitor"]["spec"]["endpoints"]] == ["http", "admin"]
    assert f'deployment=~"{name}-[0-9]+"' in scaled["triggers"][0]["metadata"]["query"]
    readme = (folder / "README.md").read_text()
    assert f"helm install moe {chart.CHART.relative_to(chart.CHART.parents[2])} --namespace serving" in readme


def test_a_collector_of_traces_may_be_reached() -> None:
    traced = MODEL | {"settings": {"otlp_endpoint": "http://collector.monitoring:4318"}}
    assert of_kind("NetworkPolicy", traced)["spec"]["policyTypes"] == ["Ingress"]
    env = {entry["name"]: entry.get("value") for entry in containers(traced)["router"]["env"]}
    assert env["ELASTICMOE_OTLP_ENDPOINT"] == "http://collector.monitoring:4318"


def test_both_that_touch_devices_share_their_claims() -> None:
    found = containers(FULL)
    claims = {name: one["resources"].get("claims") for name, one in found.items()}
    assert claims["hmm"] == claims["worker"] == [{"name": "gpus"}]
    assert not any(claim for name, claim in claims.items() if name not in ("hmm", "worker"))


def test_the_others_outlive_the_router() -> None:
    spec = pod(MODEL | {"drainSeconds": 90})
    waits = {one["name"]: int(one["lifecycle"]["preStop"]["exec"]["command"][1]) for one in spec["containers"]}
    router = {entry["name"]: entry["value"] for entry in containers(MODEL | {"drainSeconds": 90})["router"]["env"]}
    assert router["ELASTICMOE_DRAIN_SECONDS"] == "90"
    assert waits.pop("router") == 5
    assert set(waits.values()) == {95}
    assert spec["terminationGracePeriodSeconds"] > 95 + 15  # what a process needs after its SIGTERM


def test_who_holds_the_weights_is_not_ended_by_a_check_that_finds_no_time() -> None:
    for name, one in containers(FULL).items():
        assert ("livenessProbe" in one) == (name in ("scaler", "router"))
        assert one.get("livenessProbe", {}).get("terminationGracePeriodSeconds", 10) < 30


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "1.10"}},
        {"model": {"volume": {"emptyDir": {}}, "subPath": "007"}},
        {"priorityClassName": "1", "runtimeClassName": "true"},
        {"adminToken": {"key": "1"}, "apiKey": {"existingSecret": "2", "key": "3"}},
        {"persistence": {"size": "10", "storageClassName": "no"}},
        {"settings": {"served_name": 'a "model": {x}', "deployment": "1.0"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_texts_stay_texts(values: dict[str, Any]) -> None:
    for one in rendered(MODEL | values, "123"):
        kubernetes_validate.validate(one, VERSIONS[0], strict=True)
    assert all(isinstance(entry["value"], str) for entry in containers(MODEL | values)["router"]["env"])


def test_an_image_may_be_named_by_its_digest() -> None:
    image = {"repository": "registry/elasticmoe", "digest": "sha256:" + "0" * 64}
    assert containers(MODEL | {"image": image})["hmm"]["image"] == f"registry/elasticmoe@{image['digest']}"


@pytest.mark.parametrize("release", ["elasticmoe", "x" * 53, "my-elasticmoe-two"])
def test_names_fit_whatever_the_release_is_called(release: str) -> None:
    for one in rendered(FULL, release):
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"])
        assert len(one["metadata"]["name"]) <= 63 - len("-0")


def test_a_token_that_helm_makes_is_long_and_another_each_time() -> None:
    tokens = [of_kind("Secret", MODEL)["data"]["admin-token"] for _ in range(2)]
    assert tokens[0] != tokens[1]
    assert len(tokens[0]) >= 64


def test_folders_of_a_pods_volumes_are_private_and_hold_the_secrets(tmp_path: Path) -> None:
    """The two init containers over volumes as a cluster makes them: for the group to write to, and set-group-id; the
    Secret is a link. Twice, as for a pod that comes back to its state."""
    folders, init = pod(MODEL)["initContainers"]
    assert init["command"][:4] == ["python", "-m", "elasticmoe.cli.container", "init"]
    secret = tmp_path / "admin"
    (secret / "..data").mkdir(parents=True)
    (secret / "..data" / "token").write_text("t" * 48)
    (secret / "token").symlink_to("..data/token")
    volumes = tmp_path / "volumes"
    for name in ("state", "run"):
        (volumes / name).mkdir(parents=True)
        (volumes / name).chmod(0o2777)
    *command, _, _ = folders["command"]
    mounted = tmp_path / "mounted"  # as a mount by itself, with nothing of the volume's on the way to it
    mounted.mkdir(mode=0o700)
    for turn in range(2):
        subprocess.run([*command, volumes, secret / "token"], check=True, timeout=30, umask=0o022)
        made = [path for path in volumes.rglob("*") if path.is_dir() and path.parent != volumes]
        assert {stat.S_IMODE(path.stat().st_mode) & 0o777 for path in made} == {0o700}
        secrets = (volumes / "state" / "secrets").rename(mounted / "secrets")
        container.init(secrets)
        for name, has in container.SECRETS_OF.items():
            assert {path.name for path in (secrets / name).iterdir()} == set(has)
        assert read_secret(secrets / "scaler" / "admin.token") == "t" * 48
        secrets.rename(volumes / "state" / "secrets")
        if not turn:  # as a volume that was restored elsewhere comes back
            for path in (volumes / "state").rglob("*"):
                path.chmod(path.stat().st_mode | stat.S_IRWXG)
    mounts = [mount for one in containers(MODEL).values() for mount in one["volumeMounts"]]
    paths = {mount["subPath"] for mount in mounts if "subPath" in mount}
    held = {str(path.relative_to(volumes / part)) for part in ("state", "run") for path in (volumes / part).rglob("*")}
    assert paths <= held


def test_a_key_of_a_secret_is_read_through_its_link(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "api-key").write_text("sesame")
    (tmp_path / "api-key").symlink_to("..data/api-key")
    assert read_key(str(tmp_path / "api-key")) == b"sesame"
