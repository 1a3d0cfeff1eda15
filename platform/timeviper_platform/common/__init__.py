"""What every part stands on: configuration and command line, files at any URI, schemas, a Ray, devices."""
