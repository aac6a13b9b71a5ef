"""The records of tests and runs, as plain values that all other packages exchange."""
