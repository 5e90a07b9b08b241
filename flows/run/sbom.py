"""Write the bill of materials of an exported model (CycloneDX 1.6, an ML-BOM) from manifests: models, datasets and libraries, with the
hashes of their files, and what was made from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from tuneline.kinds.export import ExportStage
from tuneline.workspace.artifact import Manifest
from tuneline.workspace.cards import license_name

TYPES = {"Model": ComponentType.MACHINE_LEARNING_MODEL, "Adapter": ComponentType.MACHINE_LEARNING_MODEL, "Dataset": ComponentType.DATA}
HUB = "https://huggingface.co/"


def bill_of_materials(stage: ExportStage, names: Mapping[str, str], manifests: Mapping[str, Manifest]) -> str:
    """Return the document as JSON. `names`: of stages by `kind/key`; `manifests`: by the same, each after what it was made from."""
    components: dict[str, Component] = {}
    libraries: dict[str, Component] = {}
    bom = Bom()
    for artifact, manifest in manifests.items():
        if manifest.type not in TYPES:
            continue
        component = components[artifact] = _artifact(names[artifact], manifest)
        used = [libraries.setdefault(f"{name} {v}", _library(name, v)) for name, v in manifest.document.get("libraries", {}).items()]
        parents = [components[parent] for parent in manifest.parents.values() if parent in components]
        if names[artifact] == stage.of:
            component.licenses.update([LicenseFactory().make_from_string(stage.license)] if stage.license else [])
            changes = {"merged": stage.merge and "into its base", "dtype": stage.dtype != "auto" and stage.dtype}
            component.properties.update(Property(name=f"tuneline:export:{name}", value=text) for name, text in changes.items() if text)
            bom.metadata.component = component
            bom.serial_number = uuid5(NAMESPACE_URL, manifest.digest)
        else:
            bom.components.add(component)
        bom.components.update(used)
        bom.register_dependency(component, [*parents, *used])
    return str(JsonV1Dot6(bom).output_as_string(indent=1)) + "\n"


def _artifact(name: str, manifest: Manifest) -> Component:
    """Return an artifact as a component. Its hash is the digest: the sha256 over the names and hashes of its files."""
    config: dict[str, Any] = manifest.document.get("config", {})
    repositories = [(config["hub"], "")] if "hub" in config else []
    repositories += [(source["repo"], "datasets/") for source in config.get("sources", ()) if "repo" in source]
    recorded = [manifest.info.get("license"), *manifest.info.get("licenses", {}).values()]
    licenses = {known for each in recorded if (known := license_name(each))}
    return Component(
        bom_ref=f"{manifest.kind}/{manifest.key}",
        type=TYPES[manifest.type],
        name=name,
        version=manifest.digest[:16],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=manifest.digest)],
        licenses=[LicenseFactory().make_from_string(each) for each in sorted(licenses)],
        external_references=[
            ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(f"{HUB}{folder}{repository}"))
            for repository, folder in repositories
        ],
        properties=[
            Property(name="tuneline:kind", value=manifest.kind),
            *(Property(name=f"tuneline:commit:{field}", value=commit) for field, commit in manifest.document.get("commits", {}).items()),
            *(Property(name=f"tuneline:file:{file.path}", value=f"sha256:{file.sha256}") for file in manifest.files),
        ],
    )


def _library(name: str, version: str) -> Component:
    package = PackageURL("pypi", name=name, version=version)
    return Component(bom_ref=str(package), type=ComponentType.LIBRARY, name=name, version=version, purl=package)
