"""Reads manifests, folders, globs and archives as pages of media."""
