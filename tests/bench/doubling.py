"""A setup for tests of the measurement, whose right answer is 2 x."""

from bench.suite import Setup


class Doubling(Setup):
    """A setup whose right answer is 2 x, on two sets of inputs."""

    input_sets = 2
    closed = False

    @property
    def key(self):
        return {"case": "doubling"}

    def close(self):
        self.closed = True

    def check(self, peer, result, inputs):
        return None if result == 2 * inputs else f"{result} is not {2 * inputs}"

    def figures(self, peer, seconds):
        return {"rate": 1 / seconds}


def counted(answer):
    """A `prepare` of a peer with this answer, and the list of the inputs it is called with."""
    calls = []

    def prepare(_setup):
        def call(inputs):
            calls.append(inputs)
            return answer(inputs)

        return call

    return prepare, calls
