"""An OpenAI-compatible HTTP endpoint that answers about videos, on Ray Serve."""
