"""The command `tuneline export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import click

from flows.commands.exits import REFUSED
from flows.commands.names import stages_of
from flows.commands.options import RunOptions, file_option, json_option, load_with_warnings, print_json, say, set_option, var_option, warn
from flows.commands.refusals import refusals_of_programs
from tuneline.kinds.export import ExportStage

DTYPES = get_args(ExportStage.model_fields["dtype"].annotation)


@click.command("export")
@click.argument("what", metavar="PIPELINE/STAGE", shell_complete=stages_of)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@file_option
@set_option
@var_option
@click.option("--merge", is_flag=True, default=None, help="Merge an adapter into its base.")
@click.option("--adapter-only", is_flag=True, default=None, help="Leave out the base of an adapter.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Data type of the exported weights. By default as they are.")
@click.option("--license", metavar="NAME", help="License for the model card, such as apache-2.0. By default the base's, if known.")
@click.option("--sbom", is_flag=True, help="Also write a bill of materials, sbom.cdx.json (CycloneDX).")
@click.option("--push", metavar="OWNER/NAME", help="Push the folder to this repository on the hub. HF_TOKEN is the token.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to. By default main.")
@click.option("--public", is_flag=True, help="Push to a public repository; one that the push creates is public.")
@click.option("--force", is_flag=True, help="Replace DIR whatever it holds.")
@json_option
def export_command(
    what: str, folder: Path, file: Path, sets: tuple[str, ...], variables: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Export a model or an adapter for transformers, PEFT and vLLM.

    Writes weights, tokenizer, chat template, generation config and a model card. STAGE made the model, or is of kind export. DIR must be
    missing, empty or an earlier export, which is replaced.
    """
    from flows.run.export import Job, export, export_stage, inputs_of, not_in_card, refusals
    from flows.run.export_target import check_target
    from flows.run.hub import Hub
    from tuneline.planning.plan import plan
    from tuneline.workspace.workspace import Workspace

    pipeline, _, name = what.partition("/")
    if not name:
        raise click.UsageError(f"found `{what}` without a stage, expected PIPELINE/STAGE")
    workspace = Workspace(load_with_warnings(file, pipeline, RunOptions(sets, variables)), warn, Hub())
    stages = workspace.loaded.pipeline(pipeline).stages
    with_sbom = given.pop("sbom")
    target = check_target(folder, given.pop("force"), workspace)
    given["private"] = False if given.pop("public") else None
    rows = plan(workspace, pipeline)
    built = {row.stage: row.artifact for row in rows if row.artifact is not None}
    stage = export_stage(stages, name, built, {field: value for field, value in given.items() if value is not None})
    job = Job(workspace, pipeline, stage, inputs_of(stage, rows, pipeline), target, with_sbom)
    for evaluation in not_in_card(stages, name, stage):
        warn(f"the card lacks `{evaluation}`, which is not built: `tuneline run {pipeline} --only {evaluation}` builds it")
    unmet = list(refusals(stages, rows))
    if refused := [f"{gate}: {reason}" for gate, _, reason in unmet if gate in stage.needs]:
        say("\n".join(refused))
        sys.exit(REFUSED)
    for gate, judged, reason in unmet:
        if judged in (stage.of, *stage.evaluations):
            warn(f"the gate `{gate}` refuses what is exported: {reason}")
    with refusals_of_programs():
        result = export(job, lambda line: None, lambda event: warn(event.message or "") if event.type == "warning" else None)
    pushed = result.info.get("pushed")
    if as_json:
        print_json({"folder": str(target), "metrics": result.metrics, "pushed": pushed})
        return
    click.echo(folder)
    if pushed:
        click.echo(pushed["url"])
    say(f"exported {pipeline}/{stage.of}, {result.metrics['files']:.0f} files, {result.metrics['bytes']:,.0f} bytes")
