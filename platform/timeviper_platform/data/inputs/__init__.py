"""Manifests, folders, globs and archives to pages of media."""
