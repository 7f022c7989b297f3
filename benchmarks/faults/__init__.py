"""What storage, signals and strangers do to a merge: harnesses that the tests run small, and `study.faults` at size."""
