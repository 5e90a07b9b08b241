"""Changes to a program under test: the modules beside this one that PATCHES names.

Python runs this file as it starts where its folder is on the path; a child of the warm parent (warm.py) runs it, too.
"""

import importlib
import os

for name in os.environ.get("PATCHES", "").split():
    importlib.import_module(name)
