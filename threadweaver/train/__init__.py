"""Training commands: `python -m threadweaver.train --help`."""
