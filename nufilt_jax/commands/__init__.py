"""The command line: arguments to jobs, and what is shown."""
