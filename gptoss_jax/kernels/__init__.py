"""Single-device functions that know no mesh and no config. Each op is a folder: `reference.py` defines it, the others are held to it."""
