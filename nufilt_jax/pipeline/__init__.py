"""From sources to an output folder: plan, run, report. With the command line, the only code that sees all parts."""
