"""Other people's annotations to SAMPLES rows: one module a family of formats, `convert.py` over all of them."""
