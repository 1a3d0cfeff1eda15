"""The preprocessing job: plan, decode, encode, write, report; with Ray or without."""
