"""How a command ends: the exit codes that a shell sees."""

DONE, FAILED, BAD_INPUT, SOME_CASES_FAILED = 0, 1, 2, 3
