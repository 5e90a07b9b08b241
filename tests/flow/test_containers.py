"""The container files of infra/, tested without a container engine: commands are run, manifests are validated with the models of
Kubernetes, docker-py and Prefect's workers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import ROOT, shadow

from tuneline.config.pools import DockerPool, KubernetesPool, ProcessPool, Toleration

COMPOSE = yaml.safe_load((ROOT / "infra" / "docker" / "compose.yaml").read_text())
MANIFESTS = [
    (path.name, document)
    for path in sorted((ROOT / "infra" / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
PROJECT = Path("/srv/project")


# --- base job templates ---------------------------------------------------------------------------------------------------


def rendered(kind: type[Any], pool: Any, **values: Any) -> Any:
    """Return the configuration that a worker makes from the pool's template, its defaults and a deployment's values."""
    from flows.deploy.pool_templates import base_job_template

    return asyncio.run(kind.from_template_and_values(base_job_template(pool, PROJECT), values, client=object()))


def test_a_container_of_a_docker_pool_gets_gpus_shared_memory_and_the_project() -> None:
    from docker.models.containers import _create_container_args
    from prefect_docker.worker import DockerWorkerJobConfiguration

    pool = DockerPool(type="docker", image="tuneline:1", gpus="all", shm_size="16Gi", volumes=("/data:/data",))
    made = rendered(DockerWorkerJobConfiguration, pool, env={"A": "b"})
    assert (made.image, made.volumes, made.env) == ("tuneline:1", ["/srv/project:/srv/project", "/data:/data"], {"A": "b"})
    host = _create_container_args({"image": made.image, "version": "1.47", **made.container_create_kwargs})["host_config"]
    assert host["DeviceRequests"] == [{"Driver": "nvidia", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}]
    assert (host["ShmSize"], host["Init"]) == (16 * 2**30, True)
    two = rendered(DockerWorkerJobConfiguration, DockerPool(type="docker", image="x", gpus=2))
    assert two.container_create_kwargs["device_requests"][0]["Count"] == 2
    none = rendered(DockerWorkerJobConfiguration, DockerPool(type="docker", image="x"))
    assert none.container_create_kwargs == {"shm_size": "1g", "init": True}


def test_a_job_of_a_kubernetes_pool_is_one_that_kubernetes_knows() -> None:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    pool = KubernetesPool(
        type="kubernetes",
        image="tuneline:1",
        namespace="ml",
        volume_claim="project",
        gpus=2,
        cpu="8",
        memory="64Gi",
        shm_size="16Gi",
        node_selector={"gpu": "h100"},
        tolerations=(Toleration(key="nvidia.com/gpu"), Toleration(key="team", value="ml", effect="NoExecute")),
        service_account="trainer",
    )
    made = rendered(KubernetesWorkerJobConfiguration, pool)
    job = made.job_manifest
    job["spec"]["template"]["spec"]["containers"][0] |= {"args": ["prefect", "flow-run", "execute"], "env": []}  # as the worker does
    assert list(unknown(job, "V1Job")) == []
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (job["spec"]["backoffLimit"], pod["restartPolicy"], pod["serviceAccountName"]) == (0, "Never", "trainer")
    assert container["resources"] == {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": 2}}
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule", "operator": "Exists"},
        {"key": "team", "effect": "NoExecute", "operator": "Equal", "value": "ml"},
    ]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/srv/project"]]["persistentVolumeClaim"] == {"claimName": "project"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert (made.namespace, made.pod_watch_timeout_seconds) == ("ml", 1800)
    plain = rendered(KubernetesWorkerJobConfiguration, KubernetesPool(type="kubernetes", image="x", volume_claim="y")).job_manifest
    pod = plain["spec"]["template"]["spec"]
    assert not {"nodeSelector", "tolerations", "serviceAccountName"} & set(pod)
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]


def test_a_process_pool_is_as_prefect_has_it() -> None:
    from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

    from flows.deploy.pool_templates import base_job_template

    assert base_job_template(ProcessPool(type="process"), PROJECT) == ProcessWorker.get_default_base_job_template()
    assert (
        rendered(ProcessJobConfiguration, ProcessPool(type="process"), env={"A": "b"}).command is None
    )  # or a cancel would end one process of many


def test_every_variable_of_a_template_is_used_and_every_use_has_its_variable() -> None:
    for path in sorted((ROOT / "infra" / "pools").glob("*.json")):
        template = json.loads(path.read_bytes())
        used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
        assert used == set(template["variables"]["properties"]), path.name


# --- kubernetes -----------------------------------------------------------------------------------------------------------


def unknown(node: Any, kind: str, path: str = "") -> Iterator[str]:
    """Yield the places where a manifest has an unknown field, or lacks a required one."""
    import kubernetes_asyncio.client as models

    if inner := re.fullmatch(r"(?:list\[|dict\(str, )(.*)[\])]", kind):
        for key, item in enumerate(node) if isinstance(node, list) else node.items():
            yield from unknown(item, inner[1], f"{path}.{key}")
    elif model := getattr(models, kind, None):
        names = {model.attribute_map[name]: (name, item) for name, item in model.openapi_types.items()}
        for key, item in node.items():
            if key in names:
                yield from unknown(item, names[key][1], f"{path}.{key}")
            else:
                yield f"{path}.{key} is no field of {kind}"
        try:
            model(**{names[key][0]: item for key, item in node.items() if key in names})
        except ValueError as error:
            yield f"{path}: {error}"
    elif kind == "str" and isinstance(node, int) and ".limits." in path:
        return  # a quantity may be a number
    elif kind in ("str", "int", "bool") and not isinstance(node, {"str": str, "int": int, "bool": bool}[kind]):
        yield f"{path} is {node!r}, not {kind}"


def test_a_manifest_that_is_wrong_is_found_out() -> None:
    wrong = {"kind": "Role", "rules": [{"apiGroup": [""]}, {"verbs": [1]}]}
    assert list(unknown(wrong, "V1Role")) == [
        ".rules.0.apiGroup is no field of V1PolicyRule",
        ".rules.0: Invalid value for `verbs`, must not be `None`",
        ".rules.1.verbs.0 is 1, not str",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "document"), MANIFESTS, ids=[f"{name} {document['kind']}" for name, document in MANIFESTS])
def test_manifests_are_what_kubernetes_knows(name: str, document: dict[str, Any]) -> None:
    assert list(unknown(document, f"V1{document['kind']}")) == []
    if document["kind"] == "Deployment":
        spec = document["spec"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        assert spec["template"]["spec"]["securityContext"]["runAsNonRoot"]
        for container in spec["template"]["spec"]["containers"]:
            assert not missing_flags(container["args"])


def test_manifests_name_what_there_is() -> None:
    by_kind: dict[str, dict[str, Any]] = {}
    for _, document in MANIFESTS:
        by_kind.setdefault(document["kind"], {})[document["metadata"]["name"]] = document
    binding = by_kind["RoleBinding"]["prefect-worker"]
    assert binding["roleRef"]["name"] in by_kind["Role"]
    assert binding["subjects"][0]["name"] in by_kind["ServiceAccount"]
    server, worker = (by_kind["Deployment"][name]["spec"]["template"]["spec"] for name in ("prefect-server", "prefect-worker"))
    assert worker["serviceAccountName"] in by_kind["ServiceAccount"]
    assert server["volumes"][0]["persistentVolumeClaim"]["claimName"] in by_kind["PersistentVolumeClaim"]
    service = by_kind["Service"]["prefect-server"]["spec"]
    environment = {entry["name"]: entry.get("value") for entry in worker["containers"][0]["env"]}
    assert environment["PREFECT_API_URL"] == f"http://prefect-server:{service['ports'][0]['port']}/api"
    jobs = next(rule for rule in by_kind["Role"]["prefect-worker"]["rules"] if "jobs" in rule["resources"])
    assert {"create", "delete", "watch"} <= set(jobs["verbs"])
    assert not any("*" in rule["verbs"] + rule["resources"] for rule in by_kind["Role"]["prefect-worker"]["rules"])


def missing_flags(command: list[str]) -> list[str]:
    """Return the flags that a command of Prefect or tuneline does not know."""
    from flows.commands.main import cli

    words = list(command[: next((i for i, word in enumerate(command) if word.startswith("-")), None)])
    if words[0] == "tuneline":
        known = " ".join(option for parameter in cli.commands[words[1]].params for option in parameter.opts)
    else:
        env = {**os.environ, "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
        asked = [sys.executable, "-m", *words, "--help"]
        known = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout
    return [word for word in command if word.startswith("--") and not re.search(rf"{word}\b", known)]


# --- compose --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_services_of_compose_hang_together() -> None:
    text = (ROOT / "infra" / "docker" / "compose.yaml").read_text()
    assert "0.0.0.0" not in text
    for name, service in COMPOSE["services"].items():
        assert service["network_mode"] == "host", name  # and all listen on loopback
        assert "ports" not in service
        assert service["healthcheck"]["test"]
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
        for volume in service["volumes"]:
            assert volume.split(":")[0] in COMPOSE["volumes"] or volume == "${PROJECT}:${PROJECT}"
        if service["command"][0] == "prefect":
            assert not missing_flags(service["command"])
    _, _, serve = COMPOSE["services"]["serve"]["command"]
    assert not missing_flags(serve.replace("$$SERVE", "").split()[1:])
    worker = COMPOSE["services"]["worker"]["environment"]
    assert worker["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"  # Prefect's default is every address
    server = COMPOSE["services"]["server"]
    assert (ROOT / "infra" / "docker" / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert server["command"][-3:] == ["127.0.0.1", "--port", "4200"]
    assert worker["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert "127.0.0.1:54320" in server["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert "port=54320" in COMPOSE["services"]["database"]["command"]
    pools = yaml.safe_load((ROOT / "pipelines.yaml").read_text())["pools"]
    assert {service["command"][4] for name, service in COMPOSE["services"].items() if name.startswith("worker")} == set(pools)


def test_settings_of_containers_are_prefects() -> None:
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings

    known = set(_get_settings_fields(Settings))
    text = "".join(path.read_text() for path in [*(ROOT / "infra" / "kubernetes").iterdir(), *(ROOT / "infra" / "docker").iterdir()])
    named = set(re.findall(r"\bPREFECT_[A-Z_]+\b", text))
    ours = {"PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"}  # prefect-kubernetes'
    assert len(named) > 5
    assert named - known <= ours


# --- the image ------------------------------------------------------------------------------------------------------------


def steps() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of the Dockerfile, with continued lines joined."""
    lines = [line for line in (ROOT / "infra" / "docker" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line]


def test_the_image_copies_what_there_is_and_names_no_host() -> None:
    for instruction, rest in steps():
        if instruction == "COPY":
            *sources, _ = rest.split()
            assert [source for source in sources if not (ROOT / source).exists()] == []
    assert not re.search(r"https?://|index-url", (ROOT / "infra" / "docker" / "Dockerfile").read_text())
    names = [instruction for instruction, _ in steps()]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")  # and so nobody can change what is installed
    assert "ENTRYPOINT" not in names


Image = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Run the steps of the Dockerfile in a folder; return it and its environment. Leaves out the system's packages, the user, and the
    runtimes, which `make setup` builds by the same command."""
    image = tmp_path_factory.mktemp("scratch") / "image"
    (image / "bin").mkdir(parents=True)
    (image / "bin" / "python").symlink_to(sys.executable)
    env = {**os.environ, "PATH": f"{image / 'bin'}:{os.environ['PATH']}", "RUNTIMES": ""}
    if links := os.environ.get("PIP_FIND_LINKS"):
        env["UV_FIND_LINKS"] = links.replace(" ", ",")
    ran = 0
    for instruction, rest in steps():
        rest = rest.replace("/opt/tuneline", str(image))
        if instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                folder = (ROOT / source).is_dir()
                where = Path(target) if folder else Path(target) / Path(source).name
                where.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if folder else shutil.copyfile)(ROOT / source, where)
        elif instruction == "ENV":
            env |= {name: value.replace("$PATH", env["PATH"]) for name, _, value in (word.partition("=") for word in rest.split())}
        elif instruction == "RUN" and not re.match("apt-get|groupadd", rest):
            done = subprocess.run(["sh", "-c", rest], env=env, cwd=image, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran == 3
    shutil.rmtree(image / "source")  # what runs is what was installed
    env.pop("PYTHONPATH", None)
    return image, env


def packages(image: Path) -> Path:
    return next((image / "venv").glob("lib/python*/site-packages"))


@pytest.mark.slow
def test_the_image_holds_the_packages_and_their_data(image: Image) -> None:
    folder, env = image

    def run(*command: str) -> str:
        return subprocess.run(command, env=env, cwd=folder / "setup", capture_output=True, text=True, check=True).stdout

    assert "Run cached fine-tuning pipelines" in run("tuneline", "--help")
    assert "pipelines.yaml is valid: first" in run("tuneline", "validate")
    program = "from flows.deploy.pool_templates import FOLDER; import prefect_docker, prefect_kubernetes; print(*sorted(p.name for p in FOLDER.iterdir()))"
    assert run("python", "-c", program) == "docker.json kubernetes.json\n"
    site = packages(folder)
    assert not {"flows", "tasks", "infra"} & {path.name for path in site.iterdir()}
    assert list((site / "tuneline-packages" / "flows" / "__pycache__").glob("pipeline.*.pyc"))
    assert list((site / "prefect" / "__pycache__").glob("flows.*.pyc"))


@pytest.mark.slow
def test_the_wheel_works_without_the_clone_beside_packages_of_the_same_names(
    image: Image, tmp_path: Path, runtime_python: Path, pico_model: Path
) -> None:
    """In the environment, on PYTHONPATH and in the current folder. Programs use the runtime's `torch`, not the environment's."""
    folder, env = image
    shadow(packages(folder), "flows", "tasks", "infra", "torch")
    shadow(tmp_path, "flows", "tasks")
    env = {**env, "TUNELINE_RUNTIMES": str(runtime_python.parents[2]), "PYTHONPATH": str(tmp_path)}

    def tuneline(*arguments: str) -> str:
        done = subprocess.run(["tuneline", *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tuneline("init")
    shutil.copytree(pico_model, tmp_path / "model")
    starter = tmp_path / "pipelines.yaml"
    starter.write_text(
        starter.read_text().replace("hub: HuggingFaceTB/SmolLM2-135M-Instruct", "path: model").replace("size: 600", "size: 20")
    )
    assert tuneline("setup").split() == ["torch", str(runtime_python)]
    tuneline("run", "first", "--only", "data")
    stages = json.loads(tuneline("show", "first", "--json"))["stages"]
    assert {name: manifest["kind"] for name, manifest in stages.items() if manifest} == {"base": "model", "data": "dataset"}
