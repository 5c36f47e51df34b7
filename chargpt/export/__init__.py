"""Models of other programs, from a run and to a run. Each export is compared with its source."""
