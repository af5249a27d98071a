"""Python imports this module at start-up if its folder is on PYTHONPATH; it replaces the source of one module.

MUTANTS_OVERLAY is "MODULE|FILE|TEXT": the module's name, its real file, and the file with the replacement source.
"""

import importlib.util
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path


class Loader(SourceFileLoader):
    text = ""

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec")


class Finder:
    def __init__(self, module, file, text):
        self.module, self.file, self.text = module, file, text

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        loader = Loader(name, self.file)
        loader.text = self.text
        inside = [str(Path(self.file).parent)] if Path(self.file).name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.file, loader=loader, submodule_search_locations=inside)


def install(value):
    module, file, text = value.split("|")
    sys.meta_path.insert(0, Finder(module, file, Path(text).read_text(encoding="utf-8")))


if overlay := os.environ.get("MUTANTS_OVERLAY"):
    install(overlay)
