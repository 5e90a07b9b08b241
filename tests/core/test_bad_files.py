"""Every kind of broken pipelines.yaml, and the exact message that a user gets for it.

Each row is `kind: (text of GOOD to replace, replacement, the whole message)`. Before you change a message, read it as a user
who made the mistake: the place, what was found, what is expected, what to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from load_tools import GOOD, load_text

from tuneline.config.load import load
from tuneline.config.messages import FORMS
from tuneline.config.schedules import check_schedules
from tuneline.config.spec import Spec
from tuneline.config.yaml_source import MAX_BYTES, parse, read
from tuneline.errors import ConfigError

POOLED = """\
pools: {gpu: {type: process, queues: {interactive: {priority: 1}, nightly: {priority: 10}}}}
pipelines:
  demo:
"""


# fmt: off
BAD = {
    'duplicate key': ('version: 1', 'version: 1\nversion: 1', 'p.yaml:2:1: version: found `version` twice, first in line 1\n\nhint: keep one of them'),
    'duplicate key nested': ('      merged:', '      sft: {kind: merge, adapters: [sft]}\n      merged:', 'p.yaml:9:7: demo.sft: found `sft` twice, first in line 8\n\nhint: keep one of them'),
    'duplicate flow': ('global_batch_size: 8', 'global_batch_size: 8, model: merged', 'p.yaml:8:99: demo.sft.model: found `model` twice, first in line 8\n\nhint: keep one of them'),
    'tab': ('vars:', '\tvars:', 'p.yaml:2:1: found a tab, expected spaces\n\nhint: indent with spaces, not tabs'),
    'empty': (GOOD, '', 'p.yaml:1:1: the file is empty\n\nhint: run `tuneline init` in an empty folder to create a file to start from'),
    'only comments': (GOOD, '# nothing\n  # here\n', 'p.yaml:1:1: the file is empty\n\nhint: run `tuneline init` in an empty folder to create a file to start from'),
    'list file': (GOOD, '- a\n- b\n', 'p.yaml:1:1: found a list, expected a mapping with version, pipelines, ...\n\nhint: run `tuneline init` in an empty folder to create a file to start from'),
    'scalar file': (GOOD, 'demo\n', "p.yaml:1:1: found 'demo', expected a mapping with version, pipelines, ...\n\nhint: run `tuneline init` in an empty folder to create a file to start from"),
    'self alias': (GOOD, 'a: &a [*a]\n', 'p.yaml:1:4: a.0.0.0.0.0: found more than 40 levels of nesting\n\nhint: reduce nesting and aliases; an alias inside its own anchor never ends'),
    'python tag': ('version: 1', 'version: !!python/name:os.system 1', 'p.yaml:1:10: version: found the tag !!python/name:os.system, expected plain YAML without tags\n\nhint: remove the tag'),
    'python object': ('path: models/base', 'path: !!python/object/apply:os.system [ls]', 'p.yaml:6:35: demo.base.path: found the tag !!python/object/apply:os.system, expected plain YAML without tags\n\nhint: remove the tag'),
    'own tag': ('version: 1', 'version: !env 1', 'p.yaml:1:10: version: found the tag !env, expected plain YAML without tags\n\nhint: remove the tag'),
    'int tag on text': ('version: 1', 'version: !!int one', 'p.yaml:1:10: version: found the tag !!int, expected plain YAML without tags\n\nhint: remove the tag'),
    'set tag': ('[sft]', '!!set {sft}', 'p.yaml:9:39: demo.merged.adapters: found the tag !!set, expected plain YAML without tags\n\nhint: remove the tag'),
    'binary': ('rows.jsonl', '!!binary aGk=', 'p.yaml:7:61: demo.data.sources.0.path: found the tag !!binary, expected plain YAML without tags\n\nhint: remove the tag'),
    'nul escaped': ('rows.jsonl', '"rows\\0.jsonl"', 'p.yaml:7:61: demo.data.sources.0.path: found the control character U+0000\n\nhint: remove it: the file must be plain text'),
    'escape seq': ('rows.jsonl', '"\\e[31mrows"', 'p.yaml:7:61: demo.data.sources.0.path: found the control character U+001B\n\nhint: remove it: the file must be plain text'),
    'surrogate': ('rows.jsonl', '"\\uD800"', 'p.yaml:7:61: demo.data.sources.0.path: found the control character U+D800\n\nhint: remove it: the file must be plain text'),
    'surrogate key': ('rows.jsonl', 'x, "\\uD800": 1', 'p.yaml:7:64: demo.data.sources.0: found the control character U+D800\n\nhint: remove it: the file must be plain text'),
    'raw control': ('rows.jsonl', 'ro\x07ws', 'p.yaml:7:63: found the control character U+0007\n\nhint: remove it: the file must be plain text'),
    'second document': ('pipelines:', '---\npipelines:', 'p.yaml:3:1: found a second document after `---`, expected one\n\nhint: write every pipeline under one `pipelines:`'),
    'directive': ('version: 1', '%YAML 2.0\n---\nversion: 1', 'p.yaml:1:1: this is not YAML: found incompatible YAML document (version 1.* is required)\n\nhint: check brackets, quotes and indentation near this line'),
    'merge key without mapping': ('{kind: merge,', '{<<: 3, kind: merge,', 'p.yaml:9:20: demo.merged: found a merge key `<<` without a mapping\n\nhint: write `<<: *anchor`'),
    'merge list bad': ('{kind: merge,', '{<<: [sft], kind: merge,', 'p.yaml:9:21: demo.merged: found a merge key `<<` without a mapping\n\nhint: write `<<: *anchor`'),
    'undefined alias': ('model: base', 'model: *base', 'p.yaml:8:34: found an alias (`*name`) without its anchor\n\nhint: define `&name` before it, or put quotes around text with a `*`'),
    'anchor twice': ('model: base', 'model: &x base, description: &x y', 'p.yaml:8:56: found an anchor (`&name`) twice\n\nhint: give each anchor its own name'),
    'huge int': ('global_batch_size: 8', 'global_batch_size: 999999999999999999999999999999', 'p.yaml:8:96: demo.sft.global_batch_size: found a whole number of 30 digits, expected at most 18\n\nhint: put quotes around it if it is text'),
    'very huge int': ('global_batch_size: 8', "global_batch_size: " + "9" * 5000, 'p.yaml:8:96: demo.sft.global_batch_size: found a whole number of 5000 digits, expected at most 18\n\nhint: put quotes around it if it is text'),
    'nan': ('test: 0.1', 'test: .nan', 'p.yaml:7:89: demo.data.split.test: found .nan, expected finite numbers\n\nhint: put quotes around it if it is text'),
    'inf2': ('global_batch_size: 8', 'learning_rate: 1e999', 'p.yaml:8:92: demo.sft.learning_rate: found 1e999, expected finite numbers\n\nhint: put quotes around it if it is text'),
    'date': ('test: 0.1', 'test: 2024-01-01', "p.yaml:7:89: demo.data.split.test: found '2024-01-01', expected a number\n\nhint: write plain decimals, such as 1000 or 1e-4"),
    'octal': ('global_batch_size: 8', 'global_batch_size: 0o10', "p.yaml:8:96: demo.sft.global_batch_size: found '0o10', expected a whole number\n\nhint: write plain decimals, such as 1000 or 1e-4"),
    'hex': ('global_batch_size: 8', 'global_batch_size: 0x10', "p.yaml:8:96: demo.sft.global_batch_size: found '0x10', expected a whole number\n\nhint: write plain decimals, such as 1000 or 1e-4"),
    'underscore': ('global_batch_size: 8', 'global_batch_size: 1_000', "p.yaml:8:96: demo.sft.global_batch_size: found '1_000', expected a whole number\n\nhint: write plain decimals, such as 1000 or 1e-4"),
    'sexagesimal': ('kind: merge', 'timeout: 1:30:00, kind: merge', "p.yaml:9:25: demo.merged.timeout: found '1:30:00', expected a whole number\n\nhint: write plain decimals, such as 1000 or 1e-4"),
    'yes': ('global_batch_size: 8', 'packing: yes', "p.yaml:8:86: demo.sft.packing: found 'yes', expected true or false\n\nhint: write `true`"),
    'null stage': ('{kind: merge, adapters: [sft]}', '', "p.yaml:9:14: demo.merged: found nothing, expected a mapping\n\nhint: write `kind: ...` and the stage's other fields below its name, indented"),
    'text stage': ('{kind: merge, adapters: [sft]}', 'merge', "p.yaml:9:15: demo.merged: found 'merge', expected a mapping\n\nhint: write `kind: merge` and the stage's other fields below its name, indented"),
    'list stage': ('{kind: merge, adapters: [sft]}', '[merge]', 'p.yaml:9:15: demo.merged: found a list, expected a mapping'),
    'list stages': ('    stages:\n', '    stages: [a, b]\n    stagez:\n', 'p.yaml:5:13: demo.stages: found a list, expected a mapping\n\nhint: write `NAME: {kind: ...}`\n\np.yaml:6:5: demo.stagez: found the unknown field `stagez`, expected description, salt, parallel, pool, queue, concurrency, tags, schedules, track, stages\n\nhint: did you mean `stages`?'),
    'list pipelines': (GOOD, 'version: 1\npipelines: [a]\n', 'p.yaml:2:12: pipelines: found a list, expected a mapping\n\nhint: write `NAME: {stages: ...}`'),
    'null pipelines': (GOOD, 'version: 1\npipelines:\n', 'p.yaml:2:11: pipelines: found nothing, expected a mapping\n\nhint: write its content below it, indented, or remove it'),
    'no pipelines': (GOOD, 'version: 1\n', 'p.yaml:1:1: pipelines: found nothing, expected a value (Pipelines by name)\n\nhint: add `pipelines: {demo: {stages: {base: {kind: model, hub: owner/name}}}}`'),
    'empty pipelines': (GOOD, 'version: 1\npipelines: {}\n', 'p.yaml:2:12: pipelines: found an empty mapping, expected at least 1'),
    'null pipeline': (GOOD, 'version: 1\npipelines:\n  demo:\n', 'p.yaml:3:8: demo: found nothing, expected a mapping\n\nhint: write its content below it, indented, or remove it'),
    'null stages': (GOOD, 'version: 1\npipelines:\n  demo:\n    stages:\n', 'p.yaml:4:12: demo.stages: found nothing, expected a mapping\n\nhint: write its content below it, indented, or remove it'),
    'empty stages': (GOOD, 'version: 1\npipelines: {demo: {stages: {}}}\n', 'p.yaml:2:28: demo.stages: found an empty mapping, expected at least 1'),
    'int key': ('      merged:', '      1: {kind: merge, adapters: [sft]}\n      merged:', 'p.yaml:9:7: demo.stages: found `1` as a key, expected text\n\nhint: put quotes around it if it is a name'),
    'bool key': ('      merged:', '      true: {kind: merge, adapters: [sft]}\n      merged:', 'p.yaml:9:7: demo.stages: found `true` as a key, expected text\n\nhint: put quotes around it if it is a name'),
    'null key': ('      merged:', '      ~: {kind: merge, adapters: [sft]}\n      merged:', 'p.yaml:9:7: demo.stages: found `~` as a key, expected text\n\nhint: put quotes around it if it is a name'),
    'list key': ('      merged:', '      [a]: {kind: merge, adapters: [sft]}\n      merged:', 'p.yaml:9:7: demo.stages: found a list or mapping as a key, expected text\n\nhint: put quotes around it if it is a name'),
    'open bracket': ('adapters: [sft]', 'adapters: [sft', 'p.yaml:9:43: found `}`, expected `,` or `]` in the list that begins in line 9\n\nhint: check brackets, commas and quotes from there on'),
    'open brace last': ('at_least: 0.5}]}', 'at_least: 0.5}]', 'p.yaml:12:90: found no `}` at the end of line 12, expected one for its `{` in column 15\n\nhint: close it there; check commas and quotes from the opening bracket on'),
    'open quote': ('models/base', '"models/base', 'p.yaml:6:35: found a quote that is never closed\n\nhint: close it; inside single quotes, write a single quote twice'),
    'extra bracket': ('adapters: [sft]', 'adapters: [sft]]', 'p.yaml:9:44: found `]`, expected `,` or `}` in the mapping that begins in line 9\n\nhint: check brackets, commas and quotes from there on'),
    'colon in text': ('{kind: merge, adapters: [sft]}\n', '\n        kind: merge\n        description: a: b\n        adapters: [sft]\n', 'p.yaml:11:23: found a `:` that does not end a key\n\nhint: put quotes around text that contains `: `; check the indentation'),
    'indent': ('      merged:', '     merged:', 'p.yaml:9:6: found line 9 indented by 5 spaces, expected 6, as the other fields of `stages` (line 8)\n\nhint: start all fields of a mapping in the same column'),
    'indent2': ('      merged:', '       merged:', 'p.yaml:9:8: found line 9 indented by 7 spaces, expected 6, as the other fields of `stages` (line 8)\n\nhint: start all fields of a mapping in the same column'),
    'at': ('models/base', '@models', 'p.yaml:6:35: found a character that cannot start a YAML value\n\nhint: put quotes around text that starts with @, ` or %'),
    'backslash': ('models/base', '"C:\\models"', 'p.yaml:6:39: found an invalid backslash escape\n\nhint: use single quotes, in which a backslash is a plain character'),
    'missing colon in a block': ('{kind: merge, adapters: [sft]}\n', '\n        kind: merge\n        adapters: [sft]\n        retries 3\n', 'p.yaml:12:9: found a key without `:`\n\nhint: write `key: value`; check quotes and indentation near this line'),
    'quote to the end': ('models/base', "'models/base", 'p.yaml:6:35: found a quote that is never closed\n\nhint: close it; inside single quotes, write a single quote twice'),
    'path at home': ('models/base', '~/base', "p.yaml:6:35: demo.base.path: found '~/base', expected a path inside the folder of the file\n\nhint: add `roots: ['~']` at the top of the file"),
    'of another tool': ('global_batch_size: 8', 'lr: 0.1', 'p.yaml:8:77: demo.sft.lr: found the unknown field `lr`, expected a field of sft\n\nhint: write `learning_rate`'),
    'missing colon': ('vars: {rank: 16}', 'vars {rank: 16}', 'p.yaml:2:1: vars {rank: found the unknown field `vars {rank`, expected version, store, roots, history, vars, runtimes, pools, pipelines\n\np.yaml:8:65: demo.sft.lora.r: found the unknown variable ${rank}, expected none (none is defined)\n\nhint: declare it under `vars:`'),
    'deep': (GOOD, "a: " + "[" * 500 + "]" * 500, 'p.yaml:1:1: found more than 40 levels of nesting\n\nhint: reduce the nesting'),
    'unknown key': ('adapters: [sft]', 'adaptors: [sft]', 'p.yaml:9:7: demo.merged.adapters: found nothing, expected a value (Adapter to merge; its base model is found automatically)\n\nhint: add `adapters: [sft]`\n\np.yaml:9:29: demo.merged.adaptors: found the unknown field `adaptors`, expected kind, description, needs, retries, timeout, runtime, resources, pool, seed, adapters, dtype, max_shard_size\n\nhint: did you mean `adapters`?'),
    'unknown key top': ('vars:', 'var: {}\nvars:', 'p.yaml:2:1: var: found the unknown field `var`, expected version, store, roots, history, vars, runtimes, pools, pipelines\n\nhint: did you mean `vars`?'),
    'unknown key pipeline': ('    stages:', '    stagez: {}\n    stages:', 'p.yaml:5:5: demo.stagez: found the unknown field `stagez`, expected description, salt, parallel, pool, queue, concurrency, tags, schedules, track, stages\n\nhint: did you mean `stages`?'),
    'no tracker': ('    stages:', '    track: {}\n    stages:', 'p.yaml:5:5: demo.track: found no tracker, expected tensorboard, wandb, mlflow, trackio\n\nhint: write for example `tensorboard: {}`'),
    'null tracker': ('    stages:', '    track: {tensorboard: }\n    stages:', 'p.yaml:5:25: demo.track.tensorboard: found nothing, expected the settings of the tracker\n\nhint: write `tensorboard: {}` for the defaults'),
    'tracker in the cloud': ('    stages:', '    track: {tensorboard: {log_dir: "gs://a"}}\n    stages:', 'p.yaml:5:36: demo.track.tensorboard.log_dir: found `gs://a`, expected a folder\n\nhint: mount the storage and name its folder'),
    'tracker without server': ('    stages:', '    track: {mlflow: {tracking_uri: "sqlite:///ml.db"}}\n    stages:', 'p.yaml:5:36: demo.track.mlflow.tracking_uri: found `sqlite:///ml.db`, expected the address of a server, such as http://localhost:5000, or databricks\n\nhint: `mlflow server` starts one; for files without a server, use `tensorboard: {}`'),
    'tracker with password': ('    stages:', '    track: {mlflow: {tracking_uri: "http://me:pw@ml"}}\n    stages:', 'p.yaml:5:36: demo.track.mlflow.tracking_uri: found a password in the address, expected none: it would be visible in requests and reports\n\nhint: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment'),
    'tracker without training': (GOOD, 'version: 1\npipelines: {demo: {track: {wandb: {}}, stages: {base: {kind: model, path: models/base}}}}\n', 'p.yaml:2:20: demo.track: found trackers in a pipeline without a training, which show nothing\n\nhint: remove `track:`'),
    'unknown key nested': ('r: "${rank}"', 'r: "${rank}", alpha: 3', 'p.yaml:8:76: demo.sft.lora.alpha: found the unknown field `alpha`, expected a field of `lora`\n\nhint: write `lora_alpha`'),
    'unknown key source': ('rows.jsonl', 'rows.jsonl, kolumns: {}', 'p.yaml:7:73: demo.data.sources.0.kolumns: found the unknown field `kolumns`, expected type, max_rows, repeat, weight, path, format, columns, system, on_bad_row\n\nhint: did you mean `columns`?'),
    'unknown key gate': ('at_least: 0.5', 'at_least: 0.5, of_: x', 'p.yaml:12:90: demo.gate.require.0.of_: found the unknown field `of_`, expected metric, of, at_least, at_most, improves_on, by, not_below, tolerance\n\nhint: did you mean `of`?'),
    'key of another kind': ('kind: merge', 'kind: merge, learning_rate: 1', 'p.yaml:9:29: demo.merged.learning_rate: found the unknown field `learning_rate`, expected a field of merge\n\nhint: it is a field of sft and dpo and kto and grpo'),
    'kind misspelt': ('kind: merge', 'kind: merg', "p.yaml:9:22: demo.merged.kind: found 'merg', expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate\n\nhint: did you mean `merge`?"),
    'kind list': ('kind: merge', 'kind: [merge]', 'p.yaml:9:22: demo.merged.kind: found a list, expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate'),
    'kind null': ('kind: merge', 'kind:', 'p.yaml:9:21: demo.merged.kind: found nothing, expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate'),
    'kind number': ('kind: merge', 'kind: 3', 'p.yaml:9:22: demo.merged.kind: found 3, expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate'),
    'no kind': ('kind: merge, ', '', 'p.yaml:9:7: demo.merged: found no `kind`, expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate\n\nhint: add `kind: merge`'),
    'no type': ('type: files, ', '', 'p.yaml:7:41: demo.data.sources.0: found no `type`, expected files, hub, reasoning_gym, code\n\nhint: add `type: files` or `type: code`'),
    'type misspelt': ('type: files', 'type: file', "p.yaml:7:48: demo.data.sources.0.type: found 'file', expected files, hub, reasoning_gym, code\n\nhint: did you mean `files`?"),
    'version absent': ('version: 1\n', '', 'p.yaml:1:1: version: found nothing, expected a value (Version of this file format)\n\nhint: add `version: 1`'),
    'version text': ('version: 1', 'version: "1"', "p.yaml:1:10: version: found '1', expected 1\n\nhint: remove the quotes"),
    'version 2': ('version: 1', 'version: 2', 'p.yaml:1:10: version: found 2, expected 1\n\nhint: write `version: 1`'),
    'text for number': ('global_batch_size: 8', 'learning_rate: fast', "p.yaml:8:92: demo.sft.learning_rate: found 'fast', expected a number"),
    'float for int': ('global_batch_size: 8', 'max_steps: 4.5', 'p.yaml:8:88: demo.sft.max_steps: found 4.5, expected a whole number'),
    'number for text': ('models/base', '7', 'p.yaml:6:35: demo.base.path: found 7, expected text\n\nhint: put quotes around it'),
    'number revision': ('path: models/base', 'hub: a/b, revision: 1234567', 'p.yaml:6:49: demo.base.revision: found 1234567, expected text\n\nhint: put quotes around it'),
    'exp revision': ('path: models/base', 'hub: a/b, revision: 12e45678', 'p.yaml:6:49: demo.base.revision: found 12e45678, expected finite numbers\n\nhint: put quotes around it if it is text'),
    'bool for text': ('models/base', 'true', 'p.yaml:6:35: demo.base.path: found true, expected text\n\nhint: put quotes around it'),
    'text for list': ('adapters: [sft]', 'adapters: sft', "p.yaml:9:39: demo.merged.adapters: found 'sft', expected a list\n\nhint: write `[sft]`"),
    'text for mapping': ('split: {test: 0.1}', 'split: 0.1', 'p.yaml:7:82: demo.data.split: found 0.1, expected a mapping\n\nhint: write `{test: 0.1}`'),
    'list for mapping': ('split: {test: 0.1}', 'split: [0.1]', 'p.yaml:7:82: demo.data.split: found a list, expected a mapping\n\nhint: write `{test: 0.1}`'),
    'mapping for text': ('models/base', '{a: b}', 'p.yaml:6:35: demo.base.path: found a mapping, expected text'),
    'null for text list': ('adapters: [sft]', 'adapters: [~]', 'p.yaml:9:40: demo.merged.adapters.0: found nothing, expected text'),
    'nested list': ('adapters: [sft]', 'adapters: [[sft]]', 'p.yaml:9:40: demo.merged.adapters.0: found a list, expected text'),
    'empty list': ('adapters: [sft]', 'adapters: []', 'p.yaml:9:39: demo.merged.adapters: found an empty list, expected at least 1'),
    'too many': ('adapters: [sft]', 'adapters: [sft, sft]', 'p.yaml:9:39: demo.merged.adapters: found a list of 2, expected at most 1'),
    'below': ('r: "${rank}"', 'r: 0, lora_alpha: "${rank}"', 'p.yaml:8:65: demo.sft.lora.r: found 0, expected at least 1'),
    'above': ('test: 0.1', 'test: 1.5', 'p.yaml:7:89: demo.data.split.test: found 1.5, expected below 1'),
    'negative': ('global_batch_size: 8', 'global_batch_size: -8', 'p.yaml:8:96: demo.sft.global_batch_size: found -8, expected at least 1'),
    'choice': ('calibration: data', 'calibration: data, bits: 5', 'p.yaml:10:72: demo.gptq.bits: found 5, expected 2, 3, 4, 8'),
    'choice text': ('global_batch_size: 8', 'dtype: fp16', "p.yaml:8:84: demo.sft.dtype: found 'fp16', expected auto, float32, bfloat16\n\nhint: write `bfloat16`: float16 is not offered"),
    'form': ('kind: merge', 'kind: merge, max_shard_size: 5 GB', "p.yaml:9:45: demo.merged.max_shard_size: found '5 GB', expected a size such as 500MB or 5GB\n\nhint: write `5GB`"),
    'target': ('lora: {', 'lora: {target_modules: all, ', "p.yaml:8:78: demo.sft.lora.target_modules: found the name all, expected a list of names, all-linear, attention, mlp, attention+mlp or a regular expression that matches full names\n\nhint: write `target_modules: all-linear`"),
    'vars list': ('vars: {rank: 16}', 'vars: [rank]', 'p.yaml:2:7: vars: found a list, expected a mapping\n\nhint: write `{NAME: VALUE}`\n\np.yaml:8:65: demo.sft.lora.r: found the unknown variable ${rank}, expected none (none is defined)\n\nhint: declare it under `vars:`'),
    'vars nested': ('vars: {rank: 16}', 'vars: {rank: {a: 1}}', 'p.yaml:2:14: vars.rank: found a mapping, expected true or false or a whole number or a number or text'),
    'vars null': ('vars: {rank: 16}', 'vars: {rank: }', 'p.yaml:2:13: vars.rank: found nothing, expected true or false or a whole number or a number or text'),
    'needs text': ('kind: merge', 'kind: merge, needs: data', "p.yaml:9:36: demo.merged.needs: found 'data', expected a list\n\nhint: write `[data]`"),
    'unknown stage': ('of: eval', 'of: evil', 'p.yaml:12:69: demo.gate.require.0.of: found the unknown stage `evil`, expected another stage: base, data, sft, merged, gptq, eval\n\nhint: did you mean `eval`?'),
    'unknown stage 2': ('dataset: data', 'dataset: dat', 'p.yaml:8:49: demo.sft.dataset: found the unknown stage `dat`, expected a stage that gives a Dataset: data\n\nhint: did you mean `data`?'),
    'wrong artifact': ('model: merged', 'model: data', 'p.yaml:10:39: demo.gptq.model: found `data`, which gives a Dataset, expected a stage that gives a Model: base, merged'),
    'wrong artifact adapter': ('adapters: [sft]', 'adapters: [base]', 'p.yaml:9:40: demo.merged.adapters.0: found `base`, which gives a Model, expected a stage that gives an Adapter: sft'),
    'wrong artifact eval': ('model: sft,', 'model: data,', 'p.yaml:11:39: demo.eval.model: found `data`, which gives a Dataset, expected a stage that gives a Model or an Adapter: base, sft, merged, gptq'),
    'itself': ('model: base', 'model: sft', 'p.yaml:8:34: demo.sft.model: found the stage itself, expected a stage that gives a Model: base, merged, gptq'),
    'longer name': ('      base:  ', '      base-model:', 'p.yaml:8:34: demo.sft.model: found the unknown stage `base`, expected a stage that gives a Model: base-model, merged, gptq\n\nhint: did you mean `base-model`?'),
    'only one': ('      data:  ', '      rows:  ', 'p.yaml:8:49: demo.sft.dataset: found the unknown stage `data`, expected a stage that gives a Dataset: rows\n\nhint: write `rows`, the only such stage\n\np.yaml:10:60: demo.gptq.calibration: found the unknown stage `data`, expected a stage that gives a Dataset: rows\n\nhint: write `rows`, the only such stage\n\np.yaml:11:55: demo.eval.datasets.0: found the unknown stage `data`, expected a stage that gives a Dataset: rows\n\nhint: write `rows`, the only such stage'),
    'kind of another tool': ('kind: sft', 'kind: ppo', "p.yaml:8:22: demo.sft.kind: found 'ppo', expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate\n\nhint: tuneline has none yet; its reinforcement learning is `grpo`, on reward functions instead of a reward model"),
    'float of a whole number': ('global_batch_size: 8', 'global_batch_size: 1e3', 'p.yaml:8:96: demo.sft.global_batch_size: found 1000.0, expected a whole number\n\nhint: write `1000`'),
    'float in quotes': ('global_batch_size: 8', 'global_batch_size: "1e3"', "p.yaml:8:96: demo.sft.global_batch_size: found '1e3', expected a whole number\n\nhint: write `1000`"),
    'cycle by needs and fields': ('adapters: [sft]', 'adapters: [sft], needs: [gptq]', 'p.yaml:9:7: demo.merged: found a cycle: merged -> gptq -> merged\n\nhint: remove `gptq` from `needs` of `merged`'),
    'datasets alone': ('datasets: [data]', 'datasets: [data], num_fewshot: 2, apply_chat_template: false', 'p.yaml:11:75: demo.eval.num_fewshot: found num_fewshot, apply_chat_template without benchmarks: they have no effect\n\nhint: remove them'),
    'cycle2': ('model: base', 'model: merged', 'p.yaml:8:7: demo.sft: found a cycle: sft -> merged -> sft\n\nhint: name another stage in one of sft.model, merged.adapters.0'),
    'cycle3': ('kind: dataset', 'kind: dataset, model: gptq', 'p.yaml:7:7: demo.data: found a cycle: data -> gptq -> merged -> sft -> data\n\nhint: name another stage in one of data.model, gptq.model, merged.adapters.0, sft.dataset'),
    'needs cycle': ('kind: model', 'kind: model, needs: [gate]', 'p.yaml:6:7: demo.base: found a cycle: base -> gate -> eval -> sft -> base\n\nhint: remove `gate` from `needs` of `base`'),
    'needs unknown': ('kind: model', 'kind: model, needs: [bse]', 'p.yaml:6:37: demo.base.needs.0: found the unknown stage `bse`, expected another stage: data, sft, merged, gptq, eval, gate'),
    'quantized again': ('      eval:', '      again:  {kind: quantize, model: gptq, calibration: data}\n      eval:', 'p.yaml:11:39: demo.again.model: found `gptq`, which is quantized, expected a model in full precision\n\nhint: name the model that it was quantized from'),
    'gate metric': ('data/exact_match', 'dta/exact_match', 'p.yaml:12:47: demo.gate.require.0.metric: found `dta/exact_match`, but `eval` scores only data\n\nhint: write `data/exact_match`, for example'),
    'gate unscored': ('datasets: [data]', 'datasets: []', 'p.yaml:11:7: demo.eval: found neither datasets nor benchmarks, expected one or both\n\nhint: add `datasets: [my-data]`'),
    'gate two conditions': ('at_least: 0.5', 'at_least: 0.5, at_most: 1', 'p.yaml:12:38: demo.gate.require.0: found at_least and at_most, expected exactly one of at_least, at_most, improves_on, not_below'),
    'gate no condition': (', at_least: 0.5', '', 'p.yaml:12:38: demo.gate.require.0: found no condition, expected exactly one of at_least, at_most, improves_on, not_below'),
    'gate by alone': ('at_least: 0.5', 'at_least: 0.5, by: 1', 'p.yaml:12:94: demo.gate.require.0.by: found by without improves_on'),
    'adapter of other base': ('      merged:', '      other:  {kind: model, path: models/other}\n      more:   {kind: sft, model: other, dataset: data, adapter: sft}\n      merged:', 'p.yaml:10:65: demo.more.adapter: found `sft`, trained on `base`, expected an adapter of `other`'),
    'two sources': ('path: models/base', 'path: models/base, gguf: x.gguf', 'p.yaml:6:7: demo.base: found path and gguf, expected exactly one of hub, path, gguf'),
    'no source': ('path: models/base', 'description: x', 'p.yaml:6:7: demo.base: found no source, expected exactly one of hub, path, gguf'),
    'revision alone': ('path: models/base', 'path: models/base, revision: v1', 'p.yaml:6:58: demo.base.revision: found a revision without hub\n\nhint: only hub repositories have revisions'),
    'batch': ('global_batch_size: 8', 'global_batch_size: 8, resources: {micro_batch_size: 3}', 'p.yaml:8:96: demo.sft.global_batch_size: found 8, expected multiples of 3 (micro_batch_size 3 x 1 process)\n\nhint: change resources.micro_batch_size: it does not change the result'),
    'batch world': ('global_batch_size: 8', 'global_batch_size: 9, resources: {gpus: 2, micro_batch_size: 2}', 'p.yaml:8:96: demo.sft.global_batch_size: found 9, expected multiples of 4 (micro_batch_size 2 x 2 processes)\n\nhint: change global_batch_size or the number of processes'),
    'processes merge': ('adapters: [sft]', 'adapters: [sft], resources: {gpus: 2}', 'p.yaml:9:64: demo.merged.resources.gpus: found 2 for merge, expected 1\n\nhint: write `gpus: 1`: only trainings and evaluations run in several processes'),
    'early': ('global_batch_size: 8', 'early_stopping: {patience: 2}', 'p.yaml:8:93: demo.sft.early_stopping: found early_stopping without eval_steps\n\nhint: set eval_steps, for example `eval_steps: 20`'),
    'warmup': ('global_batch_size: 8', 'warmup_steps: 0.1, lr_scheduler_type: constant', 'p.yaml:8:115: demo.sft.lr_scheduler_type: found constant with warmup_steps, which it ignores\n\nhint: set `lr_scheduler_type: constant_with_warmup`'),
    'split sum': ('test: 0.1', 'test: 0.5, validation: 0.5', 'p.yaml:7:82: demo.data.split: found 0.5 + 0.5, expected a sum below 1'),
    'max length no model': ('split: {test: 0.1}', 'max_length: 64', 'p.yaml:7:87: demo.data.max_length: found max_length without model\n\nhint: name the model whose tokenizer counts tokens, for example `model: base`'),
    'code without model': ('{type: files, path: rows.jsonl}', '{type: code, path: src}', 'p.yaml:7:41: demo.data.sources.0: found source code without model\n\nhint: name the model whose tokenizer measures chunks, for example `model: base`'),
    'human_eval': ('datasets: [data]', 'datasets: [data], benchmarks: [human_eval]', 'p.yaml:11:75: demo.eval.benchmarks.0: found human_eval without allow_code_execution\n\nhint: set `allow_code_execution: true` to run the code that the model writes, in a sandbox'),
    'trc gguf': ('path: models/base', 'gguf: a.gguf, trust_remote_code: true', 'p.yaml:6:62: demo.base.trust_remote_code: found trust_remote_code with gguf, which holds no code\n\nhint: remove it'),
    'runtime unknown': ('kind: merge', 'kind: merge, runtime: trch', 'p.yaml:9:38: demo.merged.runtime: found `trch`, expected quantize, torch, vllm, vllm-cpu\n\nhint: did you mean `torch`?'),
    'runtime builtin': ('vars:', 'runtimes: {torch: {lock: a.txt}}\nvars:', 'p.yaml:2:12: runtimes.torch: found `torch`, which is built in\n\nhint: choose another name'),
    'runtime both': ('vars:', 'runtimes: {a: {lock: a.txt, python: b}}\nvars:', 'p.yaml:2:12: runtimes.a: found lock and python, expected exactly one of lock, python'),
    'runtime neither': ('vars:', 'runtimes: {a: {}}\nvars:', 'p.yaml:2:12: runtimes.a: found nothing, expected exactly one of lock, python'),
    'runtime null': ('vars:', 'runtimes: {a: }\nvars:', 'p.yaml:2:14: runtimes.a: found nothing, expected a mapping\n\nhint: write its content below it, indented, or remove it'),
    'store url': ('vars:', 'store: s3://x\nvars:', 'p.yaml:2:8: store: found `s3://x`, expected a folder\n\nhint: mount the storage and name its folder'),
    'store number': ('vars:', 'store: 7\nvars:', 'p.yaml:2:8: store: found 7, expected text\n\nhint: put quotes around it'),
    'unknown variable': ('r: "${rank}"', 'r: "${rang}"', 'p.yaml:8:65: demo.sft.lora.r: found the unknown variable ${rang}, expected rank\n\nhint: did you mean `rank`?'),
    'unknown variable no vars': ('vars: {rank: 16}\n', '', 'p.yaml:7:65: demo.sft.lora.r: found the unknown variable ${rank}, expected none (none is defined)\n\nhint: declare it under `vars:`'),
    'unused variable': ('r: "${rank}"', 'r: 8', 'p.yaml:2:8: vars.rank: found the variable `rank`, which is not used\n\nhint: remove it, or use it as ${rank}'),
    'env in stage': ('r: "${rank}"', 'r: "${env:RANK}"', 'p.yaml:8:65: demo.sft.lora.r: found ${env:RANK}, expected only in store, pools, runtimes\n\nhint: use `vars:` and `--var`: a pipeline must not depend on the environment'),
    'env unset': ('vars:', 'store: "${env:NOWHERE}/x"\nvars:', 'p.yaml:2:8: store: found ${env:NOWHERE}, but NOWHERE is not set\n\nhint: export NOWHERE=...'),
    'variable in variable': ('rank: 16', 'rank: 16, a: "${rank}"', "p.yaml:2:18: vars.a: found the variable `a`, which is not used\n\nhint: remove it, or use it as ${a}\n\np.yaml:2:21: vars.a: found '${rank}', expected a value without ${...}\n\nhint: write out the value"),
    'unclosed': ('models/base', '"models/${rank"', 'p.yaml:6:35: demo.base.path: found `${rank` without its `}`\n\nhint: add the `}`, or write `$${` for a plain `${`'),
    'empty variable': ('models/base', '"models/${}"', 'p.yaml:6:35: demo.base.path: found the unknown variable ${}, expected rank\n\nhint: declare it under `vars:`'),
    'variable wrong type': ('rank: 16', 'rank: x', "p.yaml:8:65: demo.sft.lora.r: found 'x', expected a whole number\n\nhint: the value comes from ${rank}, p.yaml:2:14"),
    'name is path': ('      merged:', '      ../../etc: {kind: merge, adapters: [sft]}\n      merged:', 'p.yaml:9:7: demo.../../etc: found the name `../../etc`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `etc`?'),
    'pipeline name is path': ('  demo:', '  a/b:', 'p.yaml:4:3: a/b: found the name `a/b`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `a-b`?'),
    'pipeline dots': ('  demo:', '  ..:', 'p.yaml:4:3: ..: found the name `..`, expected lower-case letters, digits and dashes, at most 63'),
    'upper': ('      merged:', '      Merged:', 'p.yaml:9:7: demo.Merged: found the name `Merged`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `merged`?\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, Merged\n\nhint: did you mean `Merged`?'),
    'dash first': ('      merged:', '      -merged:', 'p.yaml:9:7: demo.-merged: found the name `-merged`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `merged`?\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, -merged\n\nhint: did you mean `-merged`?'),
    'newline name': ('      merged:', '      "merged\\n":', 'p.yaml:9:7: demo.merged\\n: found the name `merged\\n`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `merged`?\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, merged\\n\n\nhint: did you mean `merged\n`?'),
    'name long': ('      merged:', "      " + "m" * 64 + ":", 'p.yaml:9:7: demo.mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm: found the name `mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm`?\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm'),
    'name very long': ('      merged:', "      " + "m" * 900 + ":", 'p.yaml:9:7: demo.mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm... (900 characters): found the name `mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm... (900 characters)`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm`?\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm... (900 characters)'),
    'name empty': ('      merged:', '      "":', 'p.yaml:9:7: demo.: found the name ``, expected lower-case letters, digits and dashes, at most 63\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, '),
    'name unicode': ('      merged:', '      mérged:', 'p.yaml:9:7: demo.mérged: found the name `mérged`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `m-rged`?\n\np.yaml:10:39: demo.gptq.model: found the unknown stage `merged`, expected a stage that gives a Model: base, mérged\n\nhint: did you mean `mérged`?'),
    'runtime name': ('vars:', 'runtimes: {../x: {lock: a.txt}}\nvars:', 'p.yaml:2:12: runtimes.../x: found the name `../x`, expected lower-case letters, digits and dashes, at most 63\n\nhint: did you mean `x`?'),
    'path absolute': ('models/base', '/data/models/base', "p.yaml:6:35: demo.base.path: found '/data/models/base', expected a path inside the folder of the file\n\nhint: add `roots: [/data/models]` at the top of the file"),
    'path climbs': ('models/base', '../models/base', "p.yaml:6:35: demo.base.path: found '../models/base', expected a path inside the folder of the file\n\nhint: add `roots: [../models]` at the top of the file"),
    'path climbs inside': ('models/base', 'models/../../base', "p.yaml:6:35: demo.base.path: found 'models/../../base', expected a path inside the folder of the file\n\nhint: add `roots: [..]` at the top of the file"),
    'path home': ('models/base', '~/models/base', "p.yaml:6:35: demo.base.path: found '~/models/base', expected a path inside the folder of the file\n\nhint: add `roots: [~/models]` at the top of the file"),
    'path home user': ('models/base', '~root/models/base', "p.yaml:6:35: demo.base.path: found '~root/models/base', expected a path inside the folder of the file\n\nhint: add `roots: [~root/models]` at the top of the file"),
    'path glob': ('rows.jsonl', '"../rows/*.jsonl"', "p.yaml:7:61: demo.data.sources.0.path: found '../rows/*.jsonl', expected a path inside the folder of the file\n\nhint: add `roots: [../rows]` at the top of the file"),
    'path glob hidden climb': ('rows.jsonl', '"rows/*/../../../*.jsonl"', "p.yaml:7:61: demo.data.sources.0.path: found 'rows/*/../../../*.jsonl', expected a path inside the folder of the file\n\nhint: add `roots: [..]` at the top of the file"),
    'path other root': (GOOD, GOOD.replace("version: 1", "version: 1\nroots: [/data, ../shared]").replace("models/base", "/date/base"), "p.yaml:7:35: demo.base.path: found '/date/base', expected a path inside the folder of the file, /data, ../shared\n\nhint: add `/date` to `roots:`"),
    'path sibling prefix': (GOOD, GOOD.replace("version: 1", "version: 1\nroots: [/data]").replace("models/base", "/data2/base"), "p.yaml:7:35: demo.base.path: found '/data2/base', expected a path inside the folder of the file, /data\n\nhint: add `/data2` to `roots:`"),
    'path of root /': ('models/base', '/base', "p.yaml:6:35: demo.base.path: found '/base', expected a path inside the folder of the file\n\nhint: add `roots: [/base]` at the top of the file"),
    'path empty': ('models/base', '""', 'p.yaml:6:35: demo.base.path: found an empty path, expected a path\n\nhint: write `.` for the folder of the file itself'),
    'gguf': ('path: models/base', 'gguf: /m.gguf', "p.yaml:6:35: demo.base.gguf: found '/m.gguf', expected a path inside the folder of the file\n\nhint: add `roots: [/m.gguf]` at the top of the file"),
    'include_path': ('datasets: [data]', 'datasets: [data], benchmarks: [any], include_path: ../tasks', "p.yaml:11:95: demo.eval.include_path: found '../tasks', expected a path inside the folder of the file\n\nhint: add `roots: [..]` at the top of the file"),
    'code path': ('{type: files, path: rows.jsonl}', '{type: code, path: /src}', "p.yaml:7:41: demo.data.sources.0: found source code without model\n\nhint: name the model whose tokenizer measures chunks, for example `model: base`\n\np.yaml:7:60: demo.data.sources.0.path: found '/src', expected a path inside the folder of the file\n\nhint: add `roots: [/src]` at the top of the file"),
    'lock path': ('vars:', 'runtimes: {a: {lock: ../a.txt}}\nvars:', "p.yaml:2:22: runtimes.a.lock: found '../a.txt', expected a path inside the folder of the file\n\nhint: add `roots: [..]` at the top of the file"),
    'variable path': (GOOD, GOOD.replace("rank: 16", "rank: 16, where: ../x").replace("models/base", "\"${where}/base\""), "p.yaml:6:35: demo.base.path: found '../x/base', expected a path inside the folder of the file\n\nhint: add `roots: [../x]` at the top of the file; the value comes from ${where}, p.yaml:2:25"),
    'hub dots': ('path: models/base', 'hub: ../..', "p.yaml:6:34: demo.base.hub: found '../..', expected owner/name, as on the hub\n\nhint: for a local folder, write `path: ../..`"),
    'hub path': ('path: models/base', 'hub: a/b/c', "p.yaml:6:34: demo.base.hub: found 'a/b/c', expected owner/name, as on the hub\n\nhint: for a local folder, write `path: a/b/c`"),
    'rev dots': ('path: models/base', 'hub: a/b, revision: a/../../b', "p.yaml:6:49: demo.base.revision: found 'a/../../b', expected a branch, tag or commit"),
    'repo dots': ('{type: files, path: rows.jsonl}', '{type: hub, repo: ../x}', "p.yaml:7:59: demo.data.sources.0.repo: found '../x', expected owner/name, as on the hub\n\nhint: for local files, write `{type: files, path: ../x}`"),
    'gate of itself': ('at_least: 0.5', 'not_below: eval', 'p.yaml:12:86: demo.gate.require.0.not_below: found `eval`, the stage itself\n\nhint: compare it with another stage'),
    'no target modules': ('lora: {', 'lora: {target_modules: [], ', 'p.yaml:8:78: demo.sft.lora.target_modules: found an empty list, expected at least 1 or text'),
    'shard of nothing': ('adapters: [sft]', 'adapters: [sft], max_shard_size: 0GB', "p.yaml:9:62: demo.merged.max_shard_size: found '0GB', expected a size such as 500MB or 5GB"),
    'field under resources': ('global_batch_size: 8', 'global_batch_size: 8, micro_batch_size: 8', 'p.yaml:8:99: demo.sft.micro_batch_size: found the unknown field `micro_batch_size`, expected a field of sft\n\nhint: write it under `resources:`'),
    'no validation': ('global_batch_size: 8', 'global_batch_size: 8, eval_steps: 5', 'p.yaml:8:111: demo.sft.eval_steps: found `data`, which has no validation split\n\nhint: add `split: {validation: 0.05}` to `data`'),
    'no test': ('split: {test: 0.1}', 'split: {test: 0}', 'p.yaml:10:60: demo.gptq.calibration: found `data`, which has no test split\n\nhint: add `split: {test: 0.05}` to `data`\n\np.yaml:11:55: demo.eval.datasets.0: found `data`, which has no test split\n\nhint: add `split: {test: 0.05}` to `data`'),
    'roots text': ('vars:', 'roots: /data\nvars:', "p.yaml:2:8: roots: found '/data', expected a list\n\nhint: write `[/data]`"),
    'roots number': ('vars:', 'roots: [1]\nvars:', 'p.yaml:2:9: roots.0: found 1, expected text\n\nhint: put quotes around it'),
    'pool unknown': ('pipelines:\n  demo:\n', POOLED + '    pool: gpuu\n', 'p.yaml:6:11: demo.pool: found the unknown pool `gpuu`, expected gpu\n\nhint: did you mean `gpu`?'),
    'pool unknown of stage': (GOOD, GOOD.replace('pipelines:\n  demo:\n', POOLED).replace('kind: merge', 'kind: merge, pool: cpu'), 'p.yaml:10:35: demo.merged.pool: found the unknown pool `cpu`, expected gpu\n\nhint: did you mean `gpu`?'),
    'pool of a gate': (GOOD, GOOD.replace('pipelines:\n  demo:\n', POOLED).replace('kind: gate', 'kind: gate, pool: gpu'), 'p.yaml:13:28: demo.gate.pool: found the unknown field `pool`, expected a field of gate\n\nhint: it is a field of model and dataset and sft and dpo and kto and grpo and evaluate and merge and quantize and export'),
    'pool type unknown': ('pipelines:', 'pools: {gpu: {type: dokcer, image: x}}\npipelines:', "p.yaml:3:21: pools.gpu.type: found 'dokcer', expected process, docker, kubernetes\n\nhint: did you mean `docker`?"),
    'pool without type': ('pipelines:', 'pools: {gpu: {concurrency: 1}}\npipelines:', 'p.yaml:3:9: pools.gpu: found no `type`, expected process, docker, kubernetes\n\nhint: add `type: ...`'),
    'pool field of another type': ('pipelines:', 'pools: {gpu: {type: process, image: x}}\npipelines:', 'p.yaml:3:30: pools.gpu.image: found the unknown field `image`, expected concurrency, queues, gpu_memory, type, local'),
    'pool without image': ('pipelines:', 'pools: {gpu: {type: docker}}\npipelines:', 'p.yaml:3:9: pools.gpu.image: found nothing, expected a value (Container image with tuneline and its runtimes; infra/docker builds one)\n\nhint: add `image: registry.example/tuneline:latest`'),
    'pool concurrency': ('pipelines:', 'pools: {gpu: {type: process, concurrency: 0}}\npipelines:', 'p.yaml:3:43: pools.gpu.concurrency: found 0, expected at least 1'),
    'training fields elsewhere': ('kind: merge', 'kind: merge, resources: {nodes: 1, checkpoint_steps: 5, checkpoint_minutes: 2.5, checkpoints_kept: 3, gradient_checkpointing: true, collective_timeout: 9, strategy: ddp, sequence_parallel_size: 2}', 'p.yaml:9:210: demo.merged.resources.sequence_parallel_size: found sequence_parallel_size, gradient_checkpointing, checkpoint_steps, checkpoint_minutes, checkpoints_kept, collective_timeout for merge, which is not a training\n\nhint: remove them'),
    'batches elsewhere': ('kind: merge', 'kind: merge, resources: {micro_batch_size: 4}', 'p.yaml:9:59: demo.merged.resources.micro_batch_size: found micro_batch_size for merge, which does not use batches\n\nhint: remove it'),
    'over_long alone': ('split: {test: 0.1}', 'split: {test: 0.1}, over_long: error', 'p.yaml:7:106: demo.data.over_long: found over_long without max_length\n\nhint: remove it, or set max_length'),
    'special tokens of no model': ('split: {test: 0.1}', 'split: {test: 0.1}, special_tokens: keep', 'p.yaml:7:111: demo.data.special_tokens: found special_tokens without model\n\nhint: name the model whose tokens they are, for example `model: base`'),
    'answers of no dataset': ('datasets: [data]', 'benchmarks: [arc_easy], max_new_tokens: 8', 'p.yaml:11:84: demo.eval.max_new_tokens: found max_new_tokens without datasets: it has no effect\n\nhint: remove it'),
    'checkpoints with early stopping': (GOOD, GOOD.replace('test: 0.1', 'test: 0.1, validation: 0.1').replace('global_batch_size: 8', 'eval_steps: 5, early_stopping: {}, resources: {checkpoint_steps: 5}'), 'p.yaml:8:142: demo.sft.resources.checkpoint_steps: found checkpoint_steps with early_stopping, which saves at each evaluation\n\nhint: remove it; set `checkpoint_minutes` to save in between as well'),
    'checkpoints by both': ('global_batch_size: 8', 'global_batch_size: 8, resources: {checkpoint_steps: 5, checkpoint_minutes: 5}', 'p.yaml:8:129: demo.sft.resources.checkpoint_steps: found checkpoint_steps with checkpoint_minutes, which replaces it\n\nhint: remove one of them'),
    'pool size': ('pipelines:', 'pools: {gpu: {type: docker, image: x, shm_size: 16GB}}\npipelines:', "p.yaml:3:49: pools.gpu.shm_size: found '16GB', expected a size such as 512Mi or 16Gi\n\nhint: write `16Gi`"),
    'pool size other unit': ('pipelines:', 'pools: {gpu: {type: docker, image: x, shm_size: 16TB}}\npipelines:', "p.yaml:3:49: pools.gpu.shm_size: found '16TB', expected a size such as 512Mi or 16Gi"),
    'pool memory without unit': ('pipelines:', 'pools: {gpu: {type: process, gpu_memory: 24}}\npipelines:', 'p.yaml:3:42: pools.gpu.gpu_memory: found 24, expected a size such as 512Mi or 16Gi\n\nhint: write `24Gi`'),
    'pool memory of nothing': ('pipelines:', 'pools: {gpu: {type: process, gpu_memory: 0Gi}}\npipelines:', "p.yaml:3:42: pools.gpu.gpu_memory: found '0Gi', expected a size such as 512Mi or 16Gi"),
    'pool memory as text': ('pipelines:', 'pools: {gpu: {type: process, gpu_memory: "24"}}\npipelines:', "p.yaml:3:42: pools.gpu.gpu_memory: found '24', expected a size such as 512Mi or 16Gi\n\nhint: write `24Gi`"),
    'pool memory bool': ('pipelines:', 'pools: {gpu: {type: process, gpu_memory: true}}\npipelines:', 'p.yaml:3:42: pools.gpu.gpu_memory: found true, expected a size such as 512Mi or 16Gi'),
    'shard without unit': ('adapters: [sft]', 'adapters: [sft], max_shard_size: 5', 'p.yaml:9:62: demo.merged.max_shard_size: found 5, expected a size such as 500MB or 5GB\n\nhint: write `5GB`'),
    'pool gpus text': ('pipelines:', 'pools: {gpu: {type: docker, image: x, gpus: some}}\npipelines:', "p.yaml:3:45: pools.gpu.gpus: found 'some', expected all or a whole number"),
    'pool gpus below': ('pipelines:', 'pools: {gpu: {type: docker, image: x, gpus: -1}}\npipelines:', 'p.yaml:3:45: pools.gpu.gpus: found -1, expected all or at least 0'),
    'pool claim': ('pipelines:', 'pools: {gpu: {type: kubernetes, image: x}}\npipelines:', "p.yaml:3:9: pools.gpu.volume_claim: found nothing, expected a value (Persistent volume claim with the project's folder, mounted at that folder's path; jobs share the store and checkpoints through it)\n\nhint: add `volume_claim: ...`"),
    'toleration effect': ('pipelines:', 'pools: {gpu: {type: kubernetes, image: x, volume_claim: y, tolerations: [{key: a, effect: NoShedule}]}}\npipelines:', "p.yaml:3:91: pools.gpu.tolerations.0.effect: found 'NoShedule', expected NoSchedule, PreferNoSchedule, NoExecute\n\nhint: did you mean `NoSchedule`?"),
    'queue priority': ('pipelines:', 'pools: {gpu: {type: process, queues: {a: {priority: 0}}}}\npipelines:', 'p.yaml:3:53: pools.gpu.queues.a.priority: found 0, expected at least 1'),
    'queue priority twice': ('pipelines:', 'pools: {gpu: {type: process, queues: {a: {priority: 1}, b: {priority: 1}}}}\npipelines:', 'p.yaml:3:71: pools.gpu.queues.b.priority: found 1, the priority of `a`, expected a different number\n\nhint: give each queue of a pool its own priority'),
    'queue unknown': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    queue: nigtly\n', 'p.yaml:7:12: demo.queue: found the unknown queue `nigtly` of pool `gpu`, expected default, interactive, nightly\n\nhint: did you mean `nightly`?'),
    'queue without pool': ('pipelines:\n  demo:\n', POOLED + '    queue: nightly\n', 'p.yaml:6:12: demo.queue: found a queue without `pool`\n\nhint: name the pool that the pipeline runs in'),
    'schedules without pool': ('pipelines:\n  demo:\n', POOLED + '    schedules: {night: {cron: 0 2 * * *}}\n', 'p.yaml:6:5: demo.schedules: found schedules without `pool`\n\nhint: name the pool that the pipeline runs in'),
    'schedule neither': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {timezone: UTC}}\n', 'p.yaml:7:17: demo.schedules.night: found neither, expected exactly one of cron, interval'),
    'schedule both': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {cron: 0 2 * * *, interval: 6h}}\n', 'p.yaml:7:17: demo.schedules.night: found cron and interval, expected exactly one of cron, interval'),
    'schedule cron': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {cron: 0 2 * *}}\n', "p.yaml:7:31: demo.schedules.night.cron: found '0 2 * *', expected a cron expression such as `0 2 * * *`\n\nhint: five fields: minute, hour, day of the month, month, day of the week"),
    'schedule hour': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {cron: 0 25 * * *}}\n', "p.yaml:7:31: demo.schedules.night.cron: found 25 for the hour in '0 25 * * *', expected 0 to 23"),
    'schedule interval': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {interval: 6 hours}}\n', "p.yaml:7:35: demo.schedules.night.interval: found '6 hours', expected a time such as 30m, 6h or 7d"),
    'schedule timezone': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {cron: 0 2 * * *, timezone: Europe/Berln}}\n', "p.yaml:7:52: demo.schedules.night.timezone: found 'Europe/Berln', expected a time zone, such as Europe/Berlin"),
    'schedule queue': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {cron: 0 2 * * *, queue: night}}\n', 'p.yaml:7:49: demo.schedules.night.queue: found the unknown queue `night` of pool `gpu`, expected default, interactive, nightly\n\nhint: did you mean `nightly`?'),
    'schedule unknown field': ('pipelines:\n  demo:\n', POOLED + '    pool: gpu\n    schedules: {night: {corn: 0 2 * * *}}\n', 'p.yaml:7:25: demo.schedules.night.corn: found the unknown field `corn`, expected cron, interval, timezone, active, catch_up, queue, overrides, variables\n\nhint: did you mean `cron`?'),
    'devices count': ('[sft]', '[sft], resources: {gpus: 1, devices: [0, 1]}', 'p.yaml:9:76: demo.merged.resources.devices: found [0, 1], expected as many different GPU indices as resources.gpus, 1\n\nhint: set `gpus: 2`'),
    'devices twice': ('[sft]', '[sft], resources: {gpus: 2, devices: [1, 1]}', 'p.yaml:9:64: demo.merged.resources.gpus: found 2 for merge, expected 1\n\nhint: write `gpus: 1`: only trainings and evaluations run in several processes\n\np.yaml:9:76: demo.merged.resources.devices: found [1, 1], expected as many different GPU indices as resources.gpus, 2'),
    'devices below': ('[sft]', '[sft], resources: {gpus: 1, devices: [-1]}', 'p.yaml:9:76: demo.merged.resources.devices: found [-1], expected as many different GPU indices as resources.gpus, 1'),
}
# fmt: on


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_file_is_refused_with_place_and_hint(kind: str) -> None:
    old, new, message = BAD[kind]
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(ConfigError, match=r"p\.yaml:\d+:\d+: ") as caught:
        load_text(text)
    assert str(caught.value) == message


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = GOOD.replace("kind: model", "kind: modle").replace("model: merged", "model: mergd").replace("at_least: 0.5", "at_lest: 0.5")
    with pytest.raises(ConfigError, match="modle") as caught:
        load_text(text)
    places = [problem.place for problem in caught.value.problems]
    assert [place.rsplit(":", 1)[0] for place in places] == ["p.yaml:6", "p.yaml:10", "p.yaml:12"]


def test_every_cycle_is_found_each_once() -> None:
    more = "".join(f"      {name}: {{kind: model, path: x, needs: [{need}]}}\n" for name, need in ("ab", "ba", "cd", "de", "ec"))
    with pytest.raises(ConfigError, match="cycle") as caught:
        load_text(GOOD + more)
    assert [problem.message for problem in caught.value.problems] == ["found a cycle: a -> b -> a", "found a cycle: c -> d -> e -> c"]


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match=r"p\.yaml:\d+:\d+: .* values once aliases are expanded"):
        parse("\n".join(lines), "p.yaml")


def test_every_form_of_text_has_words() -> None:
    def patterns(node: Any) -> set[str]:
        below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        own = {node["pattern"]} if isinstance(node, dict) and isinstance(node.get("pattern"), str) else set()
        return own.union(*map(patterns, below))

    assert patterns(Spec.model_json_schema()) == set(FORMS)


FLAGS = [
    (['sft.lora.r=x'], [], "--set sft.lora.r: demo.sft.lora.r: found 'x', expected a whole number"),
    (['stf.lora.r=8'], [], '--set stf.lora.r: found the unknown stage `stf`, expected base, data, sft, merged, gptq, eval, gate\n\nhint: did you mean `sft`?'),
    (['sft.lora'], [], '--set sft.lora: found no `=`, expected stage.field=value'),
    (['lora=8'], [], '--set lora: found no field, expected stage.field=value'),
    (['=8'], [], '--set : found no field, expected stage.field=value'),
    ([''], [], '--set : found no `=`, expected stage.field=value'),
    (['sft.=8'], [], '--set sft.: demo.sft.: found the unknown field ``, expected kind, description, needs, retries, timeout, runtime, resources, pool, seed, dtype, model, dataset, adapter, lora, learning_rate, lr_scheduler_type, warmup_steps, min_lr_ratio, lr_decay_steps, lr_power, optim, adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm, num_train_epochs, max_steps, global_batch_size, no_end, on_unrendered, method, bits, vera, oft, ia3, max_length, eval_steps, early_stopping, save_best, train_on, packing, add_tokens, adalora, neftune_noise_alpha, label_smoothing'),
    (['data.sources.7.path=x'], [], '--set data.sources.7.path: found `7` as a list index, expected 0 to 0\n\nhint: to replace the whole list, write `=[a, b]`'),
    (['data.sources.x.path=x'], [], '--set data.sources.x.path: found `x` as a list index, expected 0 to 0\n\nhint: to replace the whole list, write `=[a, b]`'),
    (['data.sources.²=x'], [], '--set data.sources.²: found `²` as a list index, expected 0 to 0\n\nhint: to replace the whole list, write `=[a, b]`'),
    (['data.sources.-1.path=x'], [], '--set data.sources.-1.path: found `-1` as a list index, expected 0 to 0\n\nhint: to replace the whole list, write `=[a, b]`'),
    (["data.sources=" + "9" * 5000], [], '--set data.sources: found a whole number of 5000 digits, expected at most 18\n\nhint: put quotes around it if it is text'),
    (['data.sources.0.path=../x'], [], "--set data.sources.0.path: demo.data.sources.0.path: found '../x', expected a path inside the folder of the file\n\nhint: add `roots: [..]` at the top of the file"),
    (['data.sources=rows.jsonl'], [], "--set data.sources: demo.data.sources: found 'rows.jsonl', expected a list\n\nhint: write `[{type: files, path: rows.jsonl}]`"),
    (['data.sources=[]'], [], '--set data.sources: demo.data.sources: found an empty list, expected at least 1'),
    (['sft.learning_rate.x=1'], [], '--set sft.learning_rate.x: demo.sft.learning_rate: found a mapping, expected a number'),
    (['sft.loar.r=8'], [], '--set sft.loar.r: demo.sft.loar: found the unknown field `loar`, expected kind, description, needs, retries, timeout, runtime, resources, pool, seed, dtype, model, dataset, adapter, lora, learning_rate, lr_scheduler_type, warmup_steps, min_lr_ratio, lr_decay_steps, lr_power, optim, adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm, num_train_epochs, max_steps, global_batch_size, no_end, on_unrendered, method, bits, vera, oft, ia3, max_length, eval_steps, early_stopping, save_best, train_on, packing, add_tokens, adalora, neftune_noise_alpha, label_smoothing\n\nhint: did you mean `lora`?'),
    (['sft.lora.rank=8'], [], '--set sft.lora.rank: demo.sft.lora.rank: found the unknown field `rank`, expected a field of `lora`\n\nhint: write `r`'),
    (['sft.lora={r: 8, rank: 9}'], [], '--set sft.lora: demo.sft.lora.rank: found the unknown field `rank`, expected a field of `lora`\n\nhint: write `r`'),
    (['sft.lora={r: 8'], [], '--set sft.lora: found no `}` at the end of line 1, expected one for its `{` in column 1\n\nhint: close it there; check commas and quotes from the opening bracket on'),
    (['sft.lora=!!python/name:os.system x'], [], '--set sft.lora: found the tag !!python/name:os.system, expected plain YAML without tags\n\nhint: remove the tag'),
    (['sft.lora=a: b: c'], [], '--set sft.lora: found a `:` that does not end a key\n\nhint: put quotes around text that contains `: `; check the indentation'),
    (['sft.model='], [], '--set sft.model: demo.sft.model: found the unknown stage ``, expected a stage that gives a Model: base, merged, gptq'),
    (['sft.model=# x'], [], '--set sft.model: demo.sft.model: found nothing, expected text'),
    (['sft.model=data'], [], '--set sft.model: demo.sft.model: found `data`, which gives a Dataset, expected a stage that gives a Model: base, merged, gptq'),
    (['sft.lora.r=${rang}'], [], '--set sft.lora.r: demo.sft.lora.r: found the unknown variable ${rang}, expected rank\n\nhint: did you mean `rank`?'),
    (['sft.lora.r=${env:HOME}'], [], '--set sft.lora.r: demo.sft.lora.r: found ${env:HOME}, expected only in store, pools, runtimes\n\nhint: use `vars:` and `--var`: a pipeline must not depend on the environment'),
    (['sft.lora.r=.nan'], [], '--set sft.lora.r: found .nan, expected finite numbers\n\nhint: put quotes around it if it is text'),
    (['sft=~'], [], '--set sft: found no field, expected stage.field=value'),
    (['sft.kind=sfft'], [], "--set sft.kind: demo.sft.kind: found 'sfft', expected model, dataset, sft, dpo, kto, grpo, evaluate, merge, quantize, export, gate\n\nhint: did you mean `sft`?"),
    (['merged.adapters.0=base'], [], '--set merged.adapters.0: demo.merged.adapters.0: found `base`, which gives a Model, expected a stage that gives an Adapter: sft'),
    (['base.trust_remote_code=yes'], [], "--set base.trust_remote_code: demo.base.trust_remote_code: found 'yes', expected true or false\n\nhint: write `true`"),
    (['sft.resources.micro_batch_size=3'], [], 'p.yaml:8:96: demo.sft.global_batch_size: found 8, expected multiples of 3 (micro_batch_size 3 x 1 process)\n\nhint: change resources.micro_batch_size: it does not change the result'),
    ([], ['rang=8'], '--var rang: found an unknown variable, expected rank\n\nhint: did you mean `rank`?'),
    ([], ['rank'], '--var rank: found no `=`, expected name=value'),
    ([], ['=8'], '--var : found an unknown variable, expected rank'),
    ([], ['rank=x'], "p.yaml:8:65: demo.sft.lora.r: found 'x', expected a whole number\n\nhint: the value comes from ${rank}, --var rank"),
    ([], ['rank={a: 1}'], '--var rank: vars.rank: found a mapping, expected true or false or a whole number or a number or text'),
    ([], ['rank=${x}'], "--var rank: vars.rank: found '${x}', expected a value without ${...}\n\nhint: write out the value\n\np.yaml:8:65: demo.sft.lora.r: found '${x}', expected a whole number\n\nhint: the value comes from ${rank}, --var rank"),
    ([], ['rank=[1'], '--var rank: found no `]` at the end of line 1, expected one for its `[` in column 1\n\nhint: close it there; check commas and quotes from the opening bracket on'),
]  # fmt: skip


@pytest.mark.parametrize(("sets", "variables", "message"), FLAGS, ids=[str((*sets, *names))[:60] for sets, names, _ in FLAGS])
def test_a_wrong_override_is_refused_in_its_own_name(sets: list[str], variables: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="--set|--var|micro_batch_size") as caught:
        load_text(GOOD, "demo", tuple(sets), tuple(variables))
    assert str(caught.value) == message


BYTES = {
    "latin-1": ("version: 1\n# für\n".encode("latin-1"), "p.yaml:2:4: found the byte 0xfc, which is not UTF-8, expected a file in UTF-8\n\nhint: save the file as UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "p.yaml:1:1: found UTF-16, expected a file in UTF-8\n\nhint: save the file as UTF-8"),
    "UTF-16 without mark": (GOOD.encode("utf-16-le"), "p.yaml:1:2: found the control character U+0000\n\nhint: remove it: the file must be plain text"),
    "not text at all": (bytes(range(256)), "p.yaml:2:118: found the byte 0x80, which is not UTF-8, expected a file in UTF-8\n\nhint: save the file as UTF-8"),
    "another, larger file": (b"#" * (MAX_BYTES + 1), "p.yaml: found more than 1 MB\n\nhint: name the pipelines file with `--file`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, kind: str) -> None:
    data, message = BYTES[kind]
    (tmp_path / "p.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match="found") as caught:
        read(tmp_path / "p.yaml", "p.yaml")
    assert str(caught.value) == message


def test_a_byte_order_mark_and_windows_lines_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read(tmp_path / "p.yaml", "p.yaml").tree == parse(GOOD, "p.yaml").tree


def test_a_file_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(GOOD)
    file.chmod(0)
    as_root = os.geteuid() == 0
    if as_root:  # root ignores permissions
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"^p\.yaml: the file cannot be read: Permission denied\n\nhint: "):
            read(file, "p.yaml")
    finally:
        if as_root:
            os.seteuid(0)


SCHEDULED = """\
    pool: gpu
    schedules:
      night:
        cron: 0 2 * * *
        overrides: {sft.lora.q: 3, stf.seed: 1, sft.resources.micro_batch_size: 3}
        variables: {rang: 8}
