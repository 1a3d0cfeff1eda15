"""The public harness lmms-eval on this project's benchmark and models."""
