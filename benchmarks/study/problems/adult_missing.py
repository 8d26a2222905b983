"""Adult with 90 % of the labels of one task missing: most rows are labelled for income alone."""

from benchmarks.study.problems import adult


class Problem(adult.Problem):
    """`unmarried` is known of a tenth of the training rows."""

    labelled = (1.0, 0.1)
