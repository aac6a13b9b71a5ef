"""What is recorded of a test, as plain values: the rooms below and above exchange these."""
