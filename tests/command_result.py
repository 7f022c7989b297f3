"""What a command line in the tests leaves."""

import json
import types


class Result(types.SimpleNamespace):
    """Exit status, stdout and stderr of a command."""

    @property
    def lines(self):
        return self.err.splitlines()

    @property
    def json(self):
        return json.loads(self.out)
