"""The preprocessing job."""
