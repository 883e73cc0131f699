"""On PYTHONPATH: TensorFlow seems not to be installed, and importing it costs no seconds."""

import sys


class Without:
    """A finder of modules that finds no TensorFlow."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        hidden = name.split(".")[0] == "tensorflow"
        return None if hidden else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
