"""QM9 with every property divided by its standard deviation over the training set."""

from benchmarks.study.problems import qm9


class Problem(qm9.Problem):
    """The same molecules, network and metrics."""

    normalised = True
    doublings = 4