"""


def test_what_a_schedule_overrides_is_checked_as_on_the_command_line_and_told_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(GOOD.replace("pipelines:\n  demo:\n", POOLED + SCHEDULED))
    loaded = load(file)
    with pytest.raises(ConfigError, match="night") as caught:
        check_schedules(loaded)
    reported = [
        (problem.place.removeprefix(f"{tmp_path}/"), problem.field, problem.message, problem.hint) for problem in caught.value.problems
    ]
    here = "demo.schedules.night"
    fields = "target_modules, exclude_modules, layers_to_transform, modules_to_save, r, lora_alpha, lora_dropout, rank_pattern, alpha_pattern, init_lora_weights, lora_plus_ratio, use_rslora, use_dora"
    stages = "base, data, sft, merged, gptq, eval, gate"
    assert reported == [
        ("p.yaml:10:33", f"{here}.overrides.sft.lora.q", f"found the unknown field `q`, expected {fields}", ""),
        ("p.yaml:10:46", f"{here}.overrides.stf.seed", f"found the unknown stage `stf`, expected {stages}", "did you mean `sft`?"),
        ("p.yaml:11:27", f"{here}.variables.rang", "found an unknown variable, expected rank", "did you mean `rank`?"),
    ]
    file.write_text(file.read_text().replace("sft.lora.q: 3, stf.seed: 1, ", "").replace("rang", "rank"))
    with pytest.raises(ConfigError, match=r"demo\.schedules\.night: demo\.sft\.global_batch_size: found 8, expected multiples of 3"):
        check_schedules(load(file))
    file.write_text(file.read_text().replace("size: 3", "size: 4"))
    check_schedules(load(file))
