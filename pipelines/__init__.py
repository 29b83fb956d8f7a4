"""What a user runs: the Beam pipelines, the command line and the quickstart.

The only room that imports Beam; no other room imports this one.
"""

import logging

# Beam says on import that Google Cloud's packages are absent. Without the [gcp] extra that is so.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
