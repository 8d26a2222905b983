"""The problems of the study, a file each with a class `Problem`."""
