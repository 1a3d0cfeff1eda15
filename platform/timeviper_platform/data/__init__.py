"""Media to feature store: plan segments, decode frames, encode them, commit Parquet rows."""
