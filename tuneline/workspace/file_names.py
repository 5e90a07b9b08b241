"""Names of the files by which programs, runs and reports find one another's output.

Files of libraries, such as PEFT's adapter_config.json, have their names where they are written; `protocol.py` has the contents of the
messages, docs/caching.md what is in a payload.
"""

from __future__ import annotations

# In a work folder.
REQUEST, EVENTS, RESULT, FAILURE = "request.json", "events.jsonl", "result.json", "failure.json"
LOG = "log.txt"
"""Output of the program's first process."""
ENGINE_LOG = "engine.log"
"""Output of vLLM."""
ATTEMPTS = "attempts.json"
"""Failed attempts at the key (`flows/run/attempts.py`)."""
TRACKERS = "trackers.json"
"""The training's name, ids and links in trackers (`tracked.py`)."""
RENDEZVOUS = "rendezvous.json"
"""Where the first machine of a training waits for the others (`tasks/launch.py`)."""

# In an artifact.
MANIFEST, PAYLOAD, META = "manifest.json", "payload", "meta"

# In meta/, beside LOG and EVENTS.
HISTORY = "history.jsonl"
"""Figures of a training's steps, under TRL's names."""
ROLLOUTS = "rollouts.jsonl"
"""Completions of a training by rewards, with their rewards. In the work folder while it runs."""
SAMPLES = "samples.jsonl"
"""Answers of an evaluation, with their scores."""
REPORT_TEXT, REPORT_DATA = "report.md", "report.json"
"""The program's report as markdown, and its figures for the run's page."""

# In an exported folder.
CARD, SBOM = "README.md", "sbom.cdx.json"
BASE = "base"
"""Folder with the base of an adapter, and its name in adapter_config.json."""
