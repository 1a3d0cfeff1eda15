"""The command line: a module per job. `jobs/` and the program `timeviper` call the same functions."""
