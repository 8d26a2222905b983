"""Multi-Fashion with the loss of one task times 100, as if in another unit."""

from benchmarks.study.problems import fashion


class Problem(fashion.Problem):
    """The right garment's loss is in hundredths."""

    scales = (1.0, 100.0)
