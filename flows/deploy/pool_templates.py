"""Base job templates, which define what Prefect's workers start for a run, made from the pools of pipelines.yaml.

The templates for containers are in infra/pools/*.json. A pool's settings become the defaults of their variables, so a deployment can
still override them. A variable without a default removes its field, so no GPU is requested where none is set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect.workers.process import ProcessWorker

from tuneline.config.pools import AnyPool, DockerPool, KubernetesPool
from tuneline.paths import PACKAGES_ROOT

FOLDER = PACKAGES_ROOT / "infra" / "pools"


def base_job_template(pool: AnyPool, root: Path) -> dict[str, Any]:
    """Return the pool's template. Containers mount `root`, the folder of pipelines.yaml, at the same path: keys and checkpoints match."""
    if isinstance(pool, DockerPool):
        return _filled("docker", _docker(pool, root))
    if isinstance(pool, KubernetesPool):
        return _filled("kubernetes", _kubernetes(pool, root))
    return ProcessWorker.get_default_base_job_template()


def _filled(name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_bytes())
    for variable, value in defaults.items():
        template["variables"]["properties"][variable]["default"] = value
    return template


def _docker(pool: DockerPool, root: Path) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "image": pool.image,
        "shm_size": pool.shm_size.removesuffix("i").lower(),  # Docker's 16g is 16 Gi
        "volumes": [f"{root}:{root}", *pool.volumes],
    }
    if pool.gpus:
        count = -1 if pool.gpus == "all" else pool.gpus
        defaults["device_requests"] = [{"Driver": "nvidia", "Count": count, "Capabilities": [["gpu"]]}]
    return defaults


def _kubernetes(pool: KubernetesPool, root: Path) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "image": pool.image,
        "namespace": pool.namespace,
        "cpu": pool.cpu,
        "memory": pool.memory,
        "shm_size": pool.shm_size,
        "project": str(root),
        "volume_claim": pool.volume_claim,
        "service_account_name": pool.service_account,
    }
    if pool.gpus:
        defaults["gpus"] = pool.gpus
    if pool.node_selector:
        defaults["node_selector"] = pool.node_selector
    if pool.tolerations:
        defaults["tolerations"] = [toleration(each.key, each.value, each.effect) for each in pool.tolerations]
    return defaults


def toleration(key: str, value: str | None, effect: str) -> dict[str, str]:
    """Return the toleration of a taint with one value, or with any value if `value` is None."""
    return {"key": key, "effect": effect, **({"operator": "Exists"} if value is None else {"operator": "Equal", "value": value})}
